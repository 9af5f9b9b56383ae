"""bertray prepare: `data.prepare` does the work; this module prints its report."""

from bertray.cli import JobResult
from bertray.data.config import PrepareConfig
from bertray.data.prepare import prepare
from bertray.reports.terminal import print_dataset

_SUMMARY = ("num_rows_in", "num_rows_kept", "num_rows_out", "splits", "warnings")


def run(config: PrepareConfig) -> JobResult:
    """The job of the command line."""
    prepared = prepare(config)
    print_dataset(prepared.report)
    summary = {key: prepared.report[key] for key in _SUMMARY}
    return JobResult({"output": config.output, "num_labels": len(prepared.labels), **summary})
