"""Documents become batches with little padding.

    lengths_N [3, 120, 4, 118]  ->  batches [1, 3], [2, 0]: rows of like length share a batch

For inference a batch is a budget of tokens (`budget_batches`); for training it is a number of texts, chosen by seed
and epoch alone, so that any number of workers sees the same batches (`epoch_batches`).

Legend: N documents, B documents of a batch, L tokens of its longest.
"""

from __future__ import annotations

import numpy as np

from bertray.tokenization import TokenColumn

# Batches of a training window are sorted by length: wide enough to leave little padding, narrow enough that every
# window still holds a random sample of the rows.
WINDOW_BATCHES = 50


def budget_batches(lengths_N: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Rows of each batch, longest documents first, so that memory is known to suffice after the first batch.

    A batch holds at most `token_budget` tokens, padding included, or one document. Empty documents are left out.
    """
    order = np.argsort(-lengths_N, kind="stable")
    order = order[: np.count_nonzero(lengths_N)]
    batches, start = [], 0
    while start < len(order):
        num_rows = max(1, token_budget // int(lengths_N[order[start]]))
        batches.append(order[start : start + num_rows])
        start += num_rows
    return batches


def epoch_batches(lengths_N: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Global training batches of one epoch: every row once, a function of the arguments alone.

    A random permutation is cut into windows of `WINDOW_BATCHES` batches; each window is sorted by length and cut into
    batches, whose order is then shuffled so that the lengths of consecutive steps are unrelated.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths_N))
    window = batch_size * WINDOW_BATCHES
    batches: list[np.ndarray] = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths_N[rows], kind="stable")]
        batches += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    return [batches[index] for index in rng.permutation(len(batches))]


def pad(tokens: TokenColumn, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """One batch as rectangles: input_ids_BL (int64) and attention_mask_BL (int64, 1 on tokens)."""
    lengths_B = tokens.lengths_N[rows]
    starts_B = tokens.offsets_N1[rows]
    columns_L = np.arange(int(lengths_B.max()))
    mask_BL = columns_L < lengths_B[:, None]
    input_ids_BL = np.full(mask_BL.shape, pad_id, dtype=np.int64)
    input_ids_BL[mask_BL] = tokens.ids_T[(starts_B[:, None] + columns_L)[mask_BL]]
    return input_ids_BL, mask_BL.astype(np.int64)
