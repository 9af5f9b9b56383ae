"""Found by every Python process of a test that puts this folder on PYTHONPATH: some packages are not installed.

BERTRAY_BLOCKED names a file with their top-level modules, one a line.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

_BLOCKED = frozenset(Path(os.environ["BERTRAY_BLOCKED"]).read_text().split())


class _Finder(PathFinder):
    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if path is None and name in _BLOCKED:  # but where a package that is there brings its own copy, as Ray does
            path = [place for place in sys.path if not place.endswith("site-packages")]
        return super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = _Finder
