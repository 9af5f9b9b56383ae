"""From trained weights to a bundle.

1. write      weights, tokenizer and a first bundle.json, in a local folder
2. measure    load this folder, and run the bundle over the validation rows as bertray score would: once, for all below
3. calibrate  fit a temperature to these logits, and divide the last layer's weights by it
4. decide     what else the task finds on these rows: thresholds, the score below which rows are reviewed
5. finish     weights, learning curves, event files, card, bundle.json; the folder appears in one step

Legend: N validation rows, C classes.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from bertray.bundle.bundle import Bundle, seal
from bertray.bundle.info import CURVES_FILE, EVENTS_FOLDER, BundleInfo
from bertray.bundle.predictions import predictions
from bertray.data.dataset import Dataset
from bertray.errors import RequestError, missing_extra
from bertray.metrics.profile import Profile
from bertray.model.adapter import change_unit, scale_logits
from bertray.model.pretrained import load_classifier, load_tokenizer
from bertray.model.runtime import resolve_device
from bertray.model.sources import hub_name
from bertray.schema import TEXT
from bertray.storage.location import Location
from bertray.storage.outputs import BUNDLE_FILE
from bertray.tasks.task import TASKS
from bertray.tokenization.tokenizer import TokenColumn
from bertray.training.checkpoints import Progress
from bertray.training.config import TrainConfig
from bertray.training.curves import learning_curves
from bertray.training.loss import validation_metrics
from bertray.training.tracking import NOT_SCORES
from bertray.types import Device

_log = logging.getLogger(__name__)


def write_bundle(
    config: TrainConfig,
    dataset: Dataset,
    data_fingerprint: str,
    output: Location,
    progress: Progress,
    weights: dict[str, torch.Tensor],
    event_files: Path | None = None,
    add_files: Callable[[Path], None] = lambda _: None,
    before_put: Callable[[], None] = lambda: None,
) -> BundleInfo:
    """Write the bundle of a finished run; the caller holds the lock.

    Args:
        data_fingerprint: of the data set when the run began.
        weights: of the best epoch, see `Checkpoints.load_best`.
        event_files: a folder of TensorBoard's event files.
        add_files: adds other files to the local folder before it is sealed.
        before_put: called when the bundle is complete; an error that it raises keeps it from being put.

    Raises:
        RequestError: the data set has changed during the run, or the model gives no number for any validation row.
    """
    if dataset.fingerprint() != data_fingerprint:
        raise RequestError(
            f"{dataset.location} was rewritten while the model was trained, and the bundle needs its validation "
            "rows: put the data set back and run the same command again, or start over with --restart"
        )
    rows = dataset.split("validation")
    if config.target_precision is None:  # a precision is promised for texts out of scope too, all else is about classes
        rows = dataset.in_scope(rows)
    targets = dataset.targets(rows)
    task = TASKS[dataset.problem_type]
    has_class_N = task.is_in_scope(rows)
    model = load_classifier(config.encoder, dataset.labels, dataset.problem_type, config.seed)
    model.load_state_dict(weights)
    if progress.unit != (0.0, 1.0):
        change_unit(model, *progress.unit)
    tokenizer, _ = load_tokenizer(config.encoder, config.max_length, config.overlap)
    encoder, commit = hub_name(config.encoder) or (config.encoder, None)
    kept = progress.history[progress.best_epoch - 1]
    facts: dict[str, Any] = {
        "labels": dataset.labels,
        "problem_type": dataset.problem_type,
        "max_length": config.max_length,
        "long_documents": config.long_documents,
        "stride": config.overlap,
        "encoder": encoder,
        "encoder_commit": commit,
        "data_fingerprint": data_fingerprint,
        "training": config.model_dump(),
        "metrics": {name: value for name, value in kept.items() if name not in NOT_SCORES},
        "history": progress.history,
        "oos_label": dataset.oos_label,
    }
    with tempfile.TemporaryDirectory(prefix="bertray-") as temporary:
        folder = Path(temporary) / "bundle"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # transformers 5 names classes that 4 does not know. With this one, both read tokenizer.json as it is.
        plain = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_bytes()) | plain, indent=2) + "\n", encoding="utf-8")
        first = seal(folder, **facts)
        tokens, logits_NC = _measured(str(folder), rows, config)
        is_read_N = np.isfinite(logits_NC).all(axis=1)
        fitted_N = is_read_N & has_class_N
        if not fitted_N.any():
            raise RequestError(
                f"the trained model gives a number for none of {has_class_N.sum()} validation rows of "
                f"{dataset.location}: start over with a lower --learning-rate (now {config.learning_rate:g}) and "
                "--restart"
            )
        temperature, calibration = task.calibrate(logits_NC[fitted_N], targets[fitted_N])
        if scale_logits(model, temperature):
            logits_NC /= temperature
        else:
            temperature, calibration = 1.0, {}
        trained = dataset.targets(dataset.in_scope(dataset.split("train")))
        decided = task.decide(logits_NC[is_read_N], targets[is_read_N], config, trained)
        predicted = predictions(tokens, logits_NC, first.model_copy(update=decided))
        facts["metrics"] |= validation_metrics(logits_NC[fitted_N], targets[fitted_N])

        model.save_pretrained(folder)
        try:
            curves = learning_curves(progress.records, progress.history, progress.best_epoch)
            (folder / CURVES_FILE).write_text(curves, encoding="utf-8")
        except ImportError as error:
            _log.info("the card has no learning curves: %s", missing_extra(f"drawing them ({error})", "plots"))
        if event_files:
            shutil.copytree(event_files, folder / EVENTS_FOLDER)
        add_files(folder)
        info = seal(
            folder,
            **facts,
            validation_profile=Profile.of(predicted.filter(pa.array(has_class_N))),
            temperature=temperature,
            calibration=calibration,
            **decided,
            target_precision=config.target_precision,
        )
        before_put()
        output.remove_unfinished()  # files of a killed run
        output.put_folder(folder, last=BUNDLE_FILE)
    return info


def _measured(uri: str, rows: pa.Table, config: TrainConfig) -> tuple[TokenColumn, np.ndarray]:
    """Tokens and logits_NC of the rows, from the bundle in the precision that it will have by default.

    Workers may have trained on GPUs that this process does not have: then this takes longer, on the CPU.
    """
    device: Device = "cpu" if config.device == "cpu" else "auto"
    bundle = Bundle.load(uri, device=device)
    where = "CPU" if resolve_device(device).type == "cpu" else "a GPU"
    _log.info("running the bundle over %d validation rows (%s, %s)", rows.num_rows, where, bundle.precision)
    return bundle.logits(rows[TEXT])
