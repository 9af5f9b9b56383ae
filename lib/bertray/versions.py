"""Versions of what a result depends on, written beside every result."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "bertray",
    "torch",
    "transformers",
    "tokenizers",
    "nanotoken",
    "scikit-learn",
    "ray",
    "pyarrow",
    "openvino",
    "nncf",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter; of those that are installed, for not all need Ray."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
