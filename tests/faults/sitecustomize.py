"""Found by every Python process of a test that puts this folder on PYTHONPATH: a text with DEADLY in it ends it."""

import os
import signal
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

DEADLY = b"this text ends the process"


class _Patching(MetaPathFinder):
    """Lets bertray.bundle be found as always, and changes it when it has been loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "bertray.bundle":
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_patch(module: ModuleType) -> None:
            load(module)
            _make_deadly(module)

        spec.loader.exec_module = load_and_patch  # type: ignore[method-assign]
        return spec


def _make_deadly(module: ModuleType) -> None:
    predict_column = module.Bundle.predict_column

    def deadly(self: Any, texts: Any) -> Any:
        if any(DEADLY in (text or b"") for text in texts.to_pylist() if isinstance(text, bytes)):
            os.kill(os.getpid(), signal.SIGSEGV)
        return predict_column(self, texts)

    module.Bundle.predict_column = deadly


sys.meta_path.insert(0, _Patching())
