"""Found by every Python process of a test that puts this folder on PYTHONPATH: some texts and files end the process.

A text with DEADLY in it ends whoever predicts it, one with BREAKING is an error of the model, over one with HANGING the
model makes no progress; a Parquet file with DEADLY_FILE in its metadata ends whoever reads it. Where BERTRAY_SICK is
deadly, breaking, hanging or gpu, any text does so: the machine is at fault.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

DEADLY, BREAKING, HANGING = b"this text ends the process", b"this text breaks the model", b"this text hangs"
DEADLY_FILE = b"this file ends the process"


class _Patching(MetaPathFinder):
    """Lets some modules be found as always, and changes them when they have been loaded."""

    def __init__(self, patches: dict[str, Callable[[ModuleType], None]]) -> None:
        self._patches = patches

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self._patches:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_patch(module: ModuleType) -> None:
            load(module)
            self._patches[name](module)

        spec.loader.exec_module = load_and_patch  # type: ignore[method-assign]
        return spec


def _make_texts_deadly(module: ModuleType) -> None:
    begin_column = module.Bundle.begin_column

    def deadly(self: Any, texts: Any, order: float = 0.0) -> Any:
        found = [text for text in texts.to_pylist() if isinstance(text, bytes)]
        sick = os.environ.get("BERTRAY_SICK", "")

        def has(kind: bytes, name: str) -> bool:
            return sick == name or any(kind in text for text in found)

        if has(DEADLY, "deadly"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if has(BREAKING, "breaking"):
            raise ValueError("broken")
        if has(HANGING, "hanging"):
            threading.Event().wait()
        if sick == "gpu":
            import torch

            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
        return begin_column(self, texts, order)

    module.Bundle.begin_column = deadly


def _make_files_deadly(module: ModuleType) -> None:
    iter_batches = module.ParquetFile.iter_batches

    def deadly(self: Any, *arguments: Any, **options: Any) -> Any:
        if DEADLY_FILE in (self.schema_arrow.metadata or {}):
            os.kill(os.getpid(), signal.SIGSEGV)
        return iter_batches(self, *arguments, **options)

    module.ParquetFile.iter_batches = deadly


sys.meta_path.insert(
    0, _Patching({"bertray.bundle.bundle": _make_texts_deadly, "pyarrow.parquet.core": _make_files_deadly})
)
