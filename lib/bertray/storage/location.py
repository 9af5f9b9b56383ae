"""A path or URI becomes a file system and a root; everything that touches storage goes through here.

    "s3://bucket/archive"  ->  Location(fs=S3FileSystem, path="bucket/archive", uri="s3://bucket/archive")
    "data/archive"         ->  Location(fs=LocalFileSystem, path="/home/me/data/archive", uri="/home/me/data/archive")

S3 endpoint, region and keys come from the standard AWS variables and files, never from an argument, so that no URI or
configuration that is written out holds a secret.

A file appears whole or not at all: local files are written beside their place, synced and renamed; S3 objects are
one put (or one completed multipart upload), which S3 itself makes atomic.

What S3 refuses for now is asked for again (`storage.s3`). What fails for good is an `UnavailableError`, whatever the
transport calls it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError, FlexibleChecksumError
from fsspec.implementations.local import LocalFileSystem

from bertray.errors import RequestError, UnavailableError
from bertray.storage import local, s3

_SCHEMES = ("s3", "s3a")
_CREDENTIALS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or the role"


@dataclass(frozen=True, slots=True)  # slots: a listing may hold a million
class FileInfo:
    """One file of a listing. `version` changes when its content does: an etag, or a modification time in ns."""

    path: str  # relative to the location that was listed
    size_bytes: int
    version: str


@dataclass(frozen=True)
class Location:
    """A place in storage: a file or a folder, local or remote. Cheap to copy and to pickle."""

    fs: Any
    path: str
    uri: str

    @classmethod
    def of(cls, uri: str) -> Location:
        """Resolve a local path or an fsspec URI.

        Raises:
            RequestError: the URI's scheme is none of those, or it names no place.
        """
        scheme, has_scheme, rest = str(uri).partition("://")
        scheme = scheme.lower()
        if not has_scheme:
            path = os.path.abspath(os.path.expanduser(uri))  # noqa: PTH100, PTH111 - keeps symbolic links
            return cls(LocalFileSystem(), path, path)
        if scheme == "file":
            return cls.of(rest)
        if scheme not in _SCHEMES:
            raise RequestError(f"cannot open {uri!r}: use a local path or an s3:// URI")
        if not rest.strip("/"):
            raise RequestError(f"{uri!r} names no place: give a bucket and a path, as in {scheme}://bucket/folder")
        fs = s3.connect(scheme)
        return cls(fs, rest.strip("/"), f"{scheme}://{rest.strip('/')}")

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    def __truediv__(self, relative: str) -> Location:
        return Location(self.fs, f"{self.path}/{relative}", f"{self.uri}/{relative}")

    def __str__(self) -> str:
        return self.uri

    def parent(self) -> Location:
        """The folder that this lies in.

        Raises:
            RequestError: this is a bucket.
        """
        if "/" not in self.path:
            raise RequestError(f"{self} is a whole bucket: name a folder in it, as in {self}/folder")
        return Location(self.fs, self.path.rsplit("/", 1)[0], self.uri.rsplit("/", 1)[0])

    def ancestors(self) -> list[Location]:
        """The folders that this lies in, the innermost first; a bucket lies in none."""
        place, found = self, list[Location]()
        while "/" in place.path.strip("/"):
            place = place.parent()
            found.append(place)
        return found

    def contains(self, other: Location) -> bool:
        """Whether `other` is this place or lies below it."""
        same_store = type(self.fs) is type(other.fs)
        return same_store and f"{other.path}/".startswith(f"{self.path}/")

    def exists(self) -> bool:
        with _explained(self):
            if self.is_local:
                return bool(self.fs.exists(self.path))
            try:
                self.fs.info(self.path)
            except FileNotFoundError:
                return False
            return True

    def is_file(self) -> bool:
        with _explained(self):
            if self.is_local:
                return bool(self.fs.isfile(self.path))
            # s3fs' isfile says no to whatever goes wrong. "Forbidden" may mean no: where a policy allows only what lies
            # in a folder, S3 says so of the folder's own name.
            try:
                return bool(self.fs.info(self.path)["type"] == "file")
            except (FileNotFoundError, PermissionError):
                return False

    def files(self, suffixes: tuple[str, ...] = ()) -> list[FileInfo]:
        """The files at or below this place, by one listing, sorted by path; hidden and `_`-prefixed names left out.

        A place that does not exist lists as empty.

        Raises:
            RequestError: a folder cannot be read, or the name of a file is not UTF-8.
        """
        infos = []
        with _explained(self):
            for file in self._find():
                if any(part.startswith((".", "_")) for part in file.path.split("/")):
                    continue
                if not suffixes or file.path.lower().endswith(suffixes):
                    if not _is_utf8(file.path):
                        raise RequestError(f"the name of {file.path!a} in {self} is not UTF-8: rename it")
                    infos.append(file)
        return sorted(infos, key=lambda info: info.path)

    def _find(self) -> Iterator[FileInfo]:
        """`files`, hidden ones included, in any order."""
        root = len(self.path) + 1
        if self.is_local:
            for path, facts in local.find(self.path):
                yield FileInfo(path[root:] or self.name, facts.st_size, str(facts.st_mtime_ns))
        else:
            for path, detail in s3.find(self.fs, self.path).items():
                yield FileInfo(path[root:] or self.name, detail["size"], _version(detail))

    def glob(self) -> list[Location]:
        """The places that this one's path, a pattern, matches, sorted."""
        root = self.uri.removesuffix(self.path)
        with _explained(self):
            paths = {path.rstrip("/") for path in self.fs.glob(self.path)}
        return [Location(self.fs, path, root + path) for path in sorted(paths)]

    def is_empty(self) -> bool:
        """Whether no file lies at or below this place, hidden ones included."""
        with _explained(self):
            return next(self._find(), None) is None

    def folders(self) -> list[str]:
        """Names of the folders that lie in this one, sorted; a place that does not exist has none."""
        with _explained(self):
            try:
                found = self.fs.ls(self.path, detail=True)
            except FileNotFoundError:
                return []
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in found if entry["type"] == "directory")

    def info(self) -> FileInfo:
        with _explained(self):
            detail = self.fs.info(self.path)
            return FileInfo(self.name, detail["size"], _version(detail))

    def open(self) -> Any:
        """A binary, seekable file object to read from.

        On S3 all that is read is of one version (where the store heeds If-Match), and what a read raises is both an
        `UnavailableError` and an `OSError`.
        """
        with _explained(self):
            explained = partial(_explained, self, _ReadError)
            return self.fs.open(self.path, "rb") if self.is_local else s3.Reader(self.fs, self.path, explained)

    def read_bytes(self) -> bytes:
        with _explained(self):
            return bytes(self.fs.cat_file(self.path)) if self.is_local else s3.read_object(self.fs, self.path)

    def put(self, data: bytes) -> None:
        """Write the whole file in one atomic step, over what was there."""
        with _explained(self), self.staged() as path:
            path.write_bytes(data)

    def create(self, data: bytes) -> bool:
        """Write the whole file in one atomic step where nothing is; False: there is something, and it stays.

        On S3 a conditional put (If-None-Match); a store that ignores the condition writes over what is there. When the
        answer to a put that was carried out is lost, its repetition meets the file: what holds `data` is then taken to
        be this call's work. Callers therefore write bytes that no other writes, such as a run's id.
        """
        with _explained(self):
            if not self.is_local:
                return s3.create_object(self.fs, self.path, data)
            target = Path(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            staging = local.beside(target)
            try:
                staging.write_bytes(data)
                os.link(staging, target)  # a rename would replace what is there
            except FileExistsError:
                return False
            finally:
                staging.unlink(missing_ok=True)
            return True

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A local path to write to; when the block ends without an error its content appears here atomically."""
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="bertray-") as folder:
                staging = Path(folder) / self.name
                yield staging
                with _explained(self):
                    s3.upload(self.fs, self.path, staging)
            return
        target = Path(self.path)
        with _explained(self):
            target.parent.mkdir(parents=True, exist_ok=True)
        staging = local.beside(target)
        try:
            yield staging
            with _explained(self):
                with staging.open("rb") as file:
                    os.fsync(file.fileno())
                staging.replace(target)
        finally:
            staging.unlink(missing_ok=True)

    def put_folder(self, folder: Path, *, last: str) -> None:
        """Copy a local folder here, over what was there.

        Locally it appears by one rename. Remotely the file named `last` goes after all others (and an old one goes
        first): its presence says that all is there.
        """
        with _explained(self):
            if self.is_local:
                local.replace_folder(folder, Path(self.path))
                return
            (self / last).remove()
            self.remove()
            names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            for name in [*(name for name in names if name != last), last]:
                s3.upload(self.fs, f"{self.path}/{name}", folder / name)

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """This folder as a local one: itself where it is local, else a temporary download."""
        if self.is_local:
            yield Path(self.path)
            return
        with tempfile.TemporaryDirectory(prefix="bertray-") as folder:
            with _explained(self):
                s3.download(self.fs, self.path, Path(folder))
            yield Path(folder)

    def remove_unfinished(self) -> None:
        """Remove what a process that was killed has left half-written below this folder.

        On S3 nothing of it is visible; parts of a multipart upload go by the bucket's own rule for incomplete ones.
        """
        if self.is_local:
            for path in Path(self.path).rglob(f".*{local.UNFINISHED}"):
                local.remove(path)

    def remove_unfinished_copies(self) -> None:
        """Remove what processes that were killed have half-written of this place; nobody else may be at work on it."""
        if self.is_local:
            target = Path(self.path)
            # Not `.bundle.v2.0123….tmp`, which is bundle.v2's.
            is_own = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{12}" + re.escape(local.UNFINISHED))
            for path in target.parent.glob(f".*{local.UNFINISHED}"):
                if is_own.fullmatch(path.name):
                    local.remove(path)

    def remove(self) -> None:
        """Remove the file or folder if it is there."""
        with _explained(self):
            if not self.is_local:
                s3.remove_objects(self.fs, self.path)
            elif self.fs.exists(self.path):
                self.fs.rm(self.path, recursive=True)


class _ReadError(UnavailableError, OSError):
    """What goes wrong in a file that is open; whoever is handed a file expects an OSError."""


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that Python holds as halves of surrogate pairs
        return False
    return True


def _version(detail: dict[str, Any]) -> str:
    if "ETag" in detail:
        return str(detail["ETag"]).strip('"')
    if "ino" in detail:  # a local file: fsspec gives seconds as a float, which loses nanoseconds
        return str(os.stat(detail["name"]).st_mtime_ns)  # noqa: PTH116
    return str(detail.get("mtime") or detail.get("LastModified"))


@contextmanager
def _explained(location: Location, kind: type[UnavailableError] = UnavailableError) -> Iterator[None]:
    """Turn the storage's own refusals into an error that names the place and what to check."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        message = _explanation(location, error)
        if message is None:
            raise
        raise kind(message) from error


def _explanation(location: Location, error: Exception) -> str | None:
    """What to tell the user; None: it is no matter of storage."""
    # What S3 answered, the operation and the number of attempts are in the error that s3fs has translated.
    answer = error.__cause__ if isinstance(error.__cause__, ClientError) else None
    # A timeout of fsspec says nothing, but has a cause.
    reason = (str(answer or error) or str(error.__cause__ or "") or type(error).__name__).rstrip(".")
    if isinstance(error, FileNotFoundError):
        check = "the path" if location.is_local else "the path, the bucket and AWS_ENDPOINT_URL"
        return f"not found: {location}. Check {check}"
    if isinstance(error, PermissionError):
        check = "its mode and owner" if location.is_local else f"{_CREDENTIALS} and the bucket's policy"
        return f"no permission for {location}: {reason}. Check {check}"
    if isinstance(error, FlexibleChecksumError):
        # As `rclone serve s3` does.
        advice = "needs AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
        return (
            f"cannot read {location}: {reason}. A store that sends a whole file's checksum with a part of it {advice}"
        )
    if not location.is_local and isinstance(error, s3.transport_errors()):
        return f"cannot reach {location}: {reason}. Check {_CREDENTIALS} and AWS_ENDPOINT_URL"
    if not isinstance(error, OSError):
        return None
    # A file where a folder should be, a full disk, an answer of S3 that s3fs has no name for.
    if answer is None:
        return f"storage refused {location}: {reason}"
    overloaded = answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500
    advice = "Try again later" if overloaded else f"Check {_CREDENTIALS}, the region and AWS_ENDPOINT_URL"
    return f"storage refused {location}: {reason}. {advice}"
