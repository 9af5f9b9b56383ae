"""Check the files of a model's folder before torch is imported; refuse by name what cannot be loaded.

Pointers of Git LFS, broken JSON, code of the model's own, pickled, missing or cut-off weights, SentencePiece alone.
`bertray.model.pretrained` sees whether the files fit together.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bertray.errors import RequestError
from bertray.model.sources import WEIGHTS, encoder_folder, hub_name

_INDEX = f"{WEIGHTS}.index.json"
_POINTER = b"version https://git-lfs.github.com/"
_ENDINGS = (".json", ".safetensors", ".txt", ".model")  # of the files that are loaded
_JSON = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
_AGAIN = "copy or download it again"
# Other weights: what they are, what must be installed to convert them, and the argument that reads them.
_OTHERS = {
    "pytorch_model*.bin": ("pickled weights, which can run code", "", ""),
    "tf_model.h5": ("TensorFlow's weights", ", with transformers 4 and tensorflow", ", from_tf=True"),
    "flax_model.msgpack": ("Flax's weights", ", with transformers 4 and flax", ", from_flax=True"),
}


def check_files(encoder: str, option: str = "--encoder") -> dict[str, Any]:
    """Check the files of the encoder that an option names, maybe after a download; returns its config.json.

    Raises:
        RequestError: the encoder does not exist, or has files that cannot be loaded; the message says how to mend it.
    """
    folder = encoder_folder(encoder, option)
    try:
        config = _check_json(folder)
        for path in _weights(folder, config, option, is_hub=hub_name(encoder) is not None):
            try:
                with safe_open(path, framework="numpy"):
                    pass  # the sizes in the header have been compared with the file's
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or cut off ({error}): {_AGAIN}") from error
        if not (folder / "tokenizer.json").is_file() and (pieces := sorted(folder.glob("*.model"))):
            raise ValueError(
                f"{folder} has {pieces[0].name}, but no tokenizer.json (fast tokenizer), which bertray needs. To make "
                f"it: pip install sentencepiece protobuf, then {_saved_again('AutoTokenizer', folder)}"
            )
    except (OSError, ValueError) as error:
        raise RequestError(f"{option} {encoder}: {error}") from error
    return config


def _check_json(folder: Path) -> dict[str, Any]:
    """Check all files but the weights; returns config.json."""
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix in _ENDINGS and path.is_file()):
        _refuse_pointer(path)
        found[path.name] = _object(path) if path.name in _JSON else {}
        if code := found[path.name].get("auto_map"):
            raise ValueError(
                f"{path} asks for Python code of the model's own (auto_map: {code}), and bertray runs none. Give a "
                "model whose model_type transformers has built in. If this one's is, take auto_map out, in a copy"
            )
    if "config.json" not in found:
        raise ValueError(f"{folder} has no config.json; give a model saved with save_pretrained()")
    return found["config.json"]


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path} is a Git LFS pointer. Fetch the file itself: git -C {path.parent} lfs pull")


def _object(path: Path) -> dict[str, Any]:
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:  # no JSON, no UTF-8, no object
        raise ValueError(f"{path} is no JSON object ({error}): {_AGAIN}") from error


def _weights(folder: Path, config: dict[str, Any], option: str, *, is_hub: bool) -> list[Path]:
    """The files of the weights, as transformers chooses them."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / _INDEX).is_file():
        shard_of = _object(folder / _INDEX).get("weight_map")
        shards = sorted(set(map(str, shard_of.values()))) if isinstance(shard_of, dict) else []
        for name in shards:
            if Path(name).name != name or not (folder / name).is_file():
                raise ValueError(f"{folder / _INDEX} names {name}, which is no file beside it: {_AGAIN}")
        if not shards:
            raise ValueError(f"{folder / _INDEX} names no files: {_AGAIN}")
        return [folder / name for name in shards]
    if is_hub:
        raise ValueError(
            f"on the Hub it has no {WEIGHTS}. Fetch all of it (hf download … --local-dir FOLDER) and give {option} "
            "FOLDER: the next message says how to convert it"
        )
    for pattern, (what, needed, argument) in _OTHERS.items():
        if others := sorted(folder.glob(pattern)):
            _refuse_pointer(others[0])
            name = str((config.get("architectures") or ["AutoModel"])[0])
            line = _saved_again(name if name.isidentifier() else "AutoModel", folder, argument)
            raise ValueError(
                f"{others[0]} holds {what}, and bertray loads safetensors alone. If you trust the file, convert it "
                f"once{needed}: {line}"
            )
    raise ValueError(f"{folder} has no {WEIGHTS}; give a model saved with save_pretrained()")


def _saved_again(class_name: str, folder: Path, argument: str = "") -> str:
    """The line that loads what stands in a folder, and saves it there in today's format."""
    place = json.dumps(str(folder))
    code = f"import transformers as t; t.{class_name}.from_pretrained({place}{argument}).save_pretrained({place})"
    return f"python -c {shlex.quote(code)}"
