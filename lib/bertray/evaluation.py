"""How good is a bundle on a split of a data set, and how much better than the simplest thing that works?

1. predict   the split's texts with the bundle, and with TF-IDF + logistic regression fitted on the training rows
2. compare   the same metrics for both
3. write     metrics.json and predictions.parquet (the split's columns, `predicted`, `score`, `baseline_predicted`)
"""

from __future__ import annotations

import io
import json
import logging
import time
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bertray import baseline
from bertray.bundle import Bundle
from bertray.config import EvaluateConfig
from bertray.dataset import Dataset
from bertray.errors import RequestError
from bertray.metrics import full_metrics, summary_metrics
from bertray.openvino_engine import open_bundle
from bertray.schema import LABEL, LABEL_ID, NUM_TOKENS, SCORE, TEXT, TRUNCATED
from bertray.storage import Location
from bertray.versions import versions

_log = logging.getLogger(__name__)

PREDICTED, BASELINE_PREDICTED = "predicted", "baseline_predicted"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, write both files, and return what metrics.json holds.

    Raises:
        RequestError: bundle or data set are missing, or do not have the same labels.
    """
    started_s = time.monotonic()
    output = Location.of(config.output)
    dataset = Dataset.open(config.data)
    bundle, engine = open_bundle(config.bundle, config.engine, config.precision)
    _check_labels(bundle, dataset)
    rows = dataset.split(config.split)
    train = dataset.split("train")

    _log.info("predicting %d rows in %s", rows.num_rows, bundle.encoder.precision)
    predictions = bundle.predict_column(rows[TEXT])
    labels = pa.array(dataset.labels)
    predicted_N = pc.index_in(predictions[LABEL], value_set=labels).to_numpy()
    _log.info("fitting the baseline on %d training rows", train.num_rows)
    baseline_N = baseline.predict_baseline(train, rows)

    true_N = rows[LABEL_ID].to_numpy()
    metrics = {
        **full_metrics(true_N, predicted_N, dataset.labels),
        "baseline": {"name": baseline.NAME, **summary_metrics(true_N, baseline_N, len(dataset.labels))},
        "split": config.split,
        **engine,
        "precision": bundle.encoder.precision,
        "bundle": str(Location.of(config.bundle)),
        "bundle_fingerprint": bundle.info.fingerprint(),
        "data": str(dataset.location),
        "same_data_as_training": bundle.info.data_fingerprint == dataset.fingerprint(),
        "config": config.model_dump(),
        "versions": versions(),
        "wall_s": round(time.monotonic() - started_s, 1),
    }
    if not metrics["same_data_as_training"]:
        _log.warning("warning: the bundle was trained on another data set; its training rows may stand in this split")
    table = (
        rows.append_column(PREDICTED, predictions[LABEL])
        .append_column(SCORE, predictions[SCORE])
        .append_column(NUM_TOKENS, predictions[NUM_TOKENS])
        .append_column(TRUNCATED, predictions[TRUNCATED])
        .append_column(BASELINE_PREDICTED, labels.take(pa.array(baseline_N)))
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    (output / "predictions.parquet").put(buffer.getvalue())
    (output / "metrics.json").put((json.dumps(metrics, indent=2, ensure_ascii=False) + "\n").encode())
    return metrics


def _check_labels(bundle: Bundle, dataset: Dataset) -> None:
    if bundle.info.labels == dataset.labels:
        return
    missing = sorted(set(bundle.info.labels) ^ set(dataset.labels))
    raise RequestError(
        f"bundle and data set have different labels ({', '.join(missing)} stand in one alone): evaluate the bundle on "
        f"a data set prepared with its labels: {', '.join(bundle.info.labels)}"
    )
