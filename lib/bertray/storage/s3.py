"""S3 as it behaves: requests that fail for a while, bodies that end early, answers that get lost.

botocore repeats a request that is refused for now (500, 503 SlowDown) or whose connection breaks, up to
`_MAX_ATTEMPTS` times unless AWS_RETRY_MODE or AWS_MAX_ATTEMPTS say otherwise. This module repeats a request if the body
of its answer ends early. Other modules use `bertray.storage.location`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import fsspec
from botocore.exceptions import ClientError, FlexibleChecksumError, HTTPClientError, IncompleteReadError
from botocore.exceptions import (
    ConnectionError as NoConnectionError,
)

from bertray.storage.patience import alive

# The waits between 7 attempts add up to 31 s on average and 63 s at most: enough for a short outage.
_MAX_ATTEMPTS = 7
# botocore's newer mode "standard" allows a process some 100 retries, then none until requests succeed again. In an
# outage of a minute every shard of an archive would fail, one after the other, without a wait.
_RETRY_MODE = "legacy"
# s3fs repeats a request that timed out after botocore's attempts, and a read twice over. With its default of 5, a read
# from a server that hangs would take 5 x 5 x 7 timeouts of 15 s.
_S3FS_RETRIES = 2
_BODY_BACKOFF_S = 0.1
# What is sent again after a fault. Up to 10 parts are in memory at once. S3 allows 10,000 of them a file: 160 GB.
_PART_BYTES = 16 << 20
# Bytes fetched beyond a read. s3fs' default of 50 MiB would be fetched again with every MiB of columns that lie further
# apart; with 1 MiB a small shard still arrives in one request with its footer.
_AHEAD_BYTES = 1 << 20
_NUM_CONNECTIONS = 8
# Of a process at once; botocore's default is 10.
MAX_CONNECTIONS = 64
# CopyObject's answer for an object of more than 5 GB.
_TOO_LARGE = "InvalidRequest"
# Answers to a conditional put.
_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict")
# Attempts at a whole upload.
_MAX_STARTS = 3
# Of stores that do not know a header, such as If-None-Match.
_BAD_HEADER = (400, 501)
# The store, or what stands before it, is overloaded or broken for now.
_AWAY = (429, 500, 502, 503, 504)
CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION"


def connect(scheme: str) -> Any:
    """The file system of s3:// URIs. It never caches listings: another process may write between two of them."""
    retries: dict[str, Any] = {} if "AWS_RETRY_MODE" in os.environ else {"mode": _RETRY_MODE}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = _MAX_ATTEMPTS
    config: dict[str, Any] = {"retries": retries, "max_pool_connections": MAX_CONNECTIONS}
    if CHECKSUMS not in os.environ:
        # Older MinIO, Ceph and others refuse the checksums that botocore adds unasked. Without one it signs the
        # body's SHA-256, which the store compares as well.
        config["request_checksum_calculation"] = "when_required"
    fs = fsspec.filesystem(scheme, use_listings_cache=False, config_kwargs=config)
    fs.retries = _S3FS_RETRIES
    return fs


def info(fs: Any, path: str) -> dict[str, Any]:
    """Details of an object or a folder."""
    try:
        found: dict[str, Any] = fs.info(path)
        return found
    except OSError as error:
        if "/" in path and error_code(error) in ("301", "400", "403"):
            fs.cat_file(path, start=0, end=1)  # a HEAD's answer has no reason; the error of a GET has
        raise


def open_object(fs: Any, path: str, explained: Callable[[], AbstractContextManager[None]]) -> Any:
    """Open an object for reading. Every request runs inside `explained()`, which translates its errors."""
    file = fs.open(path, "rb", block_size=_AHEAD_BYTES, cache_type="readahead")
    fetch_once = file.cache.fetcher

    def fetch(start: int, end: int) -> bytes:
        try:
            return bytes(fetch_once(start, end))
        except IndexError as error:  # s3fs looks for an errno in a timeout, which has none
            raise TimeoutError("the answer's body stopped") from error

    def fetch_whole(start: int, end: int) -> bytes:
        with explained():
            return _whole(fs, partial(fetch, start, end))

    file.cache.fetcher = fetch_whole
    return file


def read_object(fs: Any, path: str, end: int | None = None) -> bytes:
    """The bytes of an object, or those before `end`."""
    # As a range: without one, s3fs reads a large object in parts, which may be of two versions.
    try:
        return _whole(fs, partial(fs.cat_file, path, start=0, end=end))
    except OSError as error:
        if error_code(error) == "InvalidRange":  # an empty object has no first byte
            return b""
        raise


def create_object(fs: Any, path: str, data: bytes) -> bool:
    """Put an object if none exists; False: another one with different bytes does.

    A store that refuses the condition itself is asked whether the object exists, and then gets it without.
    """
    try:
        fs.pipe_file(path, data, mode="create")
        return True
    except OSError as error:
        has_condition = http_status(error) not in _BAD_HEADER
        if has_condition and not _is_taken(error):
            raise
    try:
        return read_object(fs, path) == data
    except FileNotFoundError:
        if has_condition:  # it existed and is gone again, or is another's put that has not ended: it is not ours
            return False
    fs.pipe_file(path, data)
    return True


def respects_condition(fs: Any, path: str, data: bytes) -> bool:
    """Whether the store refuses to replace an object that holds `data` under `If-None-Match`."""
    try:
        fs.pipe_file(path, data, mode="create")
    except OSError as error:
        if _is_taken(error):
            return True
        if http_status(error) not in _BAD_HEADER:
            raise
    return False


def _is_taken(error: OSError) -> bool:
    """Whether an object is there, or put at the same time."""
    # s3fs recognizes a refusal by a detail of the answer that MinIO leaves out.
    return isinstance(error, FileExistsError) or error_code(error) in _TAKEN


def upload(fs: Any, path: str, file: Path) -> None:
    """Put a local file, in one request or in parts that appear as one object."""
    for start in range(1, _MAX_STARTS + 1):
        try:
            fs.put_file(str(file), path, chunksize=_PART_BYTES)
            return
        except FileNotFoundError as error:
            # The answer to the completion was lost, and when asked again the store no longer knows the upload.
            if error_code(error) != "NoSuchUpload" or start == _MAX_STARTS:
                raise


def copy_object(fs: Any, path: str, target: str) -> None:
    """Have the store copy an object."""
    bucket, _, key = target.partition("/")
    source_bucket, _, source_key = path.partition("/")
    try:
        # Not by s3fs' cp_file, which asks for the size first.
        fs.call_s3("copy_object", Bucket=bucket, Key=key, CopySource={"Bucket": source_bucket, "Key": source_key})
    except OSError as error:
        if error_code(error) != _TOO_LARGE:
            raise
        fs.cp_file(path, target)


def find(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """Details of all objects at or below a path, by name; without the folder markers that S3's console creates."""
    return {name: detail for name, detail in fs.find(path, detail=True).items() if not name.endswith("/")}


def download(fs: Any, path: str, folder: Path, explained: Callable[[str], AbstractContextManager[None]]) -> None:
    """Copy all objects below a path into a local folder. A file is read inside `explained(its name below the path)`.

    Raises:
        FileNotFoundError: there is none.
    """
    # s3fs' get reads a path with brackets as a pattern, and does not repeat the parts of large files.
    root = len(path) + 1
    with explained(""):
        files = {name: detail["size"] for name, detail in find(fs, path).items() if name[root:]}
        if not files:
            raise FileNotFoundError(path)
        targets = {name: folder / name[root:] for name in files}
        for name, target in targets.items():
            if not Path(os.path.normpath(target)).is_relative_to(folder):
                raise OSError(f"the name {name} leads out of the folder")
    parts: list[tuple[str, Path, int, int]] = []
    for name, target in targets.items():
        size_bytes = files[name]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
        starts = range(0, size_bytes, _PART_BYTES)
        parts += [(name, target, start, min(start + _PART_BYTES, size_bytes)) for start in starts]

    def copy(name: str, target: Path, start: int, end: int) -> None:
        with explained(name[root:]):
            data = _whole(fs, partial(fs.cat_file, name, start=start, end=end))
            if len(data) != end - start:
                raise OSError(f"{name} was rewritten while it was copied")
        with target.open("r+b") as file:
            file.seek(start)
            file.write(data)

    with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        list(pool.map(lambda part: copy(*part), parts))


def remove_object(fs: Any, path: str) -> None:
    """Remove the object of this name."""
    with suppress(FileNotFoundError):  # a store may say so when the request is repeated
        fs.rm_file(path)


def remove_objects(fs: Any, path: str) -> None:
    """Remove the object at a path, or all objects below it."""
    # One by one: s3fs' rm reads a path with brackets as a pattern, and ignores objects that it could not remove.
    with suppress(FileNotFoundError), ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:  # the bucket may not exist
        list(pool.map(partial(remove_object, fs), fs.find(path)))


def _whole(fs: Any, read: Callable[[], bytes]) -> bytes:
    """The result of `read`, which is called again if the answer's body ends early."""
    attempt = 0
    while True:
        attempt += 1
        alive()
        try:
            return read()
        except _broken_bodies():
            if attempt >= fs.s3.meta.config.retries.get("total_max_attempts", _MAX_ATTEMPTS):
                raise
            time.sleep(random.random() * _BODY_BACKOFF_S * 2**attempt)


@cache
def _broken_bodies() -> tuple[type[Exception], ...]:
    """The errors of an answer's body, which botocore does not retry."""
    import aiohttp  # 0.2 s, with s3fs
    from botocore.exceptions import ResponseStreamingError

    return aiohttp.ClientPayloadError, ResponseStreamingError, IncompleteReadError, FlexibleChecksumError, TimeoutError


@cache
def no_answer() -> tuple[type[Exception], ...]:
    """Errors of the layers below s3fs, beside botocore's, that it does not translate."""
    import aiohttp
    from botocore.parsers import ResponseParserError

    return ResponseParserError, aiohttp.ClientError, ConnectionError, TimeoutError


def is_away(error: BaseException) -> bool:
    """Whether the store does not answer, or is overloaded or broken for now."""
    if http_status(error) in _AWAY or error_code(error) == "SlowDown":
        return True
    return isinstance(error, (HTTPClientError, NoConnectionError, IncompleteReadError, *no_answer()))


def http_status(error: BaseException) -> int:
    """The status of an answer of S3 that s3fs has translated; 0: it is none."""
    cause = error.__cause__
    return int(cause.response["ResponseMetadata"]["HTTPStatusCode"]) if isinstance(cause, ClientError) else 0


def error_code(error: BaseException) -> str:
    """S3's code of an error that s3fs has translated."""
    cause = error.__cause__
    return str(cause.response["Error"].get("Code", "")) if isinstance(cause, ClientError) else ""
