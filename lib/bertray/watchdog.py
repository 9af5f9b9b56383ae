"""End a process that makes no progress; apart from `progress`, because the bare engine does without what that needs."""

from __future__ import annotations

import faulthandler
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

# To arm faulthandler starts a thread.
_ARM_INTERVAL_S = 1.0
_timeout_s = _armed_s = 0.0


@contextmanager
def watched(timeout_s: float) -> Iterator[None]:
    """End this process, with its threads' stacks on stderr, if the block goes on so long without `alive`."""
    global _timeout_s, _armed_s
    _timeout_s, _armed_s = timeout_s, -math.inf
    alive()
    try:
        yield
    finally:
        _timeout_s = 0.0
        faulthandler.cancel_dump_traceback_later()


def alive() -> None:
    """Say that work goes on, in a block that is `watched`; elsewhere it does nothing."""
    global _armed_s
    if _timeout_s and time.monotonic() - _armed_s > _ARM_INTERVAL_S:
        _armed_s = time.monotonic()
        # Not to sys.stderr, which may be no file, as in a notebook.
        faulthandler.dump_traceback_later(_timeout_s, exit=True, file=2)
