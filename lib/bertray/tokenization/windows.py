"""Documents longer than the model's window: cut into overlapping windows, whose logits become the document's.

    lengths_N [3, 11], windows of 5 tokens of which neighbours share at least 1
      1. count    the fewest windows that do: 1 and 3, as transformers' tokenizers cut with stride=1
      2. spread   documents_S [0, 1, 1, 1], starts_S [0, 0, 3, 6], lengths_S [3, 5, 5, 5]
      3. logits   [[1, 0], [2, 4], [0, 0], [4, 2]] of the windows
                  -> mean [[1, 0], [2, 2]], max [[1, 0], [4, 4]] of the documents

A document that fits has one window, which is what truncation leaves of it. Every window of a longer one is full, and
they lie evenly between its first token and its last: a short last window would weigh in the mean like a full one
though it holds next to nothing new, and one moved back until it is full would count the document's end twice.
The number of windows is not limited: whoever asks for whole documents gets them, 10 MB of text as some 13,000 windows
of 256 tokens.

Legend: N documents, S windows, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bertray.tokenization.ragged import positions
from bertray.types import LongDocuments


class Windows(NamedTuple):
    """Pieces of documents in the documents' order, those of a document in its own order (all int64)."""

    documents_S: np.ndarray
    starts_S: np.ndarray  # in the document
    lengths_S: np.ndarray


def cut(lengths_N: np.ndarray, window: int, stride: int) -> Windows:
    """Cover documents with windows.

    Args:
        lengths_N: tokens of every document; an empty one has one empty window.
        window: tokens of a window, at least 1.
        stride: tokens that neighbouring windows share at least, below `window`.
    """
    excess_N = np.maximum(lengths_N - window, 0)
    num_more_N = -(-excess_N // (window - stride))  # windows after the first, rounded up
    documents_S = np.repeat(np.arange(len(lengths_N)), num_more_N + 1)
    number_S = positions(np.zeros_like(num_more_N), num_more_N + 1)  # of the window in its document, from 0
    # The last of `num_more` steps ends at `excess`; none is longer than window - stride.
    starts_S = number_S * excess_N[documents_S] // np.maximum(num_more_N, 1)[documents_S]
    return Windows(documents_S, starts_S, np.minimum(lengths_N, window)[documents_S])


def aggregate(logits_SC: np.ndarray, documents_S: np.ndarray, num_documents: int, how: LongDocuments) -> np.ndarray:
    """logits_NC (float32) of documents from those of their windows; of a document without windows, NaN.

    Args:
        documents_S: ascending, as `cut` gives them.
        how: mean or max of each class; truncate: every document has one window at most.
    """
    logits_NC = np.full((num_documents, logits_SC.shape[1]), np.nan, dtype=np.float32)
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
    """What each window counts in the loss (float32): the same for every document in all, and 1 on average.

    Unweighted, a book among letters would be most of the training; metrics count documents. Without windows all are 1.
    """
    num_windows_N = np.bincount(documents_S)
    num_documents = np.count_nonzero(num_windows_N)
    weights_S: np.ndarray = len(documents_S) / num_documents / num_windows_N[documents_S]
    return weights_S.astype(np.float32)
