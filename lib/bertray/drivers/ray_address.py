"""Which Ray a job uses, looked at before Ray starts and before time is spent.

    RAY_ADDRESS=10.0.0.1:6379       the cluster there, if one answers
    RAY_ADDRESS=auto                the cluster that runs on this machine
    unset, empty, or local          a Ray of its own, on this machine and for this job only

Left to itself, Ray waits for 80 s where nothing answers, then ends the process.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys

from bertray.errors import RequestError

_TIMEOUT_S = 5.0
# How HTTP/2, which Ray's own protocol is on top of, begins: a client's preface and empty settings (RFC 9113, 3.4).
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS = 4
_INSTEAD = "Unset it to use this machine alone, or set it to HOST:PORT of a head node, as in 10.0.0.1:6379"


def cluster_address() -> str | None:
    """What RAY_ADDRESS names; None: no cluster."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def prepare() -> None:
    """Check the address of the cluster; without one, let Ray listen on loopback only. Call before Ray is imported.

    Raises:
        RequestError: no Ray answers at the address in RAY_ADDRESS.
    """
    address = cluster_address()
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():  # a session uses what is connected
        return
    # Under `uv run` Ray would copy the working folder, with all data in it, and start every worker by uv again.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if address is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        if not os.access(os.path.expanduser("~"), os.W_OK):  # noqa: PTH111 - Ray would keep a token there
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        return
    if address.startswith("ray://") or address.endswith(":10001"):
        raise refused("is for Ray Client, which bertray does not use")
    if "://" in address:
        raise refused(f"is where ray job submit --address {address} sends jobs; a job itself needs a head node")
    from ray._private.services import canonicalize_bootstrap_address  # takes a second

    try:
        # Auto becomes an address, and 127.0.0.1 that of this machine's network.
        found = str(canonicalize_bootstrap_address(address))
    except (ConnectionError, ValueError) as error:
        raise refused("finds no Ray on this machine" if address == "auto" else "is no HOST:PORT") from error
    host, _, port = found.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_S) as connection:
            connection.sendall(_HELLO)
            answer = connection.recv(len(_HELLO))
        if "RAY_USE_TLS" not in os.environ and answer[3:4] != bytes((_SETTINGS,)):
            raise ValueError("something else answers there")
    except (OSError, ValueError, OverflowError) as error:
        is_moved = address not in (found, "auto")  # Ray takes 127.0.0.1 for this machine's address in its network
        why = ", which Ray takes it for without RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0" if is_moved else ""
        raise refused(f"leads to no Ray: {found}{why}: {error}") from error


def refused(reason: str) -> RequestError:
    """The error of a RAY_ADDRESS that leads to no Ray."""
    return RequestError(f"RAY_ADDRESS={cluster_address()} {reason}. {_INSTEAD}")
