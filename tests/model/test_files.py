"""Files of an encoder that cannot be loaded are refused by name, with what to do, before torch is imported."""

import ast
import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel

from bertray.errors import RequestError
from bertray.model.files import check_files
from tests.conftest import ROOT

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'5' * 64}\nsize 133466304\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_encoder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_encoder, tmp_path / "an encoder's")


@pytest.fixture
def shards(folder: Path) -> Path:
    model = BertModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(RequestError) as caught:
        check_files(str(folder))
    assert str(caught.value).startswith(f"--encoder {folder}: ")
    return str(caught.value)


def test_whole_files_are_not_refused(shards: Path, tiny_bundle: Path) -> None:
    for name in ("README.md", "pytorch_model.bin", "onnx"):  # files that are not loaded may be anything
        (shards / name).write_text(POINTER)
    for encoder in (str(shards), str(tiny_bundle), "minilm"):
        check_files(encoder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json", "vocab.txt", "spiece.model"]
)
def test_a_pointer_of_git_lfs(name: str, folder: Path) -> None:
    (folder / name).write_text(POINTER)
    assert f"{folder / name} is a Git LFS pointer. Fetch the file itself: git -C {folder} lfs pull" in refused(folder)


def test_a_pointer_among_shards(shards: Path) -> None:
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    shard.write_text(POINTER)
    assert f"{shard} is a Git LFS pointer" in refused(shards)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"[]", b"null", b"\xff\xfe{\x00}\x00"])
def test_broken_json(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    assert f"{folder / name} is no JSON object" in refused(folder)


@pytest.mark.parametrize(
    "cut",
    [
        lambda whole: b"",
        lambda whole: whole[:4],
        lambda whole: whole[:100],  # within the header
        lambda whole: whole[: len(whole) * 2 // 3],
        lambda whole: whole[:-1],
        lambda whole: whole + b"more",
        lambda whole: b"<!DOCTYPE html><title>Not found</title>",
    ],
)
def test_weights_that_are_cut_off(cut: Callable[[bytes], bytes], folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(cut(file.read_bytes()))
    assert f"{file} is damaged or cut off" in refused(folder)


def test_a_cut_shard(shards: Path) -> None:
    shard = sorted(shards.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-7])
    assert f"{shard} is damaged or cut off" in refused(shards)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_names(index: object, shards: Path) -> None:
    (shards / INDEX).write_text(json.dumps(index))
    assert f"{shards / INDEX} names no files" in refused(shards)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "gone.safetensors"]
)
def test_an_index_that_names_files_elsewhere(name: str, shards: Path, tiny_encoder: Path) -> None:
    for place in (shards.parent, shards / "sub"):
        place.mkdir(exist_ok=True)
        shutil.copy(tiny_encoder / "model.safetensors", place)
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["pooler.dense.bias"] = name
    (shards / INDEX).write_text(json.dumps(index))
    assert f"names {name}, which is no file beside it" in refused(shards)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "holds pickled weights, which can run code.*convert it once: python -c "),
        ("pytorch_model-00001-of-00002.bin", "holds pickled weights"),
        ("tf_model.h5", r"holds TensorFlow's weights.* transformers 4 and tensorflow: .*, from_tf=True\)"),
        ("flax_model.msgpack", r"holds Flax's weights.*from_flax=True"),
        ("model.onnx", r"has no model\.safetensors; give a model saved with save_pretrained\(\)"),
    ],
)
def test_weights_of_other_kinds(name: str, words: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(RequestError, match=words):
        check_files(str(folder))


def test_the_line_that_converts_does(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    python, option, code = shlex.split(refused(folder).partition("convert it once: ")[2])
    assert (python, option) == ("python", "-c")
    exec(code)
    check_files(str(folder))
    found = load_file(folder / "model.safetensors")
    assert all(torch.equal(found[name], held) for name, held in weights.items())


@pytest.mark.parametrize("name", ["spm.model", "spiece.model", "sentencepiece.bpe.model"])
def test_sentencepiece_alone(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"\n\x0e\n\x05<unk>")
    check_files(str(folder))  # beside tokenizer.json it is not read
    (folder / "tokenizer.json").unlink()
    message = refused(folder)
    for words in (f"has {name}, but no tokenizer.json", "pip install sentencepiece", "AutoTokenizer.from_pretrained"):
        assert words in message


LOAD = """
import sys
from bertray.errors import RequestError
from bertray.model.pretrained import load_classifier, load_tokenizer

assert sys.stdin.isatty()
for folder in sys.argv[1:]:
    for load in (lambda: load_tokenizer(folder, 64), lambda: load_classifier(folder, "ab", None, 0)):
        try:
            load()
            print("loaded")
        except RequestError:
            print("refused")
"""


@pytest.mark.services
def test_code_that_came_with_a_model_never_runs(folder: Path, tmp_path: Path) -> None:
    """On a terminal, where a user who is asked says yes; if the files are not looked at first, too."""
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(
        f"import pathlib\n\npathlib.Path({str(ran)!r}).touch()\nfrom transformers import BertConfig as Own\n"
    )
    config = json.loads((folder / "config.json").read_text())
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForSequenceClassification"), "own.Own")
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    other = shutil.copytree(folder, tmp_path / "of a type that transformers does not know")
    (other / "config.json").write_text(json.dumps(config | {"auto_map": auto_map, "model_type": "own_bert"}))
    for one in (folder, other):
        assert "asks for Python code of the model's own" in refused(one)
    controller, terminal = pty.openpty()
    os.write(controller, b"y\n" * 8)
    command = [sys.executable, "-c", LOAD, str(folder), str(other)]
    done = subprocess.run(command, stdin=terminal, capture_output=True, text=True, check=False, timeout=100)
    os.close(controller)
    os.close(terminal)
    assert done.stdout.split() == ["loaded", "loaded", "refused", "refused"], done.stderr
    assert not ran.exists()


def test_no_call_leaves_the_question_open() -> None:
    """Every call of transformers' Auto classes says that no code is run, in the library and in the benchmarks."""
    num_calls = 0
    for path in [*(ROOT / "lib").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(
                (".from_pretrained", ".from_config")
            ):
                continue
            if ast.unparse(node.func).removeprefix("transformers.").startswith("Auto"):
                num_calls += 1
                assert "NO_CODE" in ast.unparse(node) or "trust_remote_code=False" in ast.unparse(node), path
    assert num_calls >= 10
