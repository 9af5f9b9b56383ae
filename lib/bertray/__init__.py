"""bertray: fine-tune a BERT classifier and apply it to very large document archives.

from bertray import Bundle
Bundle.load("bundles/sections").predict(["B.Sc. in Physics, 2014", "Python, SQL, Spark"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bertray.errors import BertrayError, BundleError, RequestError, ShardError

if TYPE_CHECKING:
    from bertray.bundle.bundle import Bundle, Prediction

__version__ = "0.1.0"
__all__ = ["BertrayError", "Bundle", "BundleError", "Prediction", "RequestError", "ShardError"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `import bertray` and the jobs' --help must not.
    if name in {"Bundle", "Prediction"}:
        return getattr(import_module("bertray.bundle.bundle"), name)
    raise AttributeError(f"module 'bertray' has no attribute {name!r}")
