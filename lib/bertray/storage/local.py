"""Local folders: list them without missing a file, and replace them so that no reader sees half of one.

fsspec lists a folder that it cannot read as empty, so shards that nobody may read would seem to be gone.
"""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

# A file is written under a hidden name with this ending before it is renamed.
UNFINISHED = ".tmp"


def find(path: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the files at or below a path, each with its `stat`. Follows links. A missing path has no files.

    Args:
        above: device and inode of the folders that lead here; a link back to one of them is skipped.

    Raises:
        OSError: a folder cannot be read.
    """
    names: list[str] = []
    try:
        facts = os.stat(path)  # noqa: PTH116
        inode = facts.st_dev, facts.st_ino
        if stat.S_ISDIR(facts.st_mode) and inode not in above:
            with os.scandir(path) as entries:
                names = [entry.path for entry in entries]
    except (FileNotFoundError, NotADirectoryError):  # also one that was removed meanwhile, and a broken link
        return
    if stat.S_ISREG(facts.st_mode):
        yield path, facts
    for name in names:
        yield from find(name, (*above, inode))


def remove(path: Path) -> None:
    """Remove a file, a folder or a link if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)


def staging_path(target: Path) -> Path:
    """A hidden, unused name in the target's folder, so that the final rename stays within one file system.

    Creates the folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}{UNFINISHED}"


def sync(path: Path) -> None:
    """Make the file's content durable, before a rename makes it visible."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def replace_folder(source: Path, target: Path) -> None:
    """Copy a folder to a place where another may be; readers see the old one until the copy is complete."""
    staging, replaced = staging_path(target), staging_path(target)
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


def _copy_synced(source: str, target: str) -> None:
    shutil.copyfile(source, target)
    sync(Path(target))
