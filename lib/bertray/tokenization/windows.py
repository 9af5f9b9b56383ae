"""Cut documents that exceed the model's window into overlapping windows, and combine the windows' logits.

    lengths_N [3, 11], windows of 5 tokens that overlap by at least 1
      cut        documents_S [0, 1, 1, 1], starts_S [0, 0, 3, 6], lengths_S [3, 5, 5, 5]
      aggregate  logits_SC [[1, 0], [2, 4], [0, 0], [4, 2]] -> mean [[1, 0], [2, 2]], max [[1, 0], [4, 4]]

A document has as few windows as possible, and their number has no limit: 10 MB of text are some 13,000 windows of 256
tokens. A document that fits has one, the same that truncation gives. Otherwise all windows are full and spread evenly:
a short last window would weigh in the mean like a full one, and one moved back until it is full would count the
document's end twice.

`offsets` and `positions` are for pieces of unequal length that lie end to end in one array:
[[5, 6], [], [7]] are the values [5, 6, 7] and the offsets [0, 2, 2, 3].

Legend: N documents, S windows, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bertray.types import LongDocuments


def cut(lengths_N: np.ndarray, window: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cover documents with windows, in the order of the documents and of their text; an empty document has one too.

    Args:
        window, stride: tokens of a window, and by how many windows overlap at least, below `window`.

    Returns:
        documents_S, starts_S (within the document) and lengths_S (all int64).
    """
    excess_N = np.maximum(lengths_N - window, 0)
    num_more_N = -(-excess_N // (window - stride))  # windows after the first
    documents_S = np.repeat(np.arange(len(lengths_N)), num_more_N + 1)
    number_S = positions(np.zeros_like(num_more_N), num_more_N + 1)  # of the window in its document, from 0
    # The last window starts at `excess`; no step is longer than window - stride.
    starts_S = number_S * excess_N[documents_S] // np.maximum(num_more_N, 1)[documents_S]
    return documents_S, starts_S, np.minimum(lengths_N, window)[documents_S]


def aggregate(logits_SC: np.ndarray, documents_S: np.ndarray, num_documents: int, how: LongDocuments) -> np.ndarray:
    """logits_NC of documents from those of their windows, of their type; NaN for a document without windows.

    Args:
        documents_S: the document of each window, ascending.
        how: mean or max over the windows, for each class; truncate: no document has more than one window.
    """
    logits_NC = np.full((num_documents, logits_SC.shape[1]), np.nan, dtype=logits_SC.dtype)
    if how == "truncate":
        logits_NC[documents_S] = logits_SC
    elif len(documents_S):
        firsts = np.flatnonzero(np.diff(documents_S, prepend=-1))
        if how == "max":
            found_NC = np.maximum.reduceat(logits_SC, firsts)
        else:
            sums_NC = np.add.reduceat(logits_SC, firsts, dtype=np.float64)
            found_NC = sums_NC / np.diff(firsts, append=len(documents_S))[:, None]
        logits_NC[documents_S[firsts]] = found_NC
    return logits_NC


def training_weights(documents_S: np.ndarray) -> np.ndarray:
    """The weight of each window in the loss (float32): equal in sum for each document, 1 on average.

    Without weights one book among letters would dominate the training; metrics count documents.
    """
    num_windows_N = np.bincount(documents_S)
    weights_S: np.ndarray = len(documents_S) / np.count_nonzero(num_windows_N) / num_windows_N[documents_S]
    return weights_S.astype(np.float32)


def offsets(lengths: Any) -> np.ndarray:
    """Where each piece begins, and where the last one ends (int64)."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, …, start + length - 1 of every piece, end to end (int64)."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())
