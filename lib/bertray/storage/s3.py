"""S3 as it is: requests that fail for now, bodies that end early, answers that are lost.

A request that is refused for now (500, 503 SlowDown), or whose connection breaks, is made again by botocore, up to
`_MAX_ATTEMPTS` times unless AWS_RETRY_MODE or AWS_MAX_ATTEMPTS say otherwise. An answer whose body ends early is asked
for again here. `bertray.storage.location` is what other modules use.
"""

from __future__ import annotations

import io
import math
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
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError, IncompleteReadError

# Of a request, with waits of 31 s in all on average, 63 s at most: an outage of seconds is sat out.
_MAX_ATTEMPTS = 7
# Not botocore's newer mode "standard": it allows a process some 100 retries and then none until requests succeed again,
# so that in an outage of a minute every shard of an archive would fail, one after the other, without a wait.
_RETRY_MODE = "legacy"
# s3fs repeats a request that timed out after botocore's attempts, and a read twice over. With its own 5 a read from a
# server that hangs would take 5 x 5 x 7 timeouts of 15 s.
_S3FS_RETRIES = 2
_BODY_BACKOFF_S = 0.1
# Of an upload or download in parts: what is sent again after a fault, and with 10 (s3fs) or 8 at a time, the memory.
_PART_BYTES = 16 << 20
_MAX_PARTS = 10_000
# Read beyond what is asked for. By default it is 50 MiB, which are fetched with every MiB of columns that lie further
# apart; with this a small shard still comes with its footer.
_AHEAD_BYTES = 1 << 20
_NUM_CONNECTIONS = 8
# Of a whole upload or conditional put that has to be started anew.
_MAX_STARTS = 3


def connect(scheme: str) -> Any:
    """The file system of s3:// URIs. Listings are never cached: another process may write between two looks."""
    fs = fsspec.filesystem(scheme, use_listings_cache=False, config_kwargs={"retries": _retries()})
    fs.retries = _S3FS_RETRIES
    return fs


def read_object(fs: Any, path: str) -> bytes:
    """The bytes of an S3 object."""
    # Asked for as a range: s3fs reads a whole large object in parts, which may be of two versions.
    try:
        return _whole(fs, partial(fs.cat_file, path, start=0))
    except OSError as error:
        if error_code(error) == "InvalidRange":  # an empty one has no first byte
            return b""
        raise


def create_object(fs: Any, path: str, data: bytes) -> bool:
    """Put an object where none is; False: there is one of other bytes."""
    for start in range(1, _MAX_STARTS + 1):
        try:
            fs.pipe_file(path, data, mode="create")
        except OSError as error:
            code = error_code(error)
            # s3fs knows the first by a detail of the answer that MinIO leaves out.
            if isinstance(error, FileExistsError) or code == "PreconditionFailed":
                break
            if code != "ConditionalRequestConflict" or start == _MAX_STARTS:
                raise
            time.sleep(_BODY_BACKOFF_S)  # two puts at once: S3 refuses one, which finds the other's file next time
        else:
            return True
    try:
        return read_object(fs, path) == data
    except FileNotFoundError:  # removed again, so it was another's
        return False


def upload(fs: Any, path: str, file: Path) -> None:
    """Put a local file, in one request or in parts that appear as one."""
    part_bytes = max(_PART_BYTES, math.ceil(file.stat().st_size / _MAX_PARTS))
    for start in range(1, _MAX_STARTS + 1):
        try:
            fs.put_file(str(file), path, chunksize=part_bytes)
        except FileNotFoundError as error:
            # The answer to the completion was lost: when asked again, the store knows the upload no more.
            if error_code(error) != "NoSuchUpload" or start == _MAX_STARTS:
                raise
        else:
            return


def find(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """Details of all objects at or below a path, by name; without the markers that S3's console makes for folders."""
    return {name: detail for name, detail in fs.find(path, detail=True).items() if not name.endswith("/")}


def download(fs: Any, path: str, folder: Path) -> None:
    """Copy all objects below a path into a local folder."""
    # Not by s3fs' get, which takes a path with brackets for a pattern and does not retry the parts of large files.
    root = len(path) + 1
    files = {name: detail["size"] for name, detail in find(fs, path).items() if name[root:]}
    if not files:
        raise FileNotFoundError(path)
    parts: list[tuple[str, Path, int, int]] = []
    for name, size_bytes in files.items():
        target = folder / name[root:]
        if not Path(os.path.normpath(target)).is_relative_to(folder):
            raise OSError(f"the name {name} leads out of the folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
        starts = range(0, size_bytes, _PART_BYTES)
        parts += [(name, target, start, min(start + _PART_BYTES, size_bytes)) for start in starts]
    with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        list(pool.map(partial(_download_part, fs), parts))


def _download_part(fs: Any, part: tuple[str, Path, int, int]) -> None:
    path, target, start, end = part
    data = _whole(fs, partial(fs.cat_file, path, start=start, end=end))
    if len(data) != end - start:
        raise OSError(f"{path} was rewritten while it was copied")
    with target.open("r+b") as file:
        file.seek(start)
        file.write(data)


def remove_objects(fs: Any, path: str) -> None:
    """Remove the object at a path, or all below it."""
    # One by one: s3fs' rm takes a path with brackets for a pattern, and passes over what could not be removed.
    with suppress(FileNotFoundError):  # the bucket
        paths = fs.find(path)
        with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
            list(pool.map(partial(_remove_object, fs), paths))


def _remove_object(fs: Any, path: str) -> None:
    with suppress(FileNotFoundError):  # a store may say so when asked again
        fs.rm_file(path)


class Reader(io.RawIOBase):
    """An object to read from.

    Args:
        explained: what errors are raised within.
    """

    def __init__(self, fs: Any, path: str, explained: Callable[[], AbstractContextManager[None]]) -> None:
        self._fs, self._explained = fs, explained
        self._file = fs.open(path, "rb", block_size=_AHEAD_BYTES, cache_type="readahead")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def read(self, size: int | None = -1) -> bytes:
        with self._explained():
            # A read that fails leaves the position where it was.
            return _whole(self._fs, partial(self._read, -1 if size is None else size))

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            return bytes(self._file.read(size))
        except IndexError as error:  # s3fs looks for an errno in a timeout, which has none
            raise TimeoutError("the answer's body did not go on") from error

    def close(self) -> None:
        self._file.close()
        super().close()


def _retries() -> dict[str, Any]:
    """botocore's retries, as far as the user has not set them."""
    retries: dict[str, Any] = {}
    if "AWS_RETRY_MODE" not in os.environ:
        retries["mode"] = _RETRY_MODE
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = _MAX_ATTEMPTS
    return retries


def _whole(fs: Any, read: Callable[[], bytes]) -> bytes:
    """What `read` returns; it is called again when the body of an answer ends early."""
    attempt = 0
    while True:
        attempt += 1
        try:
            return read()
        except _broken_bodies():
            if attempt >= fs.s3.meta.config.retries.get("total_max_attempts", _MAX_ATTEMPTS):
                raise
            time.sleep(random.random() * _BODY_BACKOFF_S * 2**attempt)


@cache
def _broken_bodies() -> tuple[type[Exception], ...]:
    """The errors of a body, as opposed to those of a request, which botocore retries."""
    import aiohttp  # with s3fs, 0.2 s
    from botocore.exceptions import ResponseStreamingError

    return aiohttp.ClientPayloadError, ResponseStreamingError, IncompleteReadError, FlexibleChecksumError, TimeoutError


@cache
def transport_errors() -> tuple[type[Exception], ...]:
    """What s3fs lets through of the layers below it."""
    import aiohttp
    from botocore.parsers import ResponseParserError

    return BotoCoreError, ResponseParserError, aiohttp.ClientError, ConnectionError, TimeoutError


def error_code(error: BaseException) -> str:
    """S3's name of an error that s3fs has translated."""
    cause = error.__cause__
    return str(cause.response["Error"].get("Code", "")) if isinstance(cause, ClientError) else ""
