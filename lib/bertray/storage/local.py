"""Files on this machine's disks: listing, removing, writes that appear at once."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from bertray.errors import RequestError

# A file is written under a hidden name with this ending before it is renamed.
UNFINISHED = ".tmp"
MAX_NAME_BYTES = 255  # of file systems; S3 has no limit of its own for the parts of a key
# What some file systems say to an fsync of a folder, and all of a folder that may be written to but not listed.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EPERM, errno.EACCES}


def find(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """The files at or below a path, each with its `stat`. Follows links. A missing path has no files."""
    todo = [(path, frozenset[tuple[int, int]]())]  # with the folders above it: a link back to one of them is skipped
    while todo:
        path, above = todo.pop()
        try:
            facts = os.stat(path)  # noqa: PTH116
            inode = facts.st_dev, facts.st_ino
            if stat.S_ISREG(facts.st_mode):
                yield path, facts
            elif stat.S_ISDIR(facts.st_mode) and inode not in above:
                below = above | {inode}
                with os.scandir(path) as entries:
                    todo += [(entry.path, below) for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            if Path(path).is_symlink():  # what lies there has not gone: its disk may not be mounted
                raise RequestError(
                    f"{path} is a link to a place that is not there: mount it, or remove the link"
                ) from None


def remove(path: Path) -> None:
    """Remove a file, a folder or a link if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)


def shortened(name: str, num_bytes: int) -> str:
    """The name itself, or if it has more bytes its beginning and a hash of all of it."""
    data = name.encode(errors="surrogateescape")
    if len(data) <= num_bytes:
        return name
    return f"{data[: num_bytes - 17].decode(errors='ignore')}~{hashlib.sha256(data).hexdigest()[:16]}"


def short(name: str) -> str:
    """A name that leaves room for what a hidden one has beside it."""
    return shortened(name, MAX_NAME_BYTES - 2 - 12 - len(UNFINISHED))


def staging_path(target: Path) -> Path:
    """A hidden, unused name in the target's folder, which is created: a rename stays within one file system."""
    make_folder(target.parent)
    return target.parent / f".{short(target.name)}.{uuid.uuid4().hex[:12]}{UNFINISHED}"


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def replace(staging: Path, target: Path) -> None:
    """Let a finished file take the target's place, durably."""
    sync(staging)
    staging.replace(target)
    sync_folder(target.parent)


def sync(path: Path) -> None:
    """Make the file's content durable, before a rename makes it visible."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the file system can do that."""
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def create(path: Path, data: bytes) -> bool:
    """Write a whole file if nothing is there; False: something is."""
    staging = staging_path(path)
    try:
        staging.write_bytes(data)
        sync(staging)
        try:
            os.link(staging, path)  # unlike a rename, a link never replaces a file
        except FileExistsError:
            return False
        except OSError:  # exFAT, SMB and some others have no hard links, and no common error to say so
            return _create_in_place(path, data)
    finally:
        staging.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def _create_in_place(path: Path, data: bytes) -> bool:
    """The same without a link; a process that is killed in between leaves an empty file."""
    try:
        file = path.open("xb", buffering=0)
    except FileExistsError:
        return False
    with file:
        try:
            file.write(data)
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)
    return True


def replace_folder(source: Path, target: Path) -> None:
    """Copy a folder to a place where another may be; readers see the old one until the copy is complete."""
    staging, replaced = staging_path(target), staging_path(target)
    try:
        shutil.copytree(source, staging, copy_function=lambda file, copy: sync(Path(shutil.copyfile(file, copy))))
        for folder, _, _ in os.walk(staging):
            sync_folder(Path(folder))
        if target.exists():
            target.replace(replaced)
        staging.replace(target)
        sync_folder(target.parent)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.replace(target)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
