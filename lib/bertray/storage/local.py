"""Local folders: listed so that nothing is missed, and replaced so that nobody sees half of one.

fsspec takes a folder that it cannot read for empty: shards that nobody may read would be gone.
"""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

# The end of a hidden name under which a local file is written before it is renamed.
UNFINISHED = ".tmp"


def find(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """The files at or below a path. Links are followed; a path that is not there has no files.

    Raises:
        OSError: a folder cannot be read.
    """
    try:
        facts = os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISDIR(facts.st_mode):
        yield from _below(path, ())
    else:
        yield path, facts


def _below(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, os.stat_result]]:
    """`find` in a folder; above: device and inode of those that lead to it."""
    found, folders = [], []
    try:
        facts = os.stat(folder)  # noqa: PTH116
        inode = facts.st_dev, facts.st_ino
        if inode in above:  # a link to a folder that it lies in
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.path)
                elif entry.is_file():  # no link to nowhere
                    found.append(entry)
    except FileNotFoundError:  # removed since
        return
    for entry in found:
        try:
            facts = entry.stat()
        except FileNotFoundError:
            continue
        yield entry.path, facts
    for below in folders:
        yield from _below(below, (*above, inode))


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _copy_synced(source: str, target: str) -> None:
    shutil.copyfile(source, target)
    with Path(target).open("rb") as file:
        os.fsync(file.fileno())


def beside(target: Path) -> Path:
    """A hidden name in the same folder, so that a rename to the target stays within one file system."""
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}{UNFINISHED}"


def replace_folder(source: Path, target: Path) -> None:
    """Copy a folder to where another may be, which readers see until the copy is whole; synced, by renames."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging, replaced = beside(target), beside(target)
    try:
        shutil.copytree(source, staging, copy_function=_copy_synced)
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
