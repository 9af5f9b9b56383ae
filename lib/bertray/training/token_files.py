"""A split of a data set as training reads it: token ids in a memory-mapped Arrow file, written once a run.

    text="where is my card"  label_id=11   ->   ids=[101, 312, 207, 95, 148, 102]  document=0  label_ids=[11]

`ids` are of the compact vocabulary, `document` is the row of the split. A sequence is a text, or a window of a long
text with the text's labels.

1. tokenise  training and validation rows, once, on the driver                   [tokenization.tokenizer]
2. compact   remove ids from the vocabulary that occur in neither split: their embeddings, most of BERT's 23 million
             weights of embeddings, would have zero gradients
3. write     train.arrow and validation.arrow, one record a sequence, and vocabulary.arrow
4. open      each worker maps the files into its memory; workers of a machine share the pages

Legend: S sequences, S1 = S + 1, N rows, T tokens, L labels of all sequences, C classes, V tokens of the vocabulary.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from transformers import PreTrainedConfig

from bertray.data.dataset import Dataset
from bertray.errors import RequestError
from bertray.model.pretrained import num_special_ids
from bertray.schema import TEXT
from bertray.storage.location import Location
from bertray.tasks.task import TASKS
from bertray.tokenization.tokenizer import ColumnTokenizer, Sequences, TokenColumn
from bertray.tokenization.windows import positions

_SPLITS, _VOCABULARY = ("train", "validation"), "vocabulary.arrow"
_COLUMNS = ("ids", "document", "label_ids")


@dataclass(frozen=True)
class TrainingRows:
    """A split's sequences and their labels: sequence s has label_ids_L[label_offsets_S1[s]:label_offsets_S1[s + 1]].

    If rows have a number instead, it is the one that their label id would be.
    """

    tokens: Sequences
    label_ids_L: np.ndarray
    label_offsets_S1: np.ndarray

    @classmethod
    def of(cls, sequences: pa.RecordBatch) -> TrainingRows:
        """The records of a token file, or of a part of one; no copies."""
        ids, documents, labels = sequences.columns
        tokens = Sequences(ids.values.to_numpy(), ids.offsets.to_numpy(), documents.to_numpy())
        return cls(tokens, labels.values.to_numpy(), labels.offsets.to_numpy())

    @property
    def firsts(self) -> np.ndarray:
        """The first sequence of each row that has one, in order."""
        return np.flatnonzero(np.diff(self.tokens.documents_S, prepend=-1))

    def label_ids(self, rows: np.ndarray) -> np.ndarray:
        """The label id (int64) of each of some sequences, which have one label."""
        return np.asarray(self.label_ids_L[self.label_offsets_S1[rows]], np.int64)

    def values(self, rows: np.ndarray) -> np.ndarray:
        """The number (float64) of each of some sequences."""
        return np.asarray(self.label_ids_L[self.label_offsets_S1[rows]], np.float64)

    def multi_hot(self, rows: np.ndarray, num_classes: int) -> np.ndarray:
        """Which labels each of some sequences has (float32) [len(rows), C]."""
        starts = self.label_offsets_S1[rows]
        counts = self.label_offsets_S1[rows + 1] - starts
        has_labels = np.zeros((len(rows), num_classes), dtype=np.float32)
        has_labels[np.repeat(np.arange(len(rows)), counts), self.label_ids_L[positions(starts, counts)]] = 1
        return has_labels

    def class_counts_C(self, num_classes: int) -> np.ndarray:
        """Rows, not sequences, of each class."""
        is_first_S = np.diff(self.tokens.documents_S, prepend=-1) > 0
        is_of_first_L = np.repeat(is_first_S, np.diff(self.label_offsets_S1))
        return np.bincount(self.label_ids_L[is_of_first_L], minlength=num_classes)


def write_rows(
    folder: Location, dataset: Dataset, tokenizer: ColumnTokenizer, encoder_config: PreTrainedConfig
) -> None:
    """Tokenise and write the in-scope training and validation rows of a data set."""
    rows = {name: dataset.in_scope(dataset.split(name)) for name in _SPLITS}
    was_fast = tokenizer.is_fast
    tokens = {name: tokenizer.encode(of_split[TEXT]) for name, of_split in rows.items()}
    if was_fast and not tokenizer.is_fast:  # the fast tokenizer's ids were wrong, maybe in both splits
        tokens = {name: tokenizer.encode(of_split[TEXT]) for name, of_split in rows.items()}
    splits = {name: (tokens[name], TASKS[dataset.problem_type].stored(rows[name])) for name in rows}
    write(folder, splits, encoder_config.vocab_size, num_special_ids(encoder_config))


def write(
    folder: Location, splits: dict[str, tuple[TokenColumn, pa.LargeListArray]], vocabulary_size: int, num_kept: int
) -> None:
    """Write token files.

    Args:
        splits: tokens, and label ids of each row: `Task.stored`.
        vocabulary_size: of the encoder.
        num_kept: ids below this number stay as they are; models know ids such as that of padding.
    """
    compact_V, vocabulary_V = compact_vocabulary([tokens for tokens, _ in splits.values()], vocabulary_size, num_kept)
    for name, (tokens, label_ids) in splits.items():
        _put(folder / f"{name}.arrow", sequences_of(tokens, label_ids, compact_V))
    _put(folder / _VOCABULARY, pa.record_batch([pa.array(vocabulary_V.astype(np.int32))], names=["id"]))


def sequences_of(tokens: TokenColumn, label_ids: pa.LargeListArray, compact_V: np.ndarray) -> pa.RecordBatch:
    """The records of a token file; `label_ids` are as for `write`, `compact_V` is from `compact_vocabulary`."""
    ids = pa.LargeListArray.from_arrays(pa.array(tokens.offsets_S1), pa.array(compact_V[tokens.ids_T]))
    documents = pa.array(tokens.documents_S, pa.int64())
    return pa.record_batch([ids, documents, label_ids.take(documents)], names=_COLUMNS)


def compact_vocabulary(
    columns: list[TokenColumn], vocabulary_size: int, num_kept: int
) -> tuple[np.ndarray, np.ndarray]:
    """Number the ids that occur in some columns; see `write` for the other arguments.

    Returns:
        The new id of each of the encoder's (int32; arbitrary if it does not occur), and vice versa (int64).
    """
    is_used_V = np.zeros(vocabulary_size, dtype=bool)
    is_used_V[:num_kept] = True
    for tokens in columns:
        is_used_V[tokens.ids_T] = True
    return np.cumsum(is_used_V, dtype=np.int32) - 1, np.flatnonzero(is_used_V)


@contextmanager
def opened(folder: Location) -> Iterator[tuple[dict[str, TrainingRows], np.ndarray]]:
    """The splits of a folder and the encoder's ids of the compact vocabulary (int64), for the block.

    Raises:
        RequestError: the folder is not on this machine.
    """
    with ExitStack() as stack:
        path = stack.enter_context(folder.local_copy())

        def mapped(name: str) -> pa.RecordBatch:
            try:
                return pa.ipc.open_file(stack.enter_context(pa.memory_map(str(path / name)))).get_batch(0)
            except FileNotFoundError as error:
                raise RequestError(
                    f"{folder / name}, written where the job was started, is not there on {socket.gethostname()}: use "
                    "an --output on S3 or on a file system that all nodes share"
                ) from error

        splits = {name: TrainingRows.of(mapped(f"{name}.arrow")) for name in _SPLITS}
        yield splits, mapped(_VOCABULARY)["id"].to_numpy().astype(np.int64)


def _put(file: Location, batch: pa.RecordBatch) -> None:
    with file.staged() as path, pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
