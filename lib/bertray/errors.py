"""All errors that bertray raises on purpose. A message states the value, the limit, the path and the next step."""

from collections.abc import Iterable
from importlib import metadata
from typing import Literal, Self

Why = Literal["away", "missing", "refused"]


class BertrayError(Exception):
    """Base of every error raised on purpose: exit code 1."""


class RequestError(BertrayError, ValueError):
    """An option, a path, data or storage does not fit; the message says what to change. Exit code 2."""


class BundleError(RequestError):
    """A model bundle is missing, incomplete or altered."""


class UnavailableError(RequestError):
    """Storage, a server or a device refuses or does not answer; a later try, or another machine, may succeed.

    Attributes:
        why: there is no answer for now (away), no such file (missing), or anything else (refused).
    """

    why: Why = "refused"

    @classmethod
    def because(cls, why: Why, message: str) -> Self:
        error = cls(message)
        error.why = why
        return error


class LockedError(BertrayError):
    """Another run holds the output; the message says which, since when, and when its lock expires. Exit code 4."""


class ShardError(BertrayError):
    """A shard of the archive cannot be scored; it is listed with this message, and the others continue."""


class ShardRefusedError(ShardError):
    """A shard is not there, or the storage refuses to read it: because of the shard, or because of who asks."""


class ShardChangedError(ShardError):
    """A shard was rewritten while it was read; it can be read again."""


class DivergedError(BertrayError):
    """The loss or its gradient is not a number.

    Attributes:
        step: the training step at which it happened.
        rows: the rows of the training split in that step.
    """

    def __init__(self, message: str, step: int, rows: list[int]) -> None:
        super().__init__(message, step, rows)
        self.step, self.rows = step, rows

    def __str__(self) -> str:
        return str(self.args[0])


def missing_extra(what: str, extra: str, otherwise: str = "") -> RequestError:
    """The error to raise if a package is missing that only an extra installs.

    Args:
        what: the option or command that needs it.
        otherwise: how to do without it, as "leave --mlflow-uri out".
    """
    try:
        split = (line.partition(";") for line in metadata.requires("bertray") or [])
        packages = " ".join(f"'{package.strip()}'" for package, _, marker in split if f'extra == "{extra}"' in marker)
    except metadata.PackageNotFoundError:  # the library of a checkout, which is not installed
        packages = f"-c constraints.txt '.[{extra}]'"
    instead = f", or {otherwise}" if otherwise else ""
    return RequestError(f"{what} needs the extra {extra!r}. On every node: pip install {packages}{instead}")


def listed(names: Iterable[str], most: int = 30) -> str:
    """Names for a message: all, or the first ones and how many there are beside them."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more
