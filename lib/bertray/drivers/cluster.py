"""The Ray cluster that a job runs on: the one in RAY_ADDRESS, else one of this machine's own, for this job only."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem
from ray._private import ray_constants

from bertray.errors import RequestError
from bertray.storage.location import Location
from bertray.types import Device

_log = logging.getLogger(__name__)

# Four threads keep a small encoder busy; more threads a process scale worse than more processes.
CPUS_PER_PROCESS = 4

Result = TypeVar("Result")


@contextmanager
def session() -> Iterator[None]:
    """Be connected to Ray inside the block. `ray job submit` sets RAY_ADDRESS; without it a local Ray is started.

    A connection that stands already is used and left standing.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    # Ray's own lines are for Ray's developers: what a job has to say it says itself, and errors carry their traceback.
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        with _handlers_kept():
            if address:
                ray.init(address=address, **common)
            else:
                if ray_constants.ENABLE_RAY_CLUSTER:
                    _log.warning(
                        "warning: Ray was imported before bertray, and listens on every interface of this machine: "
                        "import bertray first, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0"
                    )
                # On loopback, together with what `cli.keep_ray_on_loopback` sets before Ray is imported.
                ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **common)
        for name in ("ray.data", "ray.train"):  # these two set up their own handlers on import
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        ray.shutdown()  # also of what a signal broke off as it started


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: Ray's own prints a stack, and SIGALRM ends the process 3 s after it."""
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, handler)


def in_background(work: Callable[[], Result]) -> Future[Result]:
    """Run Ray Train or Tune in a thread: in the main one Ray 2.60 takes SIGINT over, and ends without a word."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # whatever it is, the main thread raises it
            done.set_exception(error)

    threading.Thread(target=run, name="ray", daemon=True).start()
    return done


# What `ray.get` raises of a task whose process died; the last is Ray's own answer to a machine without memory.
LOST_ERRORS = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
)


def assigned_cpus() -> int:
    """CPUs of the task or actor that this process runs; at least one."""
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


def start_board(kind: type) -> Any:
    """An actor where processes meet, which takes no CPU.

    After the loss of its node it starts again, empty: what it must know those who use it say again.
    """
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(kind).remote()


def storage(folder: Location) -> dict[str, Any]:
    """The arguments of a `RunConfig` that has Ray Train or Tune keep its own state in a folder."""
    return {
        "storage_path": folder.path,
        "storage_filesystem": LocalFileSystem() if folder.is_local else PyFileSystem(FSSpecHandler(folder.fs)),
    }


@dataclass(frozen=True)
class Placement:
    """How many processes hold a model, and what each is given."""

    num_processes: int
    use_gpu: bool
    cpus_each: int

    @property
    def share(self) -> str:
        """What a process is given, for messages."""
        return "1 GPU" if self.use_gpu else f"{self.cpus_each} CPU"


def place(device: Device, num_processes: int | None, what: str, at_most: int | None = None) -> Placement:
    """Divide the cluster among processes that each hold a model.

    Args:
        device: auto takes GPUs where the cluster has one now.
        num_processes: None: one a GPU, or one for every `CPUS_PER_PROCESS` CPUs (at least one).
        what: the option that the user would change, for messages.
        at_most: so many may join later: on CPUs a share is one that every node has.

    Raises:
        RequestError: a cluster that cannot grow (this machine) is too small, or torch does not see its GPU.
    """
    alone = not os.environ.get("RAY_ADDRESS")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if alone and num_gpus:
        # Ray counts GPUs by the driver; a torch built without CUDA, or for a newer driver, cannot use them.
        from bertray.model.runtime import resolve_device  # torch: seconds, for a machine with a GPU

        use_gpu = resolve_device(device).type == "cuda"
    else:
        use_gpu = device == "cuda" or (device == "auto" and num_gpus > 0)
    node_cpus = [int(node.get("CPU", 0)) for node in nodes]
    if num_processes is None:
        num_processes = max(1, num_gpus if use_gpu else sum(node_cpus) // CPUS_PER_PROCESS)
    have = num_gpus if use_gpu else sum(node_cpus)
    if num_processes > have:
        kind = "GPUs" if use_gpu else "CPUs"
        message = f"{what} {num_processes} needs {num_processes} {kind}; there are {have}"
        if alone:
            raise RequestError(f"{message}. Lower {what}, or run on a cluster with RAY_ADDRESS")
        _log.warning("%s now: waiting for the cluster to grow", message)
        if not use_gpu:
            return Placement(num_processes, False, CPUS_PER_PROCESS)
    if use_gpu:
        return Placement(num_processes, True, 1)
    num_nodes = sum(cpus > 0 for cpus in node_cpus)
    return Placement(num_processes, False, _largest_share(node_cpus, max(num_processes, min(at_most or 1, num_nodes))))


def _largest_share(node_cpus: list[int], num_processes: int) -> int:
    """The most CPUs a process can have so that all fit: 3 processes on nodes of 8 and 4 get 4 each."""
    for share in range(max(node_cpus, default=1), 1, -1):
        if sum(cpus // share for cpus in node_cpus) >= num_processes:
            return share
    return 1
