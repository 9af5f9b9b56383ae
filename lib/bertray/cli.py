"""From a command line to a finished job: options, logging, the summary line, the exit code.

1. Options are merged from YAML, environment and flags and checked by the job's configuration class.
2. The job runs. Logs, progress and tables go to stderr; anything printed to stdout meanwhile goes there too.
3. The last line of stdout is the summary, one JSON object, so `bertray train … | tail -1 | jq .` works.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from bertray.config import JobConfig
from bertray.errors import BertrayError, LockedError, RequestError

EXIT_OK, EXIT_FAILED, EXIT_BAD_REQUEST, EXIT_SHARDS_FAILED, EXIT_LOCKED, EXIT_HELD = 0, 1, 2, 3, 4, 5
EXIT_INTERRUPTED, EXIT_TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM

_EXIT_CODES = """\
exit codes: 0 done; 1 failed on the way; 2 bad request, the message says what to change;
            3 some shards failed (bertray score); 4 another run is at work on the output;
            5 scored, but held back for a person to look at (bertray score);
            130, 143 stopped by SIGINT or SIGTERM"""
_STOPPED = "stopped; what was finished is kept: train, tune and score go on when the same command is said again"

Config = TypeVar("Config", bound=JobConfig)


class JobResult(NamedTuple):
    """What a job hands back: the summary to print (None: the job printed its own output) and the exit code."""

    summary: dict[str, Any] | None
    exit_code: int = EXIT_OK


def run_job(
    name: str, config_class: type[Config], run: Callable[[Config], JobResult], argv: Sequence[str] | None
) -> int:
    """Carry out one job and return its exit code.

    Args:
        name: of the job, as in `bertray NAME`.
        config_class: of its options. Its docstring is shown by --help: the first paragraph above the options, the rest
            below them.
        argv: None: those of this process.
    """
    try:
        config = load_config(name, config_class, sys.argv[1:] if argv is None else argv)
        _log_to_stderr()
        _refuse_relative_output(config)
        keep_ray_on_loopback()
        with redirect_stdout(sys.stderr), _ended_by_sigterm():
            outcome = run(config)
    except KeyboardInterrupt:
        print(_STOPPED, file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as stop:
        if stop.code not in (EXIT_TERMINATED, signal.SIGTERM):  # the latter is Ray's own handler
            raise
        print(_STOPPED, file=sys.stderr)
        return EXIT_TERMINATED
    except BertrayError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, LockedError):
            return EXIT_LOCKED
        return EXIT_BAD_REQUEST if isinstance(error, RequestError) else EXIT_FAILED
    if outcome.summary is not None:
        print(json.dumps(outcome.summary, ensure_ascii=False), flush=True)
    return outcome.exit_code


def leave(exit_code: int) -> NoReturn:
    """End the process with the exit code of its job.

    A job that was stopped may leave a thread waiting within Ray, which can crash the interpreter as it ends: Pythons
    before 3.14 unwind such a thread, native code and all (https://github.com/python/cpython/issues/87135). So there
    the process ends without the interpreter's own end.
    """
    if exit_code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM (preemption, `ray job stop`) end the block as an exception does: what is open is closed in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

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
        RequestError: an unknown key or a bad value; the message names key, value and what is allowed.
        SystemExit: `--help` (code 0), or an unknown flag (code 2, from argparse).
    """
    flags = vars(_parser(name, config_class).parse_args(argv))
    config_path = flags.pop("config", None)
    prefix = f"BERTRAY_{name.upper()}_"
    values: dict[str, Any] = {}
    given_as: dict[str, str] = {}  # how each option was given, for messages
    for source, shown in (
        (_read_yaml(config_class, Path(config_path)) if config_path else {}, f"{config_path}: {{key}}"),
        (_read_environment(config_class, prefix), "{PREFIXED}"),
        (flags, "{flag}"),
    ):
        values |= source
        for key in source:
            given_as[key] = shown.format(key=key, PREFIXED=f"{prefix}{key.upper()}", flag=_flag(key))
    try:
        return config_class(**values)
    except ValidationError as error:
        raise RequestError(
            "\n       ".join(_explain(config_class, prefix, item, given_as) for item in error.errors())
        ) from error


def describe(config_class: type[JobConfig]) -> str:
    """What a job does, in one line."""
    return inspect.cleandoc(config_class.__doc__ or "").partition("\n")[0]


def _parser(name: str, config_class: type[JobConfig]) -> argparse.ArgumentParser:
    doc = inspect.cleandoc(config_class.__doc__ or "")
    parser = argparse.ArgumentParser(
        prog=f"bertray {name}",
        description=describe(config_class),
        epilog=doc.partition("\n")[2].strip("\n") + f"\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with any of the options below, as text_column: body"
    )
    for option, field in config_class.model_fields.items():
        _add_option(parser, option, field)
    return parser


def _add_option(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    description = (field.description or "").replace("%", "%%")
    if extra.get("positional"):
        parser.add_argument(name, nargs="*", metavar=name.rstrip("s").upper(), help=description)
        return
    if field.is_required():
        description += " (required)"
    elif field.default not in (None, "") and field.default_factory is None:
        description += f" (default: {str(field.default).replace('%', '%%')})"
    flag = _flag(name)
    if extra.get("hidden"):
        description = argparse.SUPPRESS
    if field.annotation is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=description)
    elif get_origin(field.annotation) is list and field.is_required():
        parser.add_argument(flag, nargs="+", metavar="PATH", help=description)
    else:
        parser.add_argument(flag, metavar=name.rsplit("_", 1)[-1].upper(), help=description)


class _Loader(yaml.SafeLoader):
    """Gives scalars as they are written, but null: to YAML 1.1 1:8 is 68, 007 is 7, and no is false."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_yaml(config_class: type[JobConfig], path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise RequestError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(f"--config {path} holds a {type(values).__name__}; write one 'option: value' a line")
    _refuse_unknown(config_class, {str(key): repr(str(key)) for key in values}, f"--config {path}: unknown key ")
    return values


def _read_environment(config_class: type[JobConfig], prefix: str) -> dict[str, Any]:
    given = {name: text for name, text in os.environ.items() if name.upper().startswith(prefix)}
    values = {name[len(prefix) :].lower(): text for name, text in given.items()}
    _refuse_unknown(config_class, dict(zip(values, given, strict=True)), "environment: unknown option ")
    return values


def _refuse_unknown(config_class: type[JobConfig], shown: dict[str, str], what: str) -> None:
    """Refuse names of options that there are not.

    Args:
        shown: how each name was written.
    """
    allowed = sorted(config_class.model_fields)
    for name, written in shown.items():
        if name not in allowed:
            raise RequestError(f"{what}{written}.{did_you_mean(name, allowed)} Allowed: {', '.join(allowed)}")


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A sentence that names what is close to a name, if anything is."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _explain(config_class: type[JobConfig], prefix: str, item: Any, given_as: dict[str, str]) -> str:
    """One line for one of pydantic's complaints: key, value, what is allowed."""
    if not item["loc"]:  # a check over several fields, which names them itself
        return str(item["msg"]).removeprefix("Value error, ")
    name = str(item["loc"][0])
    if item["type"] == "missing":
        return f"{_flag(name)} is required (or {prefix}{name.upper()}, or '{name}:' in the --config file)"
    message = str(item["msg"]).removeprefix("Value error, ")
    is_range = f"{name}s" in config_class.model_fields and any(mark in str(item["input"]) for mark in ",:")
    several = f". To search over several values, or a range: {_flag(name)}s" if is_range else ""
    return f"{given_as.get(name, _flag(name))}: {item['input']!r} is not allowed. {message}{several}"


def _refuse_relative_output(config: JobConfig) -> None:
    """Inside `ray job submit` the working folder is Ray's copy of the code, which is removed later."""
    output = getattr(config, "output", None)
    if (
        "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        and output
        and "://" not in output
        and not Path(output).is_absolute()
    ):
        raise RequestError(
            f"--output {output} is relative, and would lie in Ray's temporary copy of the code: give a URI or a path "
            "that starts with / on storage that every node can reach"
        )


def keep_ray_on_loopback() -> None:
    """Have a Ray of this machine's own listen on loopback alone; call before Ray is imported, which reads this then."""
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to what stderr is at the moment: a progress bar stands in for it while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _log_to_stderr() -> None:
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("bertray")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
