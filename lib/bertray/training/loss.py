"""The training losses by problem type, and the validation metrics.

A row's loss is the weighted mean of its sequences' losses.

Legend: S sequences, B sequences of a batch, N rows, C classes.
"""

from __future__ import annotations

import logging
import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, huber_loss, mse_loss

from bertray.model.adapter import begin_with_logits, change_unit, last_layer, redraw
from bertray.model.runtime import put
from bertray.tasks.task import task_of_targets
from bertray.tokenization.windows import training_weights
from bertray.training.config import TrainingOptions
from bertray.training.token_files import TrainingRows
from bertray.types import ProblemType

_log = logging.getLogger(__name__)

# Between the values of a head's own data and those it goes on with.
_MAX_DEVIATIONS = 10.0
# Without a limit, one row of a class among ten thousand others would weigh as much as all of these.
_MAX_POSITIVE_WEIGHT = 10.0


class Objective:
    """The loss on sequences of the training split, as these options define it:

    label_smoothing: share of the probability that is spread over all classes (of each of several labels: over yes and
        no); Szegedy et al. 2016, https://arxiv.org/abs/1512.00567.
    class_weights: with "balanced", rows of a class weigh N / (C * rows of the class), as in scikit-learn.

    huber: of numbers; errors beyond one standard deviation count by their size, not by its square; Huber 1964,
        https://doi.org/10.1214/aoms/1177703732.

    Here cross-entropy; a problem type with another loss has a class of its own in `LOSSES`.
    """

    def __init__(self, rows: TrainingRows, num_classes: int, device: torch.device, options: TrainingOptions) -> None:
        self._rows, self._num_classes, self._device = rows, num_classes, device
        self._smoothing, self._is_huber = options.label_smoothing, options.huber
        weights_S = training_weights(rows.tokens.documents_S)
        if options.class_weights == "balanced":
            weights_S = self._balanced(weights_S, np.maximum(rows.class_counts_C(num_classes), 1))
        # On the device from the start, so that a step copies only the numbers of its rows.
        self._weights_S = put(weights_S, device)

    @cached_property
    def _label_ids_S(self) -> torch.Tensor:
        return put(self._rows.label_ids(np.arange(len(self._weights_S))), self._device)

    def _balanced(self, weights_S: np.ndarray, counts_C: np.ndarray) -> np.ndarray:
        """Have rare classes weigh more; returns the sequences' weights."""
        weights_C = len(self._rows.firsts) / (self._num_classes * counts_C)
        weights_S = weights_S * weights_C[self._rows.label_ids(np.arange(len(weights_S)))]
        return np.asarray(weights_S / weights_S.mean(), dtype=np.float32)

    @cached_property
    def unit(self) -> tuple[float, float]:
        """Mean and standard deviation of what one unit of the model's outputs stands for."""
        return 0.0, 1.0

    def begin(self, model: Any) -> None:
        """Have a new head begin where training is short."""

    def loss_sum(self, logits_BC: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """The weighted sum of the sequences' losses; its mean over the split counts each row once."""
        rows_B = put(rows, self._device)
        return (self._weights_S[rows_B] * self._losses(logits_BC, rows, rows_B)).sum()

    def _losses(self, logits_BC: torch.Tensor, rows: np.ndarray, rows_B: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits_BC, self._label_ids_S[rows_B], reduction="none", label_smoothing=self._smoothing)

    def targets(self, rows: TrainingRows, chosen: np.ndarray) -> np.ndarray:
        """What some sequences of any split should get, as from `Dataset.targets`."""
        return rows.label_ids(chosen)

    @staticmethod
    def mean(logits_NC: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss over rows, without weights and smoothing; logits are float64."""
        return cross_entropy(logits_NC, targets)


class _SeveralLabels(Objective):
    """Binary cross-entropy; balanced, a label's yes weighs as much as all its noes, but at most 10 times one."""

    _positive_weights_C: torch.Tensor | None = None

    def _balanced(self, weights_S: np.ndarray, counts_C: np.ndarray) -> np.ndarray:
        ratios_C = np.clip((len(self._rows.firsts) - counts_C) / counts_C, 1.0, _MAX_POSITIVE_WEIGHT)
        self._positive_weights_C = torch.from_numpy(ratios_C.astype(np.float32)).to(self._device)
        return weights_S

    def begin(self, model: Any) -> None:
        """Begin with the logits of least loss if all texts got the same.

        Training that starts there (Lin et al. 2017, https://arxiv.org/abs/1708.02002, 3.3) need not push all logits
        down first. That makes the states of all texts alike, and with rare labels training hardly recovers from it.
        """
        shares_C = (self._rows.class_counts_C(self._num_classes) + 0.5) / (len(self._rows.firsts) + 1)
        shares_C = shares_C * (1 - self._smoothing) + self._smoothing / 2
        logits_C = torch.from_numpy(np.log(shares_C / (1 - shares_C)).astype(np.float32))
        if self._positive_weights_C is not None:
            logits_C += self._positive_weights_C.cpu().log()
        begin_with_logits(model, logits_C)

    def _losses(self, logits_BC: torch.Tensor, rows: np.ndarray, rows_B: torch.Tensor) -> torch.Tensor:
        targets_BC = put(self.targets(self._rows, rows), self._device) * (1 - self._smoothing) + self._smoothing / 2
        return binary_cross_entropy_with_logits(
            logits_BC, targets_BC, pos_weight=self._positive_weights_C, reduction="none"
        ).mean(dim=1)

    def targets(self, rows: TrainingRows, chosen: np.ndarray) -> np.ndarray:
        return rows.multi_hot(chosen, self._num_classes)

    @staticmethod
    def mean(logits_NC: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return binary_cross_entropy_with_logits(logits_NC, targets.double())


class _Numbers(Objective):
    """Squared error, or Huber's, of numbers in standard deviations from the mean of the training rows."""

    @cached_property
    def unit(self) -> tuple[float, float]:
        values_N = self._rows.values(self._rows.firsts)
        return float(values_N.mean()), float(values_N.std()) or 1.0

    @cached_property
    def _targets_S(self) -> torch.Tensor:
        mean, deviation = self.unit
        values_S = self._rows.values(np.arange(len(self._weights_S)))
        return put(((values_S - mean) / deviation).astype(np.float32), self._device)

    def begin(self, model: Any) -> None:
        """A trained head, whose bias is not zero, goes on; its outputs are in the user's unit.

        Unless it answers with numbers of another size: then it is of other data, and drawn anew.
        """
        (mean, deviation), head, became = self.unit, last_layer(model), "kept"
        answer = math.nan if head is None or head.bias is None else head.bias.item()
        if answer == 0:
            return
        if head is not None and abs(answer - mean) > _MAX_DEVIATIONS * deviation:
            redraw(head, model.config)
            became = "new"
        else:
            change_unit(model, -mean / deviation, 1 / deviation)
        _log.info("the head is %s: its numbers are about %g, those of the data set about %g", became, answer, mean)

    def _losses(self, logits_BC: torch.Tensor, rows: np.ndarray, rows_B: torch.Tensor) -> torch.Tensor:
        loss = huber_loss if self._is_huber else mse_loss
        return loss(logits_BC[:, 0], self._targets_S[rows_B], reduction="none")

    def targets(self, rows: TrainingRows, chosen: np.ndarray) -> np.ndarray:
        return rows.values(chosen)

    @staticmethod
    def mean(logits_NC: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The squared error, as a share of the targets' variance, so that it can stand beside that of training."""
        return mse_loss(logits_NC[:, 0], targets) / (targets.var(correction=0) or 1.0)


LOSSES: dict[ProblemType, type[Objective]] = {
    "single_label_classification": Objective,
    "multi_label_classification": _SeveralLabels,
    "regression": _Numbers,
}


def validation_metrics(logits_NC: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Metrics of rows that have logits, and the loss without weights and smoothing.

    Args:
        targets: as from `Dataset.targets`, of rows that have an answer.
    """
    task = task_of_targets(targets)
    loss = LOSSES[task.problem_type].mean(torch.from_numpy(logits_NC).double(), torch.from_numpy(targets))
    return {"loss": loss.item(), **task.summary(task.decided(logits_NC), targets, logits_NC.shape[1])}
