"""What can go wrong, as one small tree.

    BertrayError            anything this project raises on purpose
      RequestError          an option, a path, data or storage does not fit: exit code 2
        BundleError         a bundle folder that is incomplete, altered or not a bundle
        UnavailableError    storage or a server refuses, or does not answer
      LockedError           another run is at work on the same output: exit code 4
      DivergedError         the loss of a training is not a number
      ShardError            one shard of an archive cannot be scored: it is listed, the others go on
        ShardChangedError   it was rewritten while it was read

A message states the value, the limit, the path and the next step. The command line (`bertray.cli`) shows it; a
`ShardError` is listed with its shard (`bertray.scoring.score_unit`).
"""


class BertrayError(Exception):
    """Base of every error raised on purpose."""


class RequestError(BertrayError, ValueError):
    """A request that cannot be carried out as it stands; the message says what to change."""


class BundleError(RequestError):
    """A model bundle that is missing, incomplete or altered."""


class UnavailableError(RequestError):
    """What storage or a server refuses, or does not answer; the same may succeed later, or on another machine."""


class LockedError(BertrayError):
    """Another run holds the output; the message says which, since when, and when its lock expires."""


class ShardError(BertrayError):
    """A shard of the archive that cannot be scored; the message is the reason listed in the summary."""


class ShardChangedError(ShardError):
    """A shard that was rewritten while it was read; it can be read again."""


class DivergedError(BertrayError):
    """The loss, or its gradient, is not a number.

    Attributes:
        step: at which; with the seed it says which rows were read.
        rows: of the training split, that the step read.
    """

    def __init__(self, message: str, step: int, rows: list[int]) -> None:
        super().__init__(message, step, rows)
        self.step, self.rows = step, rows

    def __str__(self) -> str:
        return str(self.args[0])


def missing_extra(what: str, extra: str, otherwise: str = "") -> RequestError:
    """The error of something that a package is needed for which the default install lacks.

    Args:
        what: that needs it, as the user asked for it.
        otherwise: what to do without it, as "leave --mlflow-uri out".
    """
    instead = f", or {otherwise}" if otherwise else ""
    return RequestError(
        f"{what} needs the extra {extra!r}: pip install 'bertray[{extra}]' on every node (in a checkout: "
        f"pip install -c constraints.txt '.[{extra}]'){instead}"
    )
