"""Encoders from the Hub, which is a small server here: revisions, the cache, and what the Hub may answer."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from transformers import BertModel

from bertray.errors import RequestError
from bertray.model.sources import encoder_folder, hub_name, lasting

MAIN, TAGGED = "a" * 40, "b" * 40
REVISIONS = {"main": MAIN, "v1.0": TAGGED, MAIN: MAIN, TAGGED: TAGGED}


class Hub(BaseHTTPRequestHandler):
    """The answers of the Hub that its client needs, for the model some/tiny, and others that may not be read."""

    folders: dict[str, Path]  # by commit
    asked: list[str]

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        is_api, parts = path.startswith("/api/models/"), path.removeprefix("/api/models").split("/")[1:]
        name, what, revision, *file = ["/".join(parts[:2]), *parts[2:], "", ""]
        if name == "some/gated" and not is_api:
            self.reply(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."})
        elif name == "some/closed":
            self.reply(403, {"X-Error-Message": "Forbidden."})
        elif name == "some/broken":
            self.reply(500, {})
        elif name == "some/unknown":
            self.reply(401, {"X-Error-Message": "Invalid username or password."})
        elif name not in ("some/tiny", "some/gated", "some/pickle"):
            self.reply(404, {"X-Error-Code": "RepoNotFound"} if name == "no/model" else {})
        elif revision not in REVISIONS:
            self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        elif is_api and what == "revision":
            commit = REVISIONS[revision]
            self.reply(200, {}, json.dumps({"_id": "1", "id": name, "modelId": name, "sha": commit}).encode())
        elif is_api:
            files = [one for one in self.folders[revision].rglob("*") if one.is_file()]
            files = [one for one in files if name != "some/pickle" or one.suffix != ".safetensors"]
            entries = [
                {"type": "file", "path": str(one.relative_to(self.folders[revision])), "size": one.stat().st_size}
                for one in files
            ]
            self.reply(200, {}, json.dumps([{**entry, "oid": "0" * 40} for entry in entries]).encode())
        else:
            content = (self.folders[revision] / "/".join(file).strip("/")).read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.reply(200, {"ETag": etag, "X-Repo-Commit": REVISIONS[revision]}, content)

    def reply(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture(scope="module")
def folders(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By commit: on the branch main in one file, at the tag v1.0 in shards; and what is not to be downloaded."""
    folder = tmp_path_factory.mktemp("hub")
    found = {MAIN: shutil.copytree(tiny_encoder, folder / "main"), TAGGED: shutil.copytree(tiny_encoder, folder / "v1")}
    (found[TAGGED] / "model.safetensors").unlink()
    BertModel.from_pretrained(tiny_encoder).save_pretrained(found[TAGGED], max_shard_size="1MB")
    for one in found.values():
        (one / "onnx").mkdir()
        for name in ("pytorch_model.bin", "onnx/model.safetensors", "own.py"):
            (one / name).write_bytes(b"not to be downloaded")
    return found


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """The address of the server, and the paths that it was asked for."""
    handler = type("Handler", (Hub,), {"folders": folders, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()
    thread.join()


Look = Callable[..., list[str]]


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """Checks encoders in a process that reads HF_ENDPOINT as it starts: `lasting`, or the error, of each."""
    code = """
import sys
from bertray.errors import RequestError
from bertray.model.files import check_files
from bertray.model.sources import lasting
for encoder in sys.argv[1:]:
    try:
        check_files(encoder)
        print(lasting(encoder))
    except RequestError as error:
        print(str(error).replace("\\n", " "))
"""

    def ask(endpoint: str, *encoders: str) -> list[str]:
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",  # other tests set it
        }
        command = [sys.executable, "-c", code, *encoders]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
        return done.stdout.splitlines()

    return ask


def test_a_revision_is_downloaded_and_found_again_without_the_hub(
    hub: tuple[str, list[str]], look: Look, tmp_path: Path
) -> None:
    address, asked = hub
    encoders = ["some/tiny", "some/tiny@v1.0", f"some/tiny@{TAGGED}", "some/tiny@main"]
    commits = [f"some/tiny@{commit}" for commit in (MAIN, TAGGED, TAGGED, MAIN)]
    assert look(address, *encoders) == commits
    fetched = {path.partition("/resolve/")[2] for path in asked if "/resolve/" in path}
    assert {path.partition("/")[0] for path in fetched} == {MAIN, TAGGED}
    assert f"{TAGGED}/model-00001-of-00002.safetensors" in fetched
    assert not any(path.endswith((".bin", ".py", "onnx/model.safetensors")) for path in fetched)
    # Nothing listens at port 9: the cache is used.
    *found, other = look("http://127.0.0.1:9", *encoders, "some/tiny@v2.0")
    assert found == commits
    assert "the Hub cannot be reached" in other
    (tmp_path / "some" / "tiny@v1.0").mkdir(parents=True)
    assert look(address, "some/tiny@v1.0") == [
        f"--encoder some/tiny@v1.0: {tmp_path}/some/tiny@v1.0 has no config.json; "
        "give a model saved with save_pretrained()"
    ]


def test_what_the_hub_answers_is_told_apart(hub: tuple[str, list[str]], look: Look) -> None:
    expected = {
        "some/tiny@v3": "some/tiny has no revision v3. Give a branch, a tag or a whole commit hash",
        "no/model": "the Hub has no such model: check the name",
        "nowhere/at-all": "the Hub has no such model: check the name",
        "some/unknown": "the Hub has no such model: check the name",
        "some/gated": "Accept its terms on its page, and set HF_TOKEN",
        "some/closed": "Accept its terms on its page, and set HF_TOKEN",
        "some/broken": "it cannot be downloaded: ",
        "some/pickle": "on the Hub it has no model.safetensors",
        "not a/hub/id": "neither a folder nor a Hub id",
    }
    for (encoder, words), line in zip(expected.items(), look(hub[0], *expected), strict=True):
        assert line.startswith(f"--encoder {encoder}: ") and words in line
        assert "the Hub cannot be reached" not in line


@pytest.mark.parametrize("encoder", ["miniml", "MiniLM", "mini-lm", "minilm-l6", "all-MiniLM-L6-v2"])
def test_a_name_like_minilm(encoder: str) -> None:
    with pytest.raises(RequestError, match=rf"--encoder {encoder}: no such folder\. Did you mean minilm\?"):
        encoder_folder(encoder)


@pytest.mark.parametrize("encoder", ["distilbert", "bert-base-uncase", "models/my-bert"])
def test_a_name_that_may_be_a_typo(encoder: str) -> None:
    with pytest.raises(RequestError) as caught:
        encoder_folder(encoder)
    for words in ("no such folder", "the Hub cannot be reached", "a typo (Hub ids look like distilbert-base-uncased)"):
        assert words in str(caught.value)


def test_what_lasts(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "my@v1")
    monkeypatch.chdir(tmp_path)
    assert (lasting("my@v1"), lasting("minilm")) == (str(tmp_path / "my@v1"), "minilm")
    assert [hub_name(name) for name in ("my@v1", "minilm", "a/b", "a/b@refs/pr/1")] == [
        None,
        None,
        ("a/b", None),
        ("a/b", "refs/pr/1"),
    ]
