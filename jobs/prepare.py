"""Clean labelled files, encode their labels and split them into train, validation and test.

    python -m jobs.prepare --input labelled.csv --output dataset
    python -m jobs.prepare --input 'chunks/*.jsonl.gz' --text-column body --label-column section --output dataset
    python -m jobs.prepare --input train.parquet --validation dev.parquet --test test.parquet --output s3://bucket/dataset
    python -m jobs.prepare --input emotions.csv --multi-label --label-separator '|' --output dataset
    python -m jobs.prepare --input intents.csv --test with_others.csv --oos-label oos --output dataset

Reads CSV, JSON Lines (also .gz and .zst) and Parquet. Writes train.parquet, validation.parquet, test.parquet,
labels.json and report.json, which counts every row: read = kept + taken out, by reason.
"""

from collections.abc import Sequence

from bertray.cli import Outcome, leave, run_job
from bertray.data.config import PrepareConfig
from bertray.reports.terminal import print_dataset


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(PrepareConfig, _run, argv, __doc__ or "")


def _run(config: PrepareConfig) -> Outcome:
    from bertray.data.prepare import prepare

    report = prepare(config)
    print_dataset(report)
    summary = {key: report[key] for key in ("num_rows_in", "num_rows_kept", "num_rows_out", "splits", "warnings")}
    return Outcome({"output": config.output, "num_labels": len(report["labels"]), **summary})


if __name__ == "__main__":
    leave(main())
