"""Files on this machine's disks: listing, removing, writes that appear at once."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

# A file is written under a hidden name with this ending before it is renamed.
UNFINISHED = ".tmp"


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
        except (FileNotFoundError, NotADirectoryError):  # a broken link, or it was removed meanwhile
            continue


def remove(path: Path) -> None:
    """Remove a file, a folder or a link if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)


def staging_path(target: Path) -> Path:
    """A hidden, unused name in the target's folder, which is created: a rename stays within one file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}{UNFINISHED}"


def sync(path: Path) -> None:
    """Make the file's content durable, before a rename makes it visible."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def create(path: Path, data: bytes) -> bool:
    """Write a whole file if nothing is there; False: something is."""
    staging = staging_path(path)
    try:
        staging.write_bytes(data)
        os.link(staging, path)  # unlike a rename, a link never replaces a file
    except FileExistsError:
        return False
    finally:
        staging.unlink(missing_ok=True)
    return True


def replace_folder(source: Path, target: Path) -> None:
    """Copy a folder to a place where another may be; readers see the old one until the copy is complete."""
    staging, replaced = staging_path(target), staging_path(target)
    try:
        shutil.copytree(source, staging, copy_function=lambda file, copy: sync(Path(shutil.copyfile(file, copy))))
        if target.exists():
            target.replace(replaced)
        staging.replace(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.replace(target)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
