"""Listing local folders. fsspec takes what it cannot read for empty: shards that nobody may read would be gone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator


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
