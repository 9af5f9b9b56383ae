"""Versions of the packages that a result depends on, written beside every result."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = "bertray torch transformers tokenizers nanotoken scikit-learn ray pyarrow openvino nncf"


def versions() -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES.split():
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
