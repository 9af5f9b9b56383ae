"""Which sequences a training step reads: a function of (seed, step), whatever the number of workers.

    lengths_S of 5 sequences, batches of 2   ->  epoch 1: steps 1 [3, 0], 2 [4], 3 [1, 2]; epoch 2: steps 4 [2, 0], …

1. order     a random permutation of the sequences, an epoch each; or a sample in which classes are alike
2. window    the order is cut into windows of `WINDOW_BATCHES` batches; each is sorted by length and cut into batches
3. shuffle   the batches of an epoch, so that the lengths of consecutive steps are unrelated
4. share     a rank of a data-parallel run takes every world_size-th sequence of a batch, which are of like lengths

So a run that goes on from a checkpoint, or with more or fewer workers, reads the same batches.

Legend: S sequences.
"""

from __future__ import annotations

import numpy as np

from bertray.tokenization.batching import packed_batches

# Wide enough to leave little padding, narrow enough that every window still holds a random sample of the rows.
WINDOW_BATCHES = 50


class TrainingBatches:
    """The batches of every step.

    Args:
        lengths_S: tokens of every sequence.
        batch_size: sequences of a batch; an epoch's last one in the order may hold fewer.
        probabilities_S: of being drawn, with repeats, instead of each sequence once an epoch; they add up to 1.
    """

    def __init__(
        self, lengths_S: np.ndarray, batch_size: int, seed: int, probabilities_S: np.ndarray | None = None
    ) -> None:
        self._lengths_S, self._batch_size, self._seed = lengths_S, batch_size, seed
        self._probabilities_S = probabilities_S
        self.steps_per_epoch = -(-len(lengths_S) // batch_size)
        self._epoch, self._batches = 0, list[np.ndarray]()

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to; both count from 1."""
        return (step - 1) // self.steps_per_epoch + 1

    def at(self, step: int) -> np.ndarray:
        """Sequences of a step's global batch, short ones first."""
        epoch = self.epoch(step)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._draw(epoch)
        return self._batches[(step - 1) % self.steps_per_epoch]

    def _draw(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self._seed, epoch])
        num_sequences = len(self._lengths_S)
        if self._probabilities_S is None:
            order = rng.permutation(num_sequences)
        else:
            order = rng.choice(num_sequences, num_sequences, p=self._probabilities_S)
        window = self._batch_size * WINDOW_BATCHES
        batches: list[np.ndarray] = []
        for start in range(0, num_sequences, window):
            rows = order[start : start + window]
            rows = rows[np.argsort(self._lengths_S[rows], kind="stable")]
            batches += [rows[at : at + self._batch_size] for at in range(0, len(rows), self._batch_size)]
        return [batches[index] for index in rng.permutation(len(batches))]


def share(batch: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """What one of `world_size` ranks takes of a global batch; maybe nothing of a small one."""
    return batch[rank::world_size]


def micro_batches(rows: np.ndarray, lengths_S: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Cut a rank's share into parts of at most `token_budget` tokens, or one sequence; gradients add up over them."""
    return [rows[part] for part in packed_batches(lengths_S[rows], token_budget)]
