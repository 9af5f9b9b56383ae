"""Found by every Python process of a test that puts this folder on PYTHONPATH: some packages cannot be imported.

BERTRAY_BLOCKED names a file with the top-level modules, one a line.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

_BLOCKED = frozenset(Path(os.environ["BERTRAY_BLOCKED"]).read_text().split())


class _Blocking(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in _BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _Blocking())
