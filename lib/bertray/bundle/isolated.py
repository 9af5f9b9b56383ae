"""A bundle in a process of its own, for texts that may end the process that reads them.

    IsolatedBundle (here)                       python -m bertray.bundle.isolated (child)
      texts of a step      ── Arrow, stdin ──►    Bundle.predict_column
      predictions          ◄── Arrow, stdout ──

Where the child dies twice over the same texts, a new one gets them in slices, and of the slice that kills it, slices
again, until one text alone has killed it: that row gets an `error`, all others their predictions.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import struct
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any, Self

import pyarrow as pa

from bertray import errors
from bertray.bundle.info import BundleInfo, read_info, was_replaced
from bertray.errors import BundleError, RequestError, ShardError
from bertray.schema import ERROR, NUM_TOKENS, REVIEW, TRUNCATED, prediction_schema
from bertray.storage.location import Location
from bertray.types import Device, Engine, InferencePrecision

if TYPE_CHECKING:
    from bertray.bundle.bundle import Bundle

_log = logging.getLogger(__name__)

# 16 x 16 x 16 texts in a step: three deaths after the first find the text.
_NUM_SLICES = 16
# Of one call: more texts than this that kill a process point to something else than texts.
_MAX_DEATHS = 40
_LENGTH = struct.Struct("<Q")
# The column of an answer that is none.
_FAILURE = "failure"


@dataclass(frozen=True)
class ModelSpec:
    """How a process is to load the model.

    Args:
        cache: where `openvino.prepare` left the exported model, or what was decided of fp16 is kept.
        num_threads: of the processor; 0: all that the process may use.
    """

    bundle: str
    engine: Engine
    precision: InferencePrecision
    device: Device
    cache: str
    num_threads: int

    def load(self) -> Bundle:
        """The bundle, in this process.

        Raises:
            BundleError: it is missing, incomplete or altered.
        """
        import torch  # here and below: the process that starts the child does without

        from bertray.bundle.bundle import Bundle
        from bertray.model.runtime import num_cpus

        num_threads = self.num_threads or num_cpus()
        if self.device != "cuda":
            torch.set_num_threads(num_threads)
        if self.engine == "openvino":
            from bertray.bundle.openvino import load_prepared  # half a second, and much else

            return load_prepared(self.bundle, self.precision, Location.of(self.cache), num_threads)
        assert self.precision != "int8"  # the configuration has checked it
        return Bundle.load(self.bundle, self.precision, self.device, Location.of(self.cache))


class _ProcessDiedError(Exception):
    """Why the child ended."""


class IsolatedBundle:
    """Predicts as a `Bundle` does, in a child process; a context manager, or close it after use.

    Attributes:
        info: of the bundle.
        precision: what the model is really run in; known when the child is ready.
        device: what it runs on, likewise.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._child: subprocess.Popen[bytes] | None = None
        self.info: BundleInfo = read_info(Location.of(spec.bundle))
        self.precision = self.device = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def schema(self) -> pa.Schema:
        """Of what `predict_column` gives."""
        return prediction_schema(self.info.problem_type)

    def predict_column(self, texts: pa.Array) -> pa.Table:
        """As `Bundle.predict_column`; a text that ends the process has an `error`.

        Raises:
            BundleError: the process ends before it has read any text.
            ShardError: it ends again and again, or the model raises an error.
        """
        try:
            return self._ask(texts)
        except _ProcessDiedError as death:
            _log.warning("the model's process %s over %d texts; trying again", death, len(texts))
        try:  # in one piece, as before: whatever killed it from outside does not do it twice
            return self._ask(texts)
        except _ProcessDiedError as death:
            _log.warning("the model's process %s over %d texts; looking for the one", death, len(texts))
            return self._narrow_down(texts, str(death), deaths=[2])

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _narrow_down(self, texts: pa.Array, death: str, deaths: list[int]) -> pa.Table:
        if len(texts) == 1:
            return self._row_of_error(f"the model's process {death} on this text")
        size = -(-len(texts) // _NUM_SLICES)
        tables = []
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            try:
                tables.append(self._ask(part))
            except _ProcessDiedError as error:
                deaths[0] += 1
                if deaths[0] > _MAX_DEATHS:
                    raise ShardError(f"the model's process died {deaths[0]} times, last: it {error}") from error
                tables.append(self._narrow_down(part, str(error), deaths))
        return pa.concat_tables(tables)

    def _row_of_error(self, reason: str) -> pa.Table:
        is_reviewed = self.info.review_below is not None
        row = {REVIEW: is_reviewed, NUM_TOKENS: 0, TRUNCATED: False, ERROR: reason}
        return pa.Table.from_pylist([row], schema=self.schema)

    def _ask(self, texts: pa.Array) -> pa.Table:
        child = self.ready()
        assert child.stdin is not None and child.stdout is not None
        try:
            _write(child.stdin, pa.table({"text": texts}))
            answer = _read(child.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise _ProcessDiedError(self._how_it_died()) from error
        if answer.column_names == [_FAILURE]:
            raise ShardError(f"{answer[_FAILURE][0].as_py()}")
        return answer

    def ready(self) -> subprocess.Popen[bytes]:
        """The child, when it has loaded the model.

        Raises:
            BundleError: it ended instead, or a later one cannot load what the first one could, or the bundle is another
                one than when this was made.
            RequestError: it cannot load the bundle, for the reason that it gives.
        """
        if self._child is not None:
            return self._child
        # -P: Python must not import modules from the working folder.
        command = [sys.executable, "-P", "-m", "bertray.bundle.isolated", json.dumps(asdict(self._spec))]
        child = self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        try:
            facts = _read(child.stdout).to_pylist()[0]
        except EOFError as error:
            how = self._how_it_died()
            raise BundleError(f"the process that was to load {self._spec.bundle} {how}; its stderr says why") from error
        if _FAILURE in facts:
            self.close()
            # One that was ready once: the bundle or the device is gone, whatever the shard at work.
            raise getattr(errors, "BundleError" if self.precision else facts["kind"])(facts[_FAILURE])
        if facts["fingerprint"] != self.info.fingerprint():
            self.close()
            raise was_replaced(self._spec.bundle)
        self.precision, self.device = facts["precision"], facts["device"]
        return child

    def _how_it_died(self) -> str:
        assert self._child is not None
        self._child.communicate()
        code, self._child = self._child.returncode, None
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _write(stream: IO[bytes], table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    message = sink.getvalue()
    stream.write(_LENGTH.pack(message.size))
    stream.write(message)
    stream.flush()


def _read(stream: IO[bytes]) -> pa.Table:
    """The next table.

    Raises:
        EOFError: the other side has ended.
    """
    message = _read_bytes(stream, _LENGTH.unpack(_read_bytes(stream, _LENGTH.size))[0])
    return pa.ipc.open_stream(message).read_all()


def _read_bytes(stream: IO[bytes], num_bytes: int) -> bytes:
    found = stream.read(num_bytes)
    if len(found) < num_bytes:
        raise EOFError
    return found


def _public_kind(error: RequestError) -> str:
    """The name of the error's class, or of the nearest one above it, in `bertray.errors`."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)


def main() -> None:
    """The child: load the model, say so, answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    answers: Any = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not stand between the answers
    import torch

    from bertray.model.runtime import keep_freed_memory

    keep_freed_memory()
    try:
        bundle = ModelSpec(**json.loads(sys.argv[1])).load()
    except RequestError as error:
        _write(answers, pa.table({_FAILURE: [str(error)], "kind": [_public_kind(error)]}))
        return
    device = getattr(bundle.encoder, "device", None)  # an engine's own encoder is for CPUs
    facts = {
        "precision": bundle.encoder.precision,
        "device": device.type if device else "cpu",
        "fingerprint": bundle.info.fingerprint(),
    }
    _write(answers, pa.Table.from_pylist([facts]))
    while True:
        try:
            texts = _read(sys.stdin.buffer)["text"]
        except EOFError:
            return
        try:
            answer = bundle.predict_column(texts)
        except torch.AcceleratorError:  # a GPU that has failed once fails in this process for ever
            raise
        except Exception as error:  # as in an actor: no text is to blame for it
            traceback.print_exc()
            answer = pa.table({_FAILURE: [f"{type(error).__name__}: {error}"]})
        _write(answers, answer)


if __name__ == "__main__":
    main()
