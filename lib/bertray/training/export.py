"""From trained weights to a bundle.

1. calibrate  fit a temperature on the validation rows, and divide the last layer's weights by it
2. decide     choose the labels' thresholds (several labels a row), and the score below which rows are reviewed
3. write      weights, tokenizer, learning curves, event files, card, bundle.json; the folder appears in one step
"""

from __future__ import annotations

import copy
import json
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
from bertray.model.sources import hub_name
from bertray.schema import LABEL_ID, NO_CLASS, TEXT
from bertray.storage.location import Location
from bertray.storage.outputs import BUNDLE_FILE
from bertray.tokenization.tokenizer import ColumnTokenizer
from bertray.tokenization.windows import aggregate
from bertray.training.checkpoints import Best, Progress
from bertray.training.config import TrainConfig
from bertray.training.curves import learning_curves
from bertray.training.tracking import NOT_SCORES

_log = logging.getLogger(__name__)


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
    """Write the bundle of a finished run; the caller holds the lock.

    Args:
        data_fingerprint: of the data set when the run began.
        event_files: a folder of TensorBoard's event files.
        add_files: adds other files to the local folder before it is sealed.

    Raises:
        RequestError: the data set has changed during the run.
    """
    if dataset.fingerprint() != data_fingerprint:
        raise RequestError(
            f"{dataset.location} was rewritten while the model was trained, and the bundle needs its validation "
            "rows: put the data set back and run the same command again, or start over with --restart"
        )
    validation = dataset.split("validation")
    rows = dataset.in_scope(validation)
    tokenizer, _ = load_tokenizer(config.encoder, config.max_length, config.overlap)
    column_tokenizer = ColumnTokenizer(tokenizer.backend_tokenizer, config.max_length, config.overlap)
    num_missing = rows.num_rows - len(best.validation_logits_NC)
    logits_NC = np.pad(best.validation_logits_NC, ((0, num_missing), (0, 0)), constant_values=np.nan)
    is_read_N = np.isfinite(logits_NC).all(axis=1)
    targets = dataset.targets(rows)[is_read_N]

    model = load_classifier(config.encoder, dataset.labels, dataset.problem_type, config.seed)
    model.load_state_dict(best.weights)
    encoder, commit = hub_name(config.encoder) or (config.encoder, None)
    temperature, calibration = calibrate(logits_NC[is_read_N], targets)
    if scale_logits(model, temperature):
        logits_NC /= temperature
    else:
        temperature, calibration = 1.0, {}

    probabilities_NC = probabilities(logits_NC[is_read_N], dataset.problem_type)
    decided: dict[str, Any] = {"thresholds": None, "review_below": None}
    if dataset.problem_type == "multi_label_classification":
        decided["thresholds"] = tuple(tune_thresholds(probabilities_NC, targets).tolist())
    if config.target_precision is not None:
        best_N = probabilities_NC.argmax(axis=1)
        is_right_N = targets == best_N if targets.ndim == 1 else targets[np.arange(len(best_N)), best_N] > 0
        if rows.num_rows < validation.num_rows:
            texts = validation.filter(pc.equal(validation[LABEL_ID], NO_CLASS))[TEXT]
            others_NC = _probabilities(model, column_tokenizer, texts, config)
            probabilities_NC = np.concatenate([probabilities_NC, others_NC])
            is_right_N = np.append(is_right_N, np.zeros(len(others_NC), dtype=bool))
        found = threshold_for_precision(probabilities_NC.max(axis=1), is_right_N, config.target_precision)
        decided["review_below"] = 2.0 if found is None else found  # 2.0: every row is reviewed
    tokens = column_tokenizer.encode(rows[TEXT])
    predicted = predictions(tokens, logits_NC, dataset.labels, dataset.problem_type, **decided)

    with tempfile.TemporaryDirectory(prefix="bertray-") as temporary:
        folder = Path(temporary) / "bundle"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # transformers 5 names classes that 4 does not know. With this one, both read tokenizer.json as it is.
        plain = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_bytes()) | plain, indent=2) + "\n", encoding="utf-8")
        try:
            curves = learning_curves(progress.records, progress.history, progress.best_epoch)
            (folder / CURVES_FILE).write_text(curves, encoding="utf-8")
        except ImportError as error:
            _log.info("the card has no learning curves: %s", missing_extra(f"drawing them ({error})", "plots"))
        if event_files:
            shutil.copytree(event_files, folder / EVENTS_FOLDER)
        add_files(folder)
        metrics = progress.history[progress.best_epoch - 1]
        info = seal(
            folder,
            labels=dataset.labels,
            problem_type=dataset.problem_type,
            max_length=config.max_length,
            long_documents=config.long_documents,
            stride=config.overlap,
            encoder=encoder,
            encoder_commit=commit,
            data_fingerprint=data_fingerprint,
            training=config.model_dump(),
            metrics={name: value for name, value in metrics.items() if name not in NOT_SCORES},
            history=progress.history,
            validation_profile=Profile.of(predicted),
            temperature=temperature,
            calibration=calibration,
            **decided,
            target_precision=config.target_precision,
            oos_label=dataset.oos_label,
        )
        output.remove_unfinished()  # files of a killed run
        output.put_folder(folder, last=BUNDLE_FILE)
    return info


def _probabilities(model: Any, tokenizer: ColumnTokenizer, texts: pa.ChunkedArray, config: TrainConfig) -> np.ndarray:
    """probabilities_NC of the texts that have tokens, with one label a row."""
    tokens = tokenizer.encode(texts)
    logits_SC = Encoder(copy.deepcopy(model), "fp32").logits(tokens)  # Encoder changes its model
    logits_NC = aggregate(logits_SC, tokens.documents_S, len(texts), config.long_documents)
    return probabilities(logits_NC[np.unique(tokens.documents_S)], "single_label_classification")
