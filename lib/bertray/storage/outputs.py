"""Where a job may write: not into a bundle, whose files are known by their sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from bertray.errors import RequestError
from bertray.storage.location import Location

# A folder that holds this file is a bundle; what it says is read in `bertray.bundle.info`.
BUNDLE_FILE = "bundle.json"


def refuse_in_bundle(output: Location, folders: Sequence[Location] | None = None) -> None:
    """See that what a job writes does not enter a bundle, which would be altered by it.

    Args:
        folders: that may be bundles; by default the output and all that it lies in.

    Raises:
        RequestError: one of them is.
    """
    for folder in [output, *output.ancestors()] if folders is None else folders:
        # Not `exists`: a policy of S3 may allow no look at what lies above the output.
        if (folder / BUNDLE_FILE).is_file():
            raise RequestError(
                f"--output {output} lies in the bundle {folder}, which no other file may enter: choose another folder"
            )


def sha256_of(path: Path) -> str:
    """The file's sha256 as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
