"""The training loss and the validation metrics: cross-entropy, or binary cross-entropy of each of several labels.

A row's loss is the weighted mean of its sequences' losses; with class weights, a class weighs inversely to its rows.

Legend: S sequences, B sequences of a batch, N rows, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from bertray.metrics.classification import multi_label_metrics, summary_metrics
from bertray.model.runtime import put
from bertray.tokenization.windows import training_weights
from bertray.training.config import TrainingOptions
from bertray.training.token_files import TrainingRows
from bertray.types import ProblemType

# Without a limit, one row of a class among ten thousand others would weigh as much as all of these.
_MAX_POSITIVE_WEIGHT = 10.0


class Objective:
    """The loss on sequences of the training split, as these options define it:

    label_smoothing: share of the probability that is spread over all classes (of each of several labels: over yes and
        no); Szegedy et al. 2016, https://arxiv.org/abs/1512.00567.
    class_weights: with "balanced", rows of a class weigh N / (C * rows of the class), as in scikit-learn. With several
        labels a row, a label's yes weighs as much as all its noes together, but at most 10 times one.
    """

    def __init__(
        self,
        rows: TrainingRows,
        num_classes: int,
        problem_type: ProblemType,
        device: torch.device,
        options: TrainingOptions,
    ) -> None:
        self._rows, self._num_classes, self._device = rows, num_classes, device
        self._smoothing = options.label_smoothing
        is_multi_label = problem_type == "multi_label_classification"
        every = np.arange(len(rows.tokens.documents_S))
        weights_S = training_weights(rows.tokens.documents_S)
        self._positive_weights_C: torch.Tensor | None = None
        if options.class_weights == "balanced":
            counts_C = np.maximum(rows.class_counts_C(num_classes), 1)
            num_rows = len(rows.firsts)
            if is_multi_label:
                ratios_C = np.clip((num_rows - counts_C) / counts_C, 1.0, _MAX_POSITIVE_WEIGHT)
                self._positive_weights_C = torch.from_numpy(ratios_C.astype(np.float32)).to(device)
            else:
                weights_S = weights_S * (num_rows / (num_classes * counts_C))[rows.label_ids(every)]
                weights_S = (weights_S / weights_S.mean()).astype(np.float32)
        # On the device from the start, so that a step copies only the numbers of its rows.
        self._weights_S = put(weights_S, device)
        self._label_ids_S = None if is_multi_label else put(rows.label_ids(every), device)

    def best_constant_logits_C(self) -> torch.Tensor:
        """With several labels a row, the logits of least loss if all texts got the same (float32, on the CPU).

        Training that starts there (Lin et al. 2017, https://arxiv.org/abs/1708.02002, 3.3) need not push all logits
        down first. That makes the states of all texts alike, and with rare labels training hardly recovers from it.
        """
        shares_C = (self._rows.class_counts_C(self._num_classes) + 0.5) / (len(self._rows.firsts) + 1)
        shares_C = shares_C * (1 - self._smoothing) + self._smoothing / 2
        logits_C = torch.from_numpy(np.log(shares_C / (1 - shares_C)).astype(np.float32))
        return logits_C if self._positive_weights_C is None else logits_C + self._positive_weights_C.cpu().log()

    def loss_sum(self, logits_BC: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """The weighted sum of the sequences' losses; its mean over the split counts each row once."""
        rows_B = put(rows, self._device)
        if self._label_ids_S is None:
            targets_BC = put(self._rows.multi_hot(rows, self._num_classes), self._device)
            targets_BC = targets_BC * (1 - self._smoothing) + self._smoothing / 2
            losses_B = binary_cross_entropy_with_logits(
                logits_BC, targets_BC, pos_weight=self._positive_weights_C, reduction="none"
            ).mean(dim=1)
        else:
            targets_B = self._label_ids_S[rows_B]
            losses_B = cross_entropy(logits_BC, targets_B, reduction="none", label_smoothing=self._smoothing)
        return (self._weights_S[rows_B] * losses_B).sum()


def validation_metrics(logits_NC: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Metrics of rows that have logits, and the loss without weights and smoothing.

    Args:
        targets: label ids (int64 [N]); with several labels a row multi-hot (float32 [N, C]), and a row is given the
            labels whose probability reaches 0.5.
    """
    logits, num_classes = torch.from_numpy(logits_NC).double(), logits_NC.shape[1]
    if targets.ndim == 2:
        loss = binary_cross_entropy_with_logits(logits, torch.from_numpy(targets).double())
        names = tuple(map(str, range(num_classes)))
        found = multi_label_metrics(targets, (logits_NC >= 0).astype(np.float32), names)
        return {"loss": loss.item(), **{name: found[name] for name in ("subset_accuracy", "f1_micro", "f1_macro")}}
    loss = cross_entropy(logits, torch.from_numpy(targets))
    return {"loss": loss.item(), **summary_metrics(targets, logits_NC.argmax(axis=1), num_classes)}
