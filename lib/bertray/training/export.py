"""From trained weights to a bundle.

1. calibrate  a temperature from the validation rows, put into the last layer's weights
2. decide     thresholds of labels (several a row), and below which score a row is to be reviewed
3. write      weights, tokenizer, learning curves, event files, the card, bundle.json; then all of it in one step
"""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray.bundle.bundle import seal
from bertray.bundle.info import CURVES_FILE, EVENTS_FOLDER, BundleInfo
from bertray.bundle.predictions import predictions
from bertray.data.dataset import Dataset
from bertray.errors import RequestError, missing_extra
from bertray.metrics.calibration import calibrate, probabilities, threshold_for_precision, tune_thresholds
from bertray.metrics.profile import Profile
from bertray.model.adapter import scale_logits
from bertray.model.encoder import Encoder
from bertray.model.pretrained import load_classifier, load_tokenizer
from bertray.schema import LABEL, LABEL_ID, NO_CLASS, TEXT
from bertray.storage.location import Location
from bertray.storage.outputs import BUNDLE_FILE
from bertray.tokenization.tokenizer import ColumnTokenizer
from bertray.tokenization.windows import aggregate
from bertray.training.checkpoints import Best, Progress
from bertray.training.config import TrainConfig
from bertray.training.curves import learning_curves
from bertray.training.tracking import NOT_SCORES

_log = logging.getLogger(__name__)

# A score that no row reaches.
_EVERY_ROW = 2.0


def write_bundle(
    config: TrainConfig,
    dataset: Dataset,
    data_fingerprint: str,
    output: Location,
    progress: Progress,
    best: Best,
    event_files: Path | None = None,
    add_files: Callable[[Path], None] = lambda _: None,
) -> BundleInfo:
    """Write the bundle of a finished run, which holds the lock of its folder.

    Args:
        data_fingerprint: of the data set when the run began.
        event_files: a folder of TensorBoard's, to be kept with the bundle.
        add_files: called with the local folder before it is sealed, for other files that people read.

    Raises:
        RequestError: the data set is no longer what was trained on.
    """
    if dataset.fingerprint() != data_fingerprint:
        raise RequestError(
            f"{dataset.location} was written anew while the model was trained, and the bundle needs its validation "
            "rows: put the data set back and say the same command again, or begin anew with --restart"
        )
    validation = dataset.split("validation")
    rows = dataset.in_scope(validation)
    tokenizer, _ = load_tokenizer(config.encoder, config.max_length, config.overlap)
    column_tokenizer = ColumnTokenizer(tokenizer.backend_tokenizer, config.max_length, config.overlap)
    tokens = column_tokenizer.encode(rows[TEXT])
    logits_NC = np.full((rows.num_rows, len(dataset.labels)), np.nan, dtype=np.float32)
    logits_NC[: len(best.validation_logits_NC)] = best.validation_logits_NC
    is_read_N = np.isfinite(logits_NC).all(axis=1)
    targets = dataset.targets(rows)

    model = load_classifier(config.encoder, dataset.labels, dataset.problem_type, config.seed)
    model.load_state_dict(best.weights)
    temperature, calibration = calibrate(logits_NC[is_read_N], targets[is_read_N])
    if scale_logits(model, temperature):
        logits_NC /= temperature
    else:
        temperature, calibration = 1.0, {}

    probabilities_NC = probabilities(logits_NC, dataset.problem_type)
    thresholds = None
    if dataset.problem_type == "multi_label_classification":
        thresholds = tuple(tune_thresholds(probabilities_NC[is_read_N], targets[is_read_N]).tolist())
    review_below = None
    if config.target_precision is not None:
        others_NC = np.zeros((0, len(dataset.labels)), dtype=np.float32)
        if rows.num_rows < validation.num_rows:
            texts = validation.filter(pc.equal(validation[LABEL_ID], NO_CLASS))[TEXT]
            others_NC = probabilities(_logits(model, column_tokenizer, texts, config), dataset.problem_type)
        review_below = _review_below(
            np.concatenate([probabilities_NC[is_read_N], others_NC]),
            np.concatenate([targets[is_read_N], np.full((len(others_NC), *targets.shape[1:]), NO_CLASS)]),
            config.target_precision,
        )
    said = predictions(
        tokens, logits_NC, dataset.labels, dataset.problem_type, thresholds=thresholds, review_below=review_below
    )
    assert pc.count(said[LABEL]).as_py() == is_read_N.sum()

    metrics = progress.history[progress.best_epoch - 1]
    with tempfile.TemporaryDirectory(prefix="bertray-") as temporary:
        folder = Path(temporary) / "bundle"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        try:
            curves = learning_curves(progress.records, progress.history, progress.best_epoch)
            (folder / CURVES_FILE).write_text(curves, encoding="utf-8")
        except ImportError as error:
            _log.info("the card has no learning curves: %s", missing_extra(f"drawing them ({error})", "plots"))
        if event_files is not None and event_files.is_dir():
            shutil.copytree(event_files, folder / EVENTS_FOLDER)
        add_files(folder)
        info = seal(
            folder,
            labels=dataset.labels,
            problem_type=dataset.problem_type,
            max_length=config.max_length,
            long_documents=config.long_documents,
            stride=config.overlap,
            encoder=config.encoder,
            data_fingerprint=data_fingerprint,
            training=config.model_dump(),
            metrics={name: value for name, value in metrics.items() if name not in NOT_SCORES},
            history=progress.history,
            validation_profile=Profile.of(said),
            temperature=temperature,
            calibration=calibration,
            thresholds=thresholds,
            review_below=review_below,
            target_precision=config.target_precision,
            oos_label=dataset.oos_label,
        )
        output.remove_unfinished_copies()  # of a run that was killed here
        output.put_folder(folder, last=BUNDLE_FILE)
    return info


def _logits(model: Any, tokenizer: ColumnTokenizer, texts: pa.ChunkedArray, config: TrainConfig) -> np.ndarray:
    """logits_NC of texts that validation during training leaves out; of those that have tokens."""
    tokens = tokenizer.encode(texts)
    logits_SC = Encoder(copy.deepcopy(model), "fp32").logits(tokens)  # which changes the model
    logits_NC = aggregate(logits_SC, tokens.documents_S, len(texts), config.long_documents)
    found_NC: np.ndarray = logits_NC[np.isfinite(logits_NC).all(axis=1)]
    return found_NC


def _review_below(probabilities_NC: np.ndarray, targets: np.ndarray, target_precision: float) -> float:
    """The score from which on validation so many are right; above 1, which is every row, where no score is enough."""
    best_N = probabilities_NC.argmax(axis=1)
    is_right_N = targets == best_N if targets.ndim == 1 else targets[np.arange(len(best_N)), best_N] > 0
    scores_N = probabilities_NC[np.arange(len(best_N)), best_N]
    found = threshold_for_precision(scores_N, is_right_N, target_precision)
    return _EVERY_ROW if found is None else found
