"""What training minimises, and how well: cross-entropy of one label, or of each of several labels; metrics of both.

A row's loss is its sequences' weighted mean; a class's weight, where classes are weighted, is inverse to its rows.

Legend: S sequences, B sequences of a batch, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from bertray.metrics.classification import multi_label_metrics, summary_metrics
from bertray.model.runtime import put
from bertray.training.token_files import TrainingRows
from bertray.types import ClassWeights, ProblemType

# A class of one row among ten thousand would weigh as much as ten thousand rows, and training would follow that row.
_MAX_POSITIVE_WEIGHT = 10.0


class Objective:
    """The loss of a split's sequences.

    Args:
        rows: the training split.
        label_smoothing: share of the probability that is spread over all classes (of each label: over yes and no);
            Szegedy et al. 2016, https://arxiv.org/abs/1512.00567.
        class_weights: balanced: rows of a class count N / (C * rows of it), scikit-learn's rule; of several labels, a
            label's yes counts as its noes do together, but 10 times at most.
        is_sampled: sequences are drawn with `sampling_probabilities`, in which a document of several counts once.
    """

    def __init__(
        self,
        rows: TrainingRows,
        num_classes: int,
        problem_type: ProblemType,
        device: torch.device,
        *,
        label_smoothing: float = 0.0,
        class_weights: ClassWeights = "none",
        is_sampled: bool = False,
    ) -> None:
        self._rows, self._num_classes, self._device = rows, num_classes, device
        self._is_multi_label = problem_type == "multi_label_classification"
        self._smoothing = label_smoothing
        every = np.arange(len(rows.tokens.documents_S))
        weights_S = np.ones(len(every), np.float32) if is_sampled else rows.document_weights_S()
        self._positive_weights_C: torch.Tensor | None = None
        if class_weights == "balanced":
            counts_C = np.maximum(rows.class_counts_C(num_classes), 1)
            num_rows = len(rows.firsts)
            if self._is_multi_label:
                ratios_C = np.clip((num_rows - counts_C) / counts_C, 1.0, _MAX_POSITIVE_WEIGHT)
                self._positive_weights_C = torch.from_numpy(ratios_C.astype(np.float32)).to(device)
            else:
                weights_S = weights_S * (num_rows / (num_classes * counts_C))[rows.label_ids(every)]
                weights_S = (weights_S / weights_S.mean()).astype(np.float32)
        # On the device from the beginning, so that a step copies the numbers of its rows there, and no more.
        self._weights_S = put(weights_S, device)
        self._label_ids_S = None if self._is_multi_label else put(rows.label_ids(every), device)

    def logits_of_any_text_C(self) -> torch.Tensor:
        """Of several labels a row, the logits that lose least where all texts get the same (float32, on the CPU).

        Training that begins there (Lin et al. 2017, https://arxiv.org/abs/1708.02002, 3.3) need not push all logits
        down at first, by which the states of all texts become alike: with rare labels it hardly recovers from that.
        """
        shares_C = (self._rows.class_counts_C(self._num_classes) + 0.5) / (len(self._rows.firsts) + 1)
        shares_C = shares_C * (1 - self._smoothing) + self._smoothing / 2
        logits_C = torch.from_numpy(np.log(shares_C / (1 - shares_C)).astype(np.float32))
        return logits_C if self._positive_weights_C is None else logits_C + self._positive_weights_C.cpu().log()

    def loss_sum(self, logits_BC: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """The weighted sum of some sequences' losses; its mean over the split counts every row once."""
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


def sampling_probabilities(rows: TrainingRows, num_classes: int) -> np.ndarray:
    """Probabilities_S with which every class is drawn alike; for data sets of one label a row.

    A class that no row has is drawn never; a document of several windows as often as another of its class.
    """
    label_ids_S = rows.label_ids(np.arange(len(rows.tokens.documents_S)))
    counts_C = np.maximum(rows.class_counts_C(num_classes), 1)
    probabilities_S = rows.document_weights_S().astype(np.float64) / counts_C[label_ids_S]
    normalised: np.ndarray = probabilities_S / probabilities_S.sum()
    return normalised


def validation_metrics(
    logits_NC: np.ndarray, rows: TrainingRows, problem_type: ProblemType, num_classes: int
) -> dict[str, float]:
    """Loss and metrics of the validation rows that have tokens; the loss without weights and smoothing.

    Of several labels a row: those whose probability reaches 0.5.
    """
    firsts = rows.firsts
    logits = torch.from_numpy(logits_NC[rows.tokens.documents_S[firsts]]).double()
    if problem_type == "multi_label_classification":
        true_NC = rows.multi_hot(firsts, num_classes)
        loss = binary_cross_entropy_with_logits(logits, torch.from_numpy(true_NC).double())
        names = tuple(map(str, range(num_classes)))
        found = multi_label_metrics(true_NC, (logits.numpy() >= 0).astype(np.float32), names)
        return {"loss": loss.item(), **{name: found[name] for name in ("subset_accuracy", "f1_micro", "f1_macro")}}
    labels_N = rows.label_ids(firsts)
    loss = cross_entropy(logits, torch.from_numpy(labels_N))
    return {"loss": loss.item(), **summary_metrics(labels_N, logits.numpy().argmax(axis=1), num_classes)}
