"""A bundle in a child process, for texts that may crash the process.

    IsolatedBundle (here)                  python -m bertray.bundle.isolated (child)
      texts of a step      ── pipe ──►       Bundle.predict_column
      predictions          ◄── pipe ──

If the child dies twice over the same texts, new children get them in slices, and a slice that crashes one is cut into
smaller slices, until one text alone has crashed a child. That row gets an `error`, all others their predictions. A
child that makes no progress ends itself. A new child first gets a harmless text: if it dies of that one, no text is at
fault.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from bertray.bundle.info import BundleInfo, read_info, was_replaced
from bertray.errors import BundleError, RequestError, ShardError, UnavailableError
from bertray.schema import ERROR, NUM_TOKENS, OTHER_IDS, REVIEW, TRUNCATED
from bertray.storage.location import Location
from bertray.storage.patience import watched
from bertray.tasks.task import TASKS
from bertray.types import Device, Engine, InferencePrecision

if TYPE_CHECKING:
    from bertray.bundle.bundle import Bundle

_log = logging.getLogger(__name__)

_NUM_SLICES = 16  # of 16 x 16 x 16 texts three more deaths find the one
_MAX_DEATHS = 40  # in one call; more are not caused by single texts
_ENDED = (EOFError, OSError)  # what a pipe raises after the other process has ended
# A bundle of gigabytes may have to be fetched and hashed first.
LOAD_TIMEOUT_S = 1800.0
_HARMLESS = pa.array([b"a"], pa.large_binary())


class Predictor(Protocol):
    """What `Bundle`, `IsolatedBundle` and OpenVINO's bundles have in common."""

    @property
    def precision(self) -> str: ...
    @property
    def schema(self) -> pa.Schema: ...
    def predict_column(self, texts: pa.Array) -> pa.Table:
        """Classify texts; a table in `schema`."""


def begin(predictor: Predictor, texts: pa.Array, order: float) -> Callable[[], pa.Table]:
    """Begin to classify texts; the result gives the table. A bundle works meanwhile, the lowest order first."""
    if hasattr(predictor, "begin_column"):
        begun: Callable[[], pa.Table] = predictor.begin_column(texts, order)
        return begun
    table = predictor.predict_column(texts)
    return lambda: table


def blamed(error: Exception, predictor: Predictor | None) -> ShardError | UnavailableError:
    """An unexpected error as the shard's; or as this machine's, if it does not classify a harmless text either."""
    said = f"{type(error).__name__}: {error}"
    is_memory = any(words in said.lower() for words in ("out of memory", "allocate memory"))  # of torch
    if is_memory or isinstance(error, MemoryError | OSError):
        return UnavailableError(said)
    try:
        if predictor:
            predictor.predict_column(_HARMLESS)
    except Exception as other:
        _log.warning("the model fails on a harmless text, too: %s: %s", type(other).__name__, other)
        return UnavailableError(f"the model does not run here: {said}")
    return ShardError(said)


@dataclass(frozen=True)
class ModelSpec:
    """How a process loads the model."""

    bundle: str
    engine: Engine
    precision: InferencePrecision
    device: Device
    cache: str  # where `openvino.prepare` put the exported model, and where decisions on the precision are kept
    num_threads: int  # 0: all processors that the process may use
    timeout_s: float = 600.0  # a child that makes no progress for so long ends
    probabilities: str | None = None  # the column that predictions have in addition, see `Bundle`

    def load(self) -> Bundle:
        """Load the bundle in this process.

        Raises:
            BundleError: it is missing, incomplete or altered.
            UnavailableError: this device cannot run the precision that was decided for the output.
        """
        import torch  # here and below, because the parent does without

        from bertray.bundle.bundle import Bundle
        from bertray.model.runtime import num_cpus

        num_threads = self.num_threads or num_cpus()
        if self.device != "cuda":
            torch.set_num_threads(num_threads)
        if self.engine == "openvino":
            from bertray.bundle.openvino import load_prepared  # half a second

            bundle = load_prepared(self.bundle, self.precision, Location.of(self.cache), num_threads)
        else:
            assert self.precision != "int8"  # the configuration has checked it
            bundle = Bundle.load(self.bundle, self.precision, self.device, Location.of(self.cache))
        bundle.probabilities = self.probabilities
        return bundle


class IsolatedBundle(AbstractContextManager["IsolatedBundle"]):
    """Predicts as a `Bundle` does, in a child process; a context manager, or close it after use.

    Threads may share it: they take turns.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._num_deaths = 0
        self._is_doubted = False  # a child has died since a harmless text was classified
        self._is_closed = False
        self._turn = threading.Lock()
        self.info: BundleInfo = read_info(Location.of(spec.bundle))
        self.schema = TASKS[self.info.problem_type].schema(self.info, spec.probabilities)
        self.precision = self.device = ""  # known when the child is ready

    def predict_column(self, texts: pa.Array) -> pa.Table:
        """As `Bundle.predict_column`; a text that crashes the process gets an `error`.

        Raises:
            BundleError: the process ends before it has read any text.
            ShardError: it ends too often, or the model raises an error.
            UnavailableError: the process ends over, or the model raises an error on, any text.
        """
        with self._turn:
            return self._predicted(texts)

    def _predicted(self, texts: pa.Array) -> pa.Table:
        self._num_deaths = 0
        # The second time in one piece too: something outside may have killed it.
        for next_step in ("trying again", "looking for the one"):
            try:
                return self._ask(texts)
            except ChildProcessError as error:
                death = str(error)
                _log.warning("the model's process %s over %d texts; %s", death, len(texts), next_step)
        return self._narrow_down(texts, death)

    def close(self, *_: object) -> None:
        """End the child, also while a thread waits for its answer: there it is a BundleError."""
        self._is_closed = True
        if child := self._child:
            child.kill()
        with self._turn:
            if self._child is not None:
                self._end()

    __exit__ = close

    def _narrow_down(self, texts: pa.Array, death: str) -> pa.Table:
        if self._num_deaths > _MAX_DEATHS:
            raise ShardError(f"the model's process died {self._num_deaths} times, last: it {death}")
        if len(texts) == 1:
            try:  # something outside may have killed it this time
                return self._ask(texts)
            except ChildProcessError as error_again:
                death = str(error_again)
            error = f"the model's process {death} on this text"
            row = {REVIEW: True, NUM_TOKENS: 0, TRUNCATED: False, ERROR: error}
            return pa.Table.from_pylist([row], schema=self.schema)
        size = -(-len(texts) // _NUM_SLICES)
        tables = []
        for start in range(0, len(texts), size):
            part = pa.concat_arrays([texts[start : start + size]])  # a slice would take all texts through the pipe
            try:
                tables.append(self._ask(part))
            except ChildProcessError as error:
                tables.append(self._narrow_down(part, str(error)))
        whole = pa.concat_tables(tables)  # with the first one's metadata
        has_other_ids = any(OTHER_IDS in (one.schema.metadata or {}) for one in tables)
        return whole.replace_schema_metadata({OTHER_IDS: b""}) if has_other_ids else whole

    def _ask(self, texts: pa.Array) -> pa.Table:
        if self._is_doubted:
            try:
                self._asked(_HARMLESS)
            except ChildProcessError as error:
                raise UnavailableError(f"the model's process {error} on a harmless text, too") from error
            self._is_doubted = False
        return self._asked(texts)

    def _asked(self, texts: pa.Array) -> pa.Table:
        self.ready()
        assert self._pipe is not None
        asked_s = time.monotonic()
        try:
            self._pipe.send(texts)
            answer = self._pipe.recv()
        except _ENDED as error:
            self._num_deaths += 1
            self._is_doubted, how = True, self._end()
            if time.monotonic() - asked_s >= self._spec.timeout_s:
                how = f"made no progress for {self._spec.timeout_s:.0f} s"
            raise ChildProcessError(how) from error
        if isinstance(answer, ShardError | UnavailableError):
            raise answer
        return answer

    def ready(self) -> subprocess.Popen[bytes]:
        """The child, after it has loaded the model.

        Raises:
            BundleError: the child ended, cannot load what an earlier child could, or found another bundle.
            RequestError: the child cannot load the bundle.
        """
        if self._child is not None:
            return self._child
        if self._is_closed:
            raise BundleError(f"the process with {self._spec.bundle} has been ended")
        self._pipe, far_end = Pipe()
        # -P: Python must not import modules from the working folder.
        command = [sys.executable, "-P", "-m", "bertray.bundle.isolated", json.dumps(asdict(self._spec))]
        with far_end:
            fd = far_end.fileno()
            # Its stdout is our stderr, because what libraries print is no result of the job.
            self._child = subprocess.Popen([*command, str(fd)], stdin=subprocess.DEVNULL, stdout=2, pass_fds=[fd])
        try:
            if not self._pipe.poll(LOAD_TIMEOUT_S):
                self._child.kill()
            loaded = self._pipe.recv()
        except _ENDED as error:
            how = self._end()
            raise BundleError(f"the process that was to load {self._spec.bundle} {how}; its stderr says why") from error
        if isinstance(loaded, RequestError):
            self._kill()
            # After an earlier child was ready, the bundle or the device is gone: that is no shard's fault.
            raise BundleError(str(loaded)) if self.precision else loaded
        precision, device, fingerprint = loaded
        if fingerprint != self.info.fingerprint():
            self._kill()
            raise was_replaced(self._spec.bundle)
        self.precision, self.device = precision, device
        return self._child

    def _kill(self) -> None:
        assert self._child is not None
        self._child.kill()
        self._end()

    def _end(self) -> str:
        """Wait for the end of the child, and say how it ended."""
        assert self._child is not None and self._pipe is not None
        self._pipe.close()
        code, self._child = self._child.wait(), None
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def main() -> None:
    """The child: load the model, report it, and answer until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    import torch

    from bertray.model.runtime import keep_freed_memory

    keep_freed_memory()
    pipe, spec = Connection(int(sys.argv[2])), ModelSpec(**json.loads(sys.argv[1]))
    try:
        bundle = spec.load()
    except RequestError as error:
        pipe.send(error)
        return
    device = getattr(bundle.encoder, "device", None)  # OpenVINO's encoder has none: it runs on CPUs
    pipe.send((bundle.precision, device.type if device else "cpu", bundle.info.fingerprint()))
    while True:
        try:
            texts = pipe.recv()
        except _ENDED:
            return
        try:
            with watched(spec.timeout_s):
                answer: object = bundle.predict_column(texts)
        except torch.AcceleratorError:  # a GPU that has failed once fails for ever in this process
            raise
        except Exception as error:
            traceback.print_exc()
            with watched(spec.timeout_s):
                answer = blamed(error, bundle)
        try:
            pipe.send(answer)
        except _ENDED:
            return


if __name__ == "__main__":
    main()
