"""Find training rows whose labels are probably wrong: by models that were fine-tuned without the row they judge.

    python -m jobs.audit --data dataset --output label_check --encoder minilm
    python -m jobs.audit --data dataset --output label_check --encoder minilm --folds 10 --epochs 5 --learning-rate 2e-4
    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
        python -m jobs.audit --data s3://bucket/dataset --output s3://bucket/label_check --num-workers 5 --device cuda

Writes suspects.parquet, the worst first, and label_quality.json. Nothing is changed in the data set: look at the rows,
mend the labelled files, and run jobs.prepare again. Takes as long as --folds trainings.
"""

from collections.abc import Sequence

from bertray.cli import Outcome, leave, run_job
from bertray.reports.terminal import print_audit
from bertray.training.config import AuditConfig

_SUMMARY = ("num_rows", "num_rows_without_tokens", "num_suspects", "noise", "out_of_fold", "warnings", "wall_s")


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(AuditConfig, _run, argv, __doc__ or "")


def _run(config: AuditConfig) -> Outcome:
    from bertray.drivers.audit import audit  # torch and Ray take seconds to import; --help and bad options must not

    found = audit(config)
    print_audit(found.report, found.suspects)
    return Outcome({"output": config.output, **{key: found.report[key] for key in _SUMMARY}})


if __name__ == "__main__":
    leave(main())
