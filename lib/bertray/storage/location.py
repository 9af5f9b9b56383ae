"""A path or URI becomes a file system and a path in it. All access to storage goes through this module.

    "s3://bucket/archive"  ->  Location(fs=S3FileSystem, path="bucket/archive", uri="s3://bucket/archive")
    "data/archive"         ->  Location(fs=LocalFileSystem, path="/home/me/data/archive", uri="/home/me/data/archive")

S3 endpoint, region and keys come from the standard AWS variables and files, never from an argument: no URI or
configuration that is written out holds a secret.

Writes are atomic: a local file is written beside its place, synced and renamed; an S3 object is one put or multipart
upload. A lasting failure is an `UnavailableError`, whatever the transport calls it.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from bertray.errors import RequestError, UnavailableError
from bertray.storage import local, s3
from bertray.storage.explanations import explained

MAX_CONNECTIONS = s3.MAX_CONNECTIONS

_MISSING = (FileNotFoundError, NotADirectoryError)
_HIDDEN = re.compile(r"(^|/)(\.|_(?![^/]*=[^/]*/))")


@dataclass(frozen=True, slots=True)  # slots: a listing may hold a million
class FileInfo:
    """One file of a listing. `version` changes with the content: an etag, or a modification time in ns."""

    path: str  # relative to the location that was listed
    size_bytes: int
    version: str


@dataclass(frozen=True)
class Location:
    """A file or folder, local or on S3. Cheap to copy and to pickle."""

    fs: Any
    path: str
    uri: str

    @classmethod
    def of(cls, uri: str) -> Location:
        """Resolve a local path or an s3:// URI; RequestError for another scheme, or if it names no place."""
        scheme, has_scheme, rest = str(uri).partition("://")
        scheme = scheme.lower()
        if re.match("s3a?:/", str(uri)) and not has_scheme:
            raise RequestError(f"cannot open {uri!r}: a place on S3 begins with s3://, with two slashes")
        if not has_scheme:
            path = os.path.abspath(os.path.expanduser(uri))  # noqa: PTH100, PTH111 - keeps symbolic links
            return cls(LocalFileSystem(), path, path)
        if scheme == "file":
            return cls.of(rest)
        if scheme not in ("s3", "s3a"):
            raise RequestError(f"cannot open {uri!r}: use a local path or an s3:// URI")
        path = rest.strip("/")
        if not path:
            raise RequestError(f"{uri!r} names no place: give a bucket and a path, as in {scheme}://bucket/folder")
        return cls(s3.connect(scheme), path, f"{scheme}://{path}")

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
        """The folder that holds this file or folder; RequestError for a bucket."""
        if "/" not in self.path:
            raise RequestError(f"{self} is a whole bucket: name a folder in it, as in {self}/folder")
        return Location(self.fs, self.path.rsplit("/", 1)[0], self.uri.rsplit("/", 1)[0])

    def ancestors(self) -> list[Location]:
        """All folders above, the innermost first; a bucket has none."""
        place, found = self, list[Location]()
        while "/" in place.path.strip("/"):
            place = place.parent()
            found.append(place)
        return found

    def contains(self, other: Location) -> bool:
        """Whether `other` is this place or lies below it, also by way of links."""
        if type(self.fs) is not type(other.fs):
            return False
        pairs = [(other.path, self.path)]
        pairs += [(os.path.realpath(other.path), os.path.realpath(self.path))] if self.is_local else []
        return any(f"{place}/".startswith(f"{folder}/") for place, folder in pairs)

    def exists(self) -> bool:
        return self._type() is not None

    def is_file(self) -> bool:
        # A folder that a policy allows access to may itself be "forbidden": S3 says so of the folder's own name.
        return self._type((*_MISSING, PermissionError)) == "file"

    def is_folder(self) -> bool:
        return self._type((*_MISSING, PermissionError)) == "directory"

    def _type(self, missing: tuple[type[OSError], ...] = _MISSING) -> str | None:
        """`file` or `directory`; None: nothing is there, which these errors say."""
        with _explained(self):
            try:
                return str((self.fs.info if self.is_local else partial(s3.info, self.fs))(self.path)["type"])
            except missing:
                return None

    def files(self, suffixes: tuple[str, ...] = ("",)) -> list[FileInfo]:
        """List the files at or below this place, sorted by path; none if it does not exist.

        Leaves out what `is_hidden`. RequestError for an unreadable folder, or a name that is not UTF-8.
        """
        seen = (file for file in self.all_files() if not is_hidden(file.path))
        return self.in_order(file for file in seen if file.path.lower().endswith(suffixes))

    def in_order(self, files: Iterable[FileInfo]) -> list[FileInfo]:
        """Files of this place, sorted by path; RequestError for a name that is not UTF-8."""
        found = sorted(files, key=lambda file: file.path)
        for file in found:
            # Python keeps bytes that are not UTF-8 as lone surrogates, which cannot be encoded.
            if file.path.encode(errors="replace").decode() != file.path:
                raise RequestError(f"the name of {file.path!a} in {self} is not UTF-8: rename it")
        return found

    def all_files(self) -> list[FileInfo]:
        """The files at or below this place, hidden ones included, in any order."""
        root = len(self.path) + 1
        with _explained(self):
            if self.is_local:  # not by fsspec, which lists a folder that it cannot read as empty
                found = [(path, one.st_size, str(one.st_mtime_ns)) for path, one in local.find(self.path)]
            else:
                found = [(path, one["size"], _etag(one)) for path, one in s3.find(self.fs, self.path).items()]
        return [FileInfo(path[root:] or self.name, size_bytes, version) for path, size_bytes, version in found]

    def glob(self) -> list[Location]:
        """The places that match this one's path as a pattern, sorted."""
        root = self.uri.removesuffix(self.path)
        with _explained(self):
            paths = {path.rstrip("/") for path in self.fs.glob(self.path)}
        return [Location(self.fs, path, root + path) for path in sorted(paths)]

    def is_empty(self) -> bool:
        """Whether there is no file at or below this place, not even a hidden one."""
        return not self.all_files()

    def folders(self) -> list[str]:
        """The names of the folders directly in this one, sorted; a place that does not exist has none."""
        with _explained(self):
            try:
                found = self.fs.ls(self.path, detail=True)
            except FileNotFoundError:
                return []
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in found if entry["type"] == "directory")

    def info(self) -> FileInfo:
        with _explained(self):
            if self.is_local:
                facts = Path(self.path).stat()
                return FileInfo(self.name, facts.st_size, str(facts.st_mtime_ns))
            detail = s3.info(self.fs, self.path)
            return FileInfo(self.name, detail["size"], _etag(detail))

    def open(self) -> Any:
        """Open for reading: a binary, seekable file object.

        On S3 all reads see one version (if the store respects If-Match). A failed read raises an error that is both
        an `UnavailableError` and an `OSError`.
        """
        with _explained(self):
            if self.is_local:
                return self.fs.open(self.path, "rb")
            return s3.open_object(self.fs, self.path, partial(_explained, self, _FileError))

    def first_bytes(self, num_bytes: int) -> bytes:
        """The first bytes of a file; none if it is gone."""
        with _explained(self):
            try:
                return s3.read_object(self.fs, self.path, num_bytes)
            except FileNotFoundError:
                return b""

    def read_bytes(self) -> bytes:
        with _explained(self):
            return Path(self.path).read_bytes() if self.is_local else s3.read_object(self.fs, self.path)

    def put(self, data: bytes) -> None:
        """Write the whole file atomically; replaces what was there."""
        with _explained(self), self.staged() as path:
            path.write_bytes(data)

    def create(self, data: bytes) -> bool:
        """Write the whole file atomically if nothing is there; False: something is, and stays.

        On S3 this is a conditional put (If-None-Match); see `is_exclusive` for stores that know none. If the answer
        to a put is lost, its repetition finds the file: one that holds `data` counts as created by this call. So
        callers write bytes that no other process writes, such as a run's id.
        """
        with _explained(self):
            if not self.is_local:
                return s3.create_object(self.fs, self.path, data)
            return local.create(Path(self.path), data)

    def is_exclusive(self, data: bytes) -> bool:
        """Whether of two processes that create a file here at once only one succeeds. The file is there with `data`.

        Some S3 stores refuse or ignore the condition of a put: then each of them may.
        """
        with _explained(self):
            return self.is_local or s3.respects_condition(self.fs, self.path, data)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A local path to write to; if the block ends without an error, its content appears here atomically."""
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="bertray-") as folder:
                staging = Path(folder) / "file"  # the last part of a key may be too long for a file's name
                yield staging
                with _explained(self):
                    s3.upload(self.fs, self.path, staging)
            return
        with _explained(self):
            staging = local.staging_path(Path(self.path))
        try:
            yield staging
            with _explained(self):
                local.replace(staging, Path(self.path))
        finally:
            staging.unlink(missing_ok=True)

    def put_folder(self, folder: Path, *, last: str) -> None:
        """Copy a local folder here; replaces what was there.

        A local folder appears by one rename. On S3 the file named `last` is removed first and written last: if it is
        there, so is all the rest.
        """
        with _explained(self):
            if self.is_local:
                local.replace_folder(folder, Path(self.path))
                return
            (self / last).remove()
            self.remove()
            names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
            for name in [*sorted(names - {last}), last]:
                s3.upload(self.fs, f"{self.path}/{name}", folder / name)

    @contextmanager
    def local_copy(self, within: Path | None = None) -> Iterator[Path]:
        """This folder if it is local, else a temporary download of it, `within` a folder."""
        if self.is_local:
            yield Path(self.path)
            return
        with tempfile.TemporaryDirectory(prefix="bertray-", dir=within) as folder:
            with _explained(Location.of(folder), _FileError):  # such as a full disk
                s3.download(self.fs, self.path, Path(folder), lambda name: _explained(self / name if name else self))
            yield Path(folder)

    def remove_unfinished(self) -> None:
        """Remove what killed processes left half-written of this place and below it. Nobody else may be writing here.

        On S3 it is invisible; the bucket's rule for incomplete multipart uploads removes it.
        """
        if self.is_local:
            target = Path(self.path)
            # All of the name: `.bundle.v2.0123456789ab.tmp` belongs to bundle.v2, not to bundle.
            own = f".{glob.escape(local.short(target.name))}.{'[0-9a-f]' * 12}{local.UNFINISHED}"
            for path in [*target.parent.glob(own), *target.rglob(f".*{local.UNFINISHED}")]:
                local.remove(path)

    def move(self, target: Location) -> bool:
        """Move a file within its storage, atomically; replaces what was there. False: this file is not there.

        On S3 the server copies it, and this file stays. On a disk the name is durable after `sync_names` of its folder.
        """
        with _explained(self):
            try:
                if self.is_local:
                    local.make_folder(Path(target.path).parent)
                    try:
                        Path(self.path).replace(target.path)
                    except OSError as error:
                        if error.errno != errno.EXDEV:
                            raise
                        with target.staged() as path:  # a link has led to another file system
                            shutil.copyfile(self.path, path)
                        self.remove(is_file=True)
                else:
                    s3.copy_object(self.fs, self.path, target.path)
            except FileNotFoundError:
                return False
        return True

    def sync_names(self) -> None:
        """Make the names in this folder durable; on S3 they are."""
        if self.is_local:
            with _explained(self):
                local.sync_folder(Path(self.path))

    def remove_empty_folders(self) -> None:
        """Remove this folder and those below it that hold no file. S3 has no folders."""
        if self.is_local:
            for folder, _, _ in os.walk(self.path, topdown=False):
                if not os.listdir(folder) and not Path(folder).is_symlink():  # noqa: PTH208 - after those below it
                    Path(folder).rmdir()

    def remove(self, *, is_file: bool = False) -> None:
        """Remove the file or folder if it exists. `is_file`: it is no folder, which saves S3 a listing."""
        with _explained(self):
            if self.is_local:
                local.remove(Path(self.path))
            elif is_file:
                s3.remove_object(self.fs, self.path)
            else:
                s3.remove_objects(self.fs, self.path)


def is_hidden(path: str) -> bool:
    """Whether a name in the path begins with `.` or `_`; a folder `_day=5` does not count, as Spark reads it, too."""
    return bool(_HIDDEN.search(path))


class _FileError(UnavailableError, OSError):
    """A failed read of an open file, or of a disk here; code that is given a file expects an OSError."""


def _etag(detail: dict[str, Any]) -> str:
    return str(detail.get("ETag", "")).strip('"')


@contextmanager
def _explained(location: Location, kind: type[UnavailableError] = UnavailableError) -> Iterator[None]:
    """Translate errors of the storage into one that names the place and what to check."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        found = explained(location.uri, location.path, location.is_local, error, kind)
        if found is None:
            raise
        raise found from error
