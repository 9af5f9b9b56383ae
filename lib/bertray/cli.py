"""From a command line to a finished job: options, logging, the summary line, the exit code.

1. Merge options from YAML, environment and flags; the job's configuration class checks them.
2. Run the job. Logs, progress, tables and anything that it prints to stdout go to stderr.
3. Print the summary as the last line of stdout: one JSON object, so `bertray train … | tail -1 | jq .` works.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import io
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO, TypeVar, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from bertray.config import JobConfig
from bertray.errors import BertrayError, LockedError, RequestError

EXIT_OK, EXIT_FAILED, EXIT_BAD_REQUEST, EXIT_SHARDS_FAILED, EXIT_LOCKED, EXIT_HELD = 0, 1, 2, 3, 4, 5
EXIT_INTERRUPTED, EXIT_TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM

_EXIT_CODES = """\
exit codes: 0 done; 1 failed while running; 2 bad request, the message says what to change;
            3 some shards failed (bertray score); 4 another run is using the output;
            5 scored, but held back until a person looks at it (bertray score);
            130, 143 stopped by SIGINT or SIGTERM"""
_CONTINUED = ("train", "tune", "score")

Config = TypeVar("Config", bound=JobConfig)


class JobResult(NamedTuple):
    """The summary to print (None: the job printed its own output) and the exit code."""

    summary: dict[str, Any] | None
    exit_code: int = EXIT_OK


def run_job(
    name: str, config_class: type[Config], run: Callable[[Config], JobResult], argv: Sequence[str] | None
) -> int:
    """Run the job `bertray NAME` and return its exit code.

    Args:
        config_class: `--help` shows its docstring: the first line above the options, the rest below them.
        argv: None: the arguments of this process.
    """
    try:
        config = load_config(name, config_class, sys.argv[1:] if argv is None else argv)
        _log_to_stderr()
        _refuse_relative_output(config)
        with redirect_stdout(sys.stderr), _sigterm_raises():
            outcome = run(config)
    except (KeyboardInterrupt, SystemExit, RuntimeError) as error:
        # Python 3.11 wraps what interrupts the making of a class, as a signal does while Ray is imported.
        stop = error.__cause__ if isinstance(error, RuntimeError) else error
        # The latter is Ray's own handler.
        is_terminated = isinstance(stop, SystemExit) and stop.code in (EXIT_TERMINATED, signal.SIGTERM)
        if not is_terminated and not isinstance(stop, KeyboardInterrupt):
            raise
        kept = "; what was finished is kept: the same command continues" if name in _CONTINUED else ""
        print(f"stopped{kept}", file=sys.stderr)
        return EXIT_TERMINATED if is_terminated else EXIT_INTERRUPTED
    except BertrayError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        if isinstance(error, LockedError):
            return EXIT_LOCKED
        return EXIT_BAD_REQUEST if isinstance(error, RequestError) else EXIT_FAILED
    if outcome.summary is not None:
        with suppress(BrokenPipeError):
            print_json(outcome.summary, sys.stdout)
    return outcome.exit_code


def print_json(content: dict[str, Any], stdout: TextIO | None) -> None:
    """Print one line of JSON, escaped unless stdout is UTF-8; BrokenPipeError if its reader has left."""
    is_utf_8 = (getattr(stdout, "encoding", None) or "").lower() in ("utf-8", "utf8")
    print(json.dumps(content, ensure_ascii=not is_utf_8), file=stdout, flush=True)


class _Pipe(io.FileIO):
    """A stream whose reader, such as head, may leave."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def make_streams_last() -> None:
    """Let this process write any character to stdout, and go on when nobody reads its logs."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        raw = io.BufferedWriter(_Pipe(2, "wb", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, sys.stderr.encoding, "backslashreplace", line_buffering=True)


def leave(exit_code: int) -> NoReturn:
    """End the process with the exit code of its job.

    A stopped job may leave a thread waiting in Ray. Before Python 3.14 such a thread can crash the interpreter while it
    shuts down (https://github.com/python/cpython/issues/87135), so a stopped job skips the shutdown.
    """
    if exit_code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM (preemption, `ray job stop`) into an exception, so that the job cleans up."""

    def stop(*_: object) -> None:
        raise SystemExit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def load_config(name: str, config_class: type[Config], argv: Sequence[str]) -> Config:
    """Merge defaults < YAML (`--config`) < environment < flags into a checked configuration of the job `name`.

    Raises:
        RequestError: an unknown option or a bad value; the message names option, value and what is allowed.
        SystemExit: `--help` (code 0).
    """
    flags = _read_flags(name, config_class, argv)
    prefix = f"BERTRAY_{name.upper()}_"
    given: dict[str, tuple[str, Any]] = {}  # of each option, how it was given, and its value
    if path := flags.pop("config", None):
        given |= {key: (f"{path}: {key}", value) for key, value in _read_yaml(Path(path)).items()}
    for variable, text in os.environ.items():
        if variable.upper().startswith(prefix):
            given[variable[len(prefix) :].lower()] = variable, text
    given |= {key: (_flag(key), value) for key, value in flags.items()}
    allowed = sorted(config_class.model_fields)
    for key, (shown, _) in given.items():
        if key not in allowed:
            raise RequestError(f"unknown option {shown}.{did_you_mean(key, allowed)} Allowed: {', '.join(allowed)}")
    try:
        return config_class(**{key: value for key, (_, value) in given.items()})
    except ValidationError as error:
        raise RequestError(
            "\n       ".join(_explain(config_class, prefix, item, given) for item in error.errors())
        ) from error


def describe(config_class: type[JobConfig]) -> str:
    """What a job does, in one line."""
    return (config_class.__doc__ or "").partition("\n")[0]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}. {self.prog} --help shows every option")


def _read_flags(name: str, config_class: type[JobConfig], argv: Sequence[str]) -> dict[str, Any]:
    examples = inspect.cleandoc(config_class.__doc__ or "").partition("\n")[2].strip("\n")
    parser = _Parser(
        prog=f"bertray {name}",
        usage="%(prog)s [OPTIONS]",
        description=describe(config_class),
        epilog=f"{examples}\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with any of the options below, as text_column: body"
    )
    for option, field in config_class.model_fields.items():
        _add_option(parser, option, field)
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        wrong = unknown[0].partition("=")[0]
        close = did_you_mean(wrong, map(_flag, config_class.model_fields))
        raise RequestError(f"unknown option {wrong}.{close} {parser.prog} --help shows every option")
    return vars(flags)


def _add_option(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    description = (field.description or "").replace("%", "%%")
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    if extra.get("positional"):
        parser.add_argument(name, nargs="*", metavar=name.rstrip("s").upper(), help=description)
        return
    if field.is_required():
        description += " (required)"
    elif field.default not in (None, "") and field.default_factory is None:
        description += f" (default: {str(field.default).replace('%', '%%')})"
    if extra.get("hidden"):
        description = argparse.SUPPRESS
    if field.annotation is bool:
        parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=description)
    else:
        is_many = get_origin(field.annotation) is list and field.is_required()
        metavar = "PATH" if is_many else name.rsplit("_", 1)[-1].upper()
        action, nargs = ("extend", "+") if is_many else ("store", None)
        parser.add_argument(_flag(name), action=action, nargs=nargs, metavar=metavar, help=description)


class _Loader(yaml.SafeLoader):
    """Reads scalars other than null as text: in YAML 1.1, 1:8 is 68, 007 is 7 and no is false."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:  # whose name the errors say
            values = yaml.load(file, _Loader) or {}  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise RequestError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RequestError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(f"--config {path} holds a {type(values).__name__}; write one 'option: value' per line")
    return {str(key): value for key, value in values.items()}


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A sentence that suggests the allowed name closest to `name`, or of these initials; empty if none is close."""
    names = list(allowed)
    of_initials = [one for one in names if "".join(part[:1] for part in re.split("[-_]+", one)) == name.strip("-")]
    close = of_initials or difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _explain(config_class: type[JobConfig], prefix: str, item: Any, given: dict[str, tuple[str, Any]]) -> str:
    """One line for one of pydantic's complaints: option, value, what is allowed."""
    message = str(item["msg"]).removeprefix("Value error, ")
    if not item["loc"]:  # a check over several fields, which names them itself
        return message
    name = str(item["loc"][0])
    if item["type"] == "missing":
        return f"{_flag(name)} is required (or {prefix}{name.upper()}, or '{name}:' in the --config file)"
    is_range = f"{name}s" in config_class.model_fields and any(mark in str(item["input"]) for mark in ",:")
    several = f". To search over several values, or a range: {_flag(name)}s" if is_range else ""
    return f"{given[name][0]}: {item['input']!r} is not allowed. {message}{several}"


def _refuse_relative_output(config: JobConfig) -> None:
    """Inside `ray job submit` the working folder is Ray's copy of the code, which Ray removes later."""
    output = getattr(config, "output", None) or "/"
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "://" not in output and not Path(output).is_absolute():
        raise RequestError(
            f"--output {output} is relative, so it would lie in Ray's temporary copy of the code: give a URI, or an "
            "absolute path that every node can reach"
        )


# Other control characters than line breaks and tabs, and those that reverse the order of what follows.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with control characters as escapes: a text or a path must not change the terminal it is shown on."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to the current sys.stderr, which a progress bar replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _log_to_stderr() -> None:
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("bertray")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
