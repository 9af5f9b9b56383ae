"""Which sequences a training step reads: a function of (seed, step), whatever the number of workers.

    5 sequences, batches of 2   ->  epoch 1: steps 1 [3, 0], 2 [4], 3 [1, 2]; epoch 2: steps 4 [2, 0], …

1. order     a random permutation of the sequences in each epoch
2. window    cut the order into windows of `WINDOW_BATCHES` batches; sort each by length and cut it into batches
3. shuffle   the batches of an epoch, so that the lengths of consecutive steps are unrelated
4. share     of W ranks, each takes every W-th sequence of a batch: lengths on all ranks are alike

So a resumed run reads the same batches, and so does one with more or fewer workers.

Legend: S sequences.
"""

from __future__ import annotations

import numpy as np

from bertray.tokenization.batching import packed_batches

# Wide enough to leave little padding, narrow enough that each window is a random sample of the rows.
WINDOW_BATCHES = 50


class TrainingBatches:
    """The batches of all steps.

    Args:
        batch_size: sequences of a batch; one of each epoch may have fewer.
    """

    def __init__(self, lengths_S: np.ndarray, batch_size: int, seed: int) -> None:
        self._lengths_S, self._batch_size, self._seed = lengths_S, batch_size, seed
        self.steps_per_epoch = -(-len(lengths_S) // batch_size)
        self._epoch, self._batches = 0, list[np.ndarray]()

    def at(self, step: int) -> np.ndarray:
        """Sequences of a step's global batch, short ones first; steps count from 1."""
        epoch = 1 + (step - 1) // self.steps_per_epoch
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._draw(epoch)
        return self._batches[(step - 1) % self.steps_per_epoch]

    def _draw(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self._seed, epoch])
        num_sequences, size = len(self._lengths_S), self._batch_size
        order = rng.permutation(num_sequences)
        batches: list[np.ndarray] = []
        for start in range(0, num_sequences, size * WINDOW_BATCHES):
            rows = order[start : start + size * WINDOW_BATCHES]
            rows = rows[np.argsort(self._lengths_S[rows], kind="stable")]
            batches += [rows[at : at + size] for at in range(0, len(rows), size)]
        return [batches[index] for index in rng.permutation(len(batches))]


def micro_batches(rows: np.ndarray, lengths_S: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Cut a rank's share into parts of at most `token_budget` tokens, or one sequence; their gradients add up."""
    return [rows[part] for part in packed_batches(lengths_S[rows], token_budget)]
