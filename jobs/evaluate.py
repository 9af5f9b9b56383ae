"""Measure a bundle on a split of a data set, beside TF-IDF + logistic regression fitted on the same training rows.

    python -m jobs.evaluate --bundle bundle --data dataset --output evaluation
    python -m jobs.evaluate --bundle s3://bucket/bundle --data s3://bucket/dataset --split validation --output eval
    python -m jobs.evaluate --bundle bundle --data dataset --output evaluation --oos-threshold 0.5

Writes metrics.json and predictions.parquet.
"""

from collections.abc import Sequence

from bertray.cli import Outcome, leave, run_job
from bertray.drivers.config import EvaluateConfig
from bertray.reports.terminal import print_evaluation

_OF_ONE_LABEL = ("accuracy", "precision_weighted", "recall_weighted", "f1_weighted", "f1_macro")
_OF_SEVERAL_LABELS = ("f1_micro", "f1_macro", "subset_accuracy")
_SUMMARY = ("num_rows", *_OF_ONE_LABEL, *_OF_SEVERAL_LABELS, "ece", "nll", "review", "out_of_scope", "baseline")
_ENGINE = ("engine", "precision", "accuracy_fp32", "accuracy_int8", "accuracy_drop_points")


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(EvaluateConfig, _run, argv, __doc__ or "")


def _run(config: EvaluateConfig) -> Outcome:
    from bertray.drivers.evaluate import evaluate

    metrics = evaluate(config)
    print_evaluation(metrics)
    return Outcome(
        {
            "output": config.output,
            **{key: metrics[key] for key in dict.fromkeys((*_SUMMARY, *_ENGINE, "wall_s")) if key in metrics},
        }
    )


if __name__ == "__main__":
    leave(main())
