"""The Ray cluster that a job runs on: the one in RAY_ADDRESS, else a local one for this job only."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem
from ray._private import ray_constants
from ray._private.utils import get_num_cpus

from bertray.drivers import ray_address
from bertray.errors import RequestError
from bertray.storage.location import Location
from bertray.types import Device

_log = logging.getLogger(__name__)

# Four threads keep a small encoder busy; more processes scale better than more threads.
CPUS_PER_PROCESS = 4
# Errors of `ray.get` if the task's process died; the last one is Ray's answer to a machine without memory.
LOST_ERRORS = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)


@contextmanager
def session() -> Iterator[None]:
    """Connect to Ray for the duration of the block, or start a local Ray without RAY_ADDRESS.

    `ray job submit` sets RAY_ADDRESS. An existing connection is used and stays open.
    """
    if ray.is_initialized():
        yield
        return
    address = ray_address.cluster_address()
    where: dict[str, Any] = {"address": address}
    if not address:
        if ray_constants.ENABLE_RAY_CLUSTER:
            _log.warning(
                "warning: Ray was imported before bertray and listens on every interface of this machine: import "
                "bertray first, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0"
            )
        # `ray_address.prepare` and this address together keep Ray on loopback.
        where = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        # Ray rounds half a CPU of a container down to none.
        where["num_cpus"] = max(1, int(get_num_cpus(override_docker_cpu_warning=True)))
    sigterm_handler = signal.getsignal(signal.SIGTERM)
    try:
        # Ray's log lines are for its developers: jobs log what matters themselves, and errors carry their traceback.
        try:
            ray.init(**where, logging_level=logging.ERROR, log_to_driver=False)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            said = " ".join(str(error).split())
            if address is not None:  # such as one of another version, or that this machine is no node of
                raise ray_address.refused(f"cannot be used: {said}") from error
            if isinstance(error, OSError):
                raise RequestError(f"Ray does not start: {said}. Its files are in RAY_TMPDIR, or /tmp") from error
            raise
        if threading.current_thread() is threading.main_thread():
            # Ray's handler would print a stack and end the process 3 s later.
            signal.signal(signal.SIGTERM, sigterm_handler)
        for name in ("ray.data", "ray.train"):  # these set up handlers when they are imported
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        ray.shutdown()  # also if a signal interrupted the start


def assigned_cpus() -> int:
    """CPUs of the task or actor in this process; at least one."""
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


def start_board(kind: type) -> Any:
    """Start an actor, without CPUs, through which processes communicate.

    If its node is lost it restarts empty, and its users must tell it again what it needs to know.
    """
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(kind).remote()


def storage(folder: Location) -> dict[str, Any]:
    """Arguments of a `RunConfig` that make Ray Train or Tune keep their state in a folder."""
    return {
        "storage_path": folder.path,
        "storage_filesystem": LocalFileSystem() if folder.is_local else PyFileSystem(FSSpecHandler(folder.fs)),
    }


@dataclass(frozen=True)
class Placement:
    """How many processes hold a model, and the resources of each."""

    num_processes: int
    use_gpu: bool
    cpus_each: int
    a_gpu: int = 1  # processes that share one

    @property
    def share(self) -> str:
        """The resources of a process, for messages."""
        return f"{1 if self.a_gpu == 1 else f'1/{self.a_gpu}'} GPU" if self.use_gpu else f"{self.cpus_each} CPU"


def place(
    device: Device, num_processes: int | None, what: str, at_most: int | None = None, a_gpu: int = 1
) -> Placement:
    """Divide the cluster among processes that each hold a model.

    Args:
        device: auto uses GPUs if the cluster has one now.
        num_processes: None: `a_gpu` per GPU, or one per `CPUS_PER_PROCESS` CPUs (at least one).
        what: the option that the user would change, for messages.
        at_most: up to how many processes may run later; on CPUs each then gets a share that every node has.
        a_gpu: processes that share a GPU.

    Raises:
        RequestError: a cluster that cannot grow (this machine) is too small, or torch does not see its GPU; processes
            are to share a GPU, and none is used.
    """
    is_local = ray_address.cluster_address() is None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_gpus = int(sum(node.get("GPU", 0) for node in nodes))
    use_gpu = device == "cuda" or (device == "auto" and num_gpus > 0)
    if is_local and num_gpus:
        # Ray asks the driver for GPUs; torch may be built without CUDA or for a newer driver, and not see them.
        from bertray.model.runtime import resolve_device  # torch takes seconds: only on a machine with a GPU

        use_gpu = resolve_device(device).type == "cuda"
    node_cpus = [int(node.get("CPU", 0)) for node in nodes]
    if a_gpu > 1 and not use_gpu:
        raise RequestError(f"--actors-per-gpu {a_gpu}: no GPU is used; leave it out, and use --num-actors on CPUs")
    have, kind = (num_gpus * a_gpu, "GPUs") if use_gpu else (sum(node_cpus), "CPUs")
    if num_processes is None:
        num_processes = max(1, have if use_gpu else have // CPUS_PER_PROCESS)
    if num_processes > have:
        message = f"{what} {num_processes} needs {-(-num_processes // a_gpu)} {kind}; there are {have // a_gpu}"
        if is_local:
            raise RequestError(f"{message}. Lower {what}, or run on a cluster with RAY_ADDRESS")
        _log.warning("%s now: waiting for the cluster to grow", message)
    if use_gpu:
        return Placement(num_processes, True, 1, a_gpu)
    if num_processes > have:
        return Placement(num_processes, False, CPUS_PER_PROCESS)
    # The most CPUs that each process can have so that all fit: 3 processes on nodes of 8 and 4 get 4 each.
    most = max(num_processes, min(at_most or 1, sum(cpus > 0 for cpus in node_cpus)))
    shares = (share for share in range(max(node_cpus), 0, -1) if sum(cpus // share for cpus in node_cpus) >= most)
    return Placement(num_processes, False, next(shares, 1))
