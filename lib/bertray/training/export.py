"""From weights to a bundle: trained here, or by others, and then adopted.

1. write      weights, tokenizer and a first bundle.json, in a local folder
              adopted: and see that this bundle gives the logits that transformers gives
2. measure    load this folder, and run the bundle over the validation rows as bertray score would: once, for all below
3. calibrate  fit a temperature to these logits, and divide the last layer's weights by it
4. decide     what else the task finds on these rows: thresholds, the score below which rows are reviewed
5. finish     weights, event file, bundle.json, page, card; the folder appears in one step

An adopted model without a data set skips steps 2 to 4.

Legend: N validation rows, C classes.
"""

from __future__ import annotations

import inspect
import json
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from bertray.bundle.bundle import Bundle, seal
from bertray.bundle.card import model_card
from bertray.bundle.info import CARD_FILE, EVENTS_FOLDER, BundleInfo
from bertray.bundle.predictions import predictions
from bertray.data.dataset import Dataset
from bertray.errors import RequestError
from bertray.metrics.profile import Profile
from bertray.model.adapter import change_unit, disagreement, scale_logits
from bertray.model.pretrained import load_classifier, load_finished, load_tokenizer, reorder
from bertray.model.runtime import resolve_device
from bertray.model.sources import hub_name, lasting
from bertray.schema import TEXT
from bertray.storage.location import Location
from bertray.storage.outputs import BUNDLE_FILE
from bertray.tasks.task import TASKS
from bertray.training.checkpoints import Progress
from bertray.training.config import AdoptConfig, TrainConfig
from bertray.training.loss import validation_metrics
from bertray.training.tracking import NOT_SCORES, write_event_file
from bertray.types import Device, ProblemType

_log = logging.getLogger(__name__)

# What an adopted model must answer as transformers does: short texts and one of some hundred tokens, several scripts,
# white space, signs.
_TRIED = ("Python, SQL", "  two  lines\n 12,5 % ", "東京 – Zürich: Ąę 🙂", " ".join(map(str, range(900))))


def write_bundle(
    config: TrainConfig,
    dataset: Dataset,
    data_fingerprint: str,
    output: Location,
    progress: Progress,
    weights: dict[str, torch.Tensor],
    add_files: Callable[[Path], None] = lambda _: None,
    before_put: Callable[[Path], None] = lambda _: None,
) -> BundleInfo:
    """Write the bundle of a finished run; the caller holds the lock.

    Args:
        data_fingerprint: of the data set when the run began.
        weights: of the best epoch, see `Checkpoints.load_best`.
        add_files: adds other files to the local folder before it is sealed.
        before_put: called with the local folder when the bundle is complete; it may add files for people. An error
            that it raises keeps the bundle from being put.

    Raises:
        RequestError: the data set has changed during the run, or the model gives no number for any validation row.
    """
    if dataset.fingerprint() != data_fingerprint:
        raise RequestError(
            f"{dataset.location} was rewritten while the model was trained, and the bundle needs its validation "
            "rows: put the data set back and run the same command again, or start over with --restart"
        )
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

    def add_more(folder: Path) -> None:
        write_event_file(folder / EVENTS_FOLDER, config, progress.records, progress.history)
        add_files(folder)

    advice = f"start over with a lower --learning-rate (now {config.learning_rate:g}) and --restart"
    measure = partial(_measure, dataset, config, advice, "cpu" if config.device == "cpu" else "auto")
    return _written(model, tokenizer, facts, measure, output, before_put, add_more=add_more)


def write_adopted(
    config: AdoptConfig,
    names: tuple[str, ...],
    problem_type: ProblemType,
    dataset: Dataset | None,
    output: Location,
    before_put: Callable[[Path], None],
) -> BundleInfo:
    """Write the bundle of a classifier that others have fine-tuned; the caller holds the lock.

    Args:
        names, problem_type: see `model.outputs.outputs_of`.
        dataset: it is measured on its validation rows, and its labels are in its order; None: neither.
        before_put: as of `write_bundle`.

    Raises:
        RequestError: tokenizer or model cannot be loaded, bertray does not give the logits that transformers gives, or
            the model gives no number for any validation row.
    """
    source = lasting(config.model)
    tokenizer, _ = load_tokenizer(source, config.max_length, option="--model")
    if tokenizer.truncation_side != "right":
        raise RequestError(
            f"--model {config.model}: its tokenizer cuts texts on the left, and bertray reads their beginnings. If "
            'that will do, write "truncation_side": "right" into tokenizer_config.json, in a copy'
        )
    model = load_finished(source, names, problem_type)
    labels = dataset.labels if dataset and TASKS[problem_type].outputs is None else names
    try:
        logits_NC = _plain_logits(model, tokenizer)
    except Exception as error:  # such as a model that wants pictures beside text
        raise RequestError(f"--model {config.model}: transformers cannot run it on a text: {error}") from error
    look = partial(_check_logits, config.model, logits_NC[:, reorder(model, labels)])
    if labels != names:
        _log.info("the outputs are put in the order of the data set's labels: %s", ", ".join(labels))
    encoder, commit = hub_name(source) or (source, None)
    facts: dict[str, Any] = {
        "origin": "adopted",
        "labels": labels,
        "problem_type": problem_type,
        "max_length": tokenizer.model_max_length,
        "encoder": encoder,
        "encoder_commit": commit,
        "training": config.model_dump() | {"model": source},
        "metrics": {},
    }
    measure = None
    if dataset:
        facts["training"]["data"] = str(dataset.location)
        facts |= {"data_fingerprint": dataset.fingerprint(), "oos_label": dataset.oos_label}
        measure = partial(_measure, dataset, config, "are its weights numbers?", "auto")
    return _written(model, tokenizer, facts, measure, output, before_put, look=look)


def _written(
    model: Any,
    tokenizer: Any,
    facts: dict[str, Any],
    measure: Callable[[Path, Any], dict[str, Any]] | None,
    output: Location,
    before_put: Callable[[Path], None],
    *,
    look: Callable[[Path], None] = lambda _: None,
    add_more: Callable[[Path], None] = lambda _: None,
) -> BundleInfo:
    """Steps 1 to 5. `look` sees the folder after step 1, `add_more` adds files to it in step 5."""
    with tempfile.TemporaryDirectory(prefix="bertray-") as temporary:
        folder = Path(temporary) / "bundle"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # transformers 5 names classes that 4 does not know. With this one, both read tokenizer.json as it is.
        plain = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_bytes()) | plain, indent=2) + "\n", encoding="utf-8")
        seal(folder, **facts)
        look(folder)
        if measure:
            found = measure(folder, model)
            facts |= {**found, "metrics": facts["metrics"] | found["metrics"]}
            model.save_pretrained(folder)
        add_more(folder)
        info = seal(folder, **facts)
        before_put(folder)
        (folder / CARD_FILE).write_text(model_card(info, folder), encoding="utf-8")  # it names what was added
        output.remove_unfinished()  # files of a killed run
        output.put_folder(folder, last=BUNDLE_FILE)
    return info


def _measure(
    dataset: Dataset, wishes: TrainConfig | AdoptConfig, advice: str, device: Device, folder: Path, model: Any
) -> dict[str, Any]:
    """Facts of a bundle from validation rows; the model's logits are divided by the temperature.

    The bundle is run in the precision that it will have by default. Workers may have trained on GPUs that this process
    does not have: then this takes longer, on the CPU.

    Args:
        advice: what to do if the model gives no number for any row.
    """
    rows = dataset.split("validation")
    # A precision is promised for texts out of scope too, all else is about classes.
    if wishes.target_precision is None:
        rows = dataset.in_scope(rows)
    targets, task = dataset.targets(rows), TASKS[dataset.problem_type]
    has_class_N = task.is_in_scope(rows)
    bundle = Bundle.load(str(folder), device=device)
    where = "CPU" if resolve_device(device).type == "cpu" else "a GPU"
    _log.info("running the bundle over %d validation rows (%s, %s)", rows.num_rows, where, bundle.precision)
    tokens, logits_NC = bundle.logits(rows[TEXT])
    is_read_N = np.isfinite(logits_NC).all(axis=1)
    fitted_N = is_read_N & has_class_N
    if not fitted_N.any():
        raise RequestError(
            f"the model gives a number for none of {has_class_N.sum()} validation rows of {dataset.location}: {advice}"
        )
    temperature, calibration = task.calibrate(logits_NC[fitted_N], targets[fitted_N])
    if scale_logits(model, temperature):
        logits_NC /= temperature
    else:
        temperature, calibration = 1.0, {}
    decided = task.decide(
        logits_NC[is_read_N], targets[is_read_N], wishes, lambda: dataset.targets(dataset.split("train"))
    )
    predicted = predictions(tokens, logits_NC, bundle.info.model_copy(update=decided))
    return {
        "metrics": validation_metrics(logits_NC[fitted_N], targets[fitted_N]),
        "validation_profile": Profile.of(predicted.filter(pa.array(has_class_N))),
        "temperature": temperature,
        "calibration": calibration,
        **decided,
        "target_precision": wishes.target_precision,
    }


@torch.inference_mode()
def _plain_logits(model: Any, tokenizer: Any) -> np.ndarray:
    """logits_NC (float32) of `_TRIED`, each alone and without padding, as transformers' pipeline computes them."""
    known = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in known]
    inputs = [tokenizer(text, truncation=True, return_tensors="pt") for text in _TRIED]
    logits_NC: np.ndarray = torch.cat([model(**one).logits for one in inputs]).float().numpy()
    return logits_NC


def _check_logits(name: str, expected_NC: np.ndarray, folder: Path) -> None:
    """Refuse a model that bertray would run otherwise than transformers does."""

    def found_NC() -> torch.Tensor:
        return torch.from_numpy(Bundle.load(str(folder), "fp32", "cpu").logits(pa.array(_TRIED))[1])

    if why := disagreement(torch.from_numpy(expected_NC), found_NC):
        raise RequestError(
            f"--model {name} cannot be adopted: in batches, padded on the right and cut at the end, it does not give "
            f"what it gives for each text alone ({why}). If config.json has no pad_token_id, add the tokenizer's"
        )
