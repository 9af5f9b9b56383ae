"""A split of a data set as training reads it: token ids in a memory-mapped Arrow file, made once a run.

    text="where is my card"  label_id=11   ->   ids=[101, 312, 207, 95, 148, 102]  document=0  label_ids=[11]

1. tokenise  training and validation rows, once, on the driver                   [tokenization.tokenizer]
2. compact   token ids that occur in neither leave the vocabulary: training computes, keeps and exchanges no gradients
             of their embeddings, which would all be zero. Of BERT's 23 million embedding weights few are used by some
             thousand texts
3. write     train.arrow and validation.arrow, one record a sequence, and vocabulary.arrow
4. open      every worker maps them into its memory; those of a machine share the pages

A sequence is a text, or a window of a long one with the text's labels.

Legend: S sequences, S1 = S + 1, N rows, T tokens, C classes, V tokens of the vocabulary.
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
from bertray.schema import LABEL_ID, LABEL_IDS, TEXT
from bertray.storage.location import Location
from bertray.tokenization.tokenizer import ColumnTokenizer, Sequences, TokenColumn
from bertray.tokenization.windows import offsets, positions, training_weights
from bertray.types import ProblemType

TRAIN, VALIDATION = "train", "validation"
_VOCABULARY = "vocabulary.arrow"
_SCHEMA = pa.schema(
    [
        pa.field("ids", pa.large_list(pa.int32()), nullable=False),  # in the compact vocabulary
        pa.field("document", pa.int64(), nullable=False),  # row of the split
        pa.field("label_ids", pa.large_list(pa.int32()), nullable=False),
    ]
)


@dataclass(frozen=True)
class TrainingRows:
    """A split's sequences and their labels: sequence s has label_ids_L[label_offsets_S1[s]:label_offsets_S1[s + 1]]."""

    tokens: Sequences
    label_ids_L: np.ndarray
    label_offsets_S1: np.ndarray

    @property
    def firsts(self) -> np.ndarray:
        """The first sequence of every row that has one, in order."""
        return np.flatnonzero(np.diff(self.tokens.documents_S, prepend=-1))

    def label_ids(self, rows: np.ndarray) -> np.ndarray:
        """The only label's id (int64) of some sequences."""
        found: np.ndarray = self.label_ids_L[self.label_offsets_S1[rows]].astype(np.int64)
        return found

    def multi_hot(self, rows: np.ndarray, num_classes: int) -> np.ndarray:
        """Which labels some sequences have (float32) [S, C]."""
        starts_S = self.label_offsets_S1[rows]
        counts_S = self.label_offsets_S1[rows + 1] - starts_S
        has_SC = np.zeros((len(rows), num_classes), dtype=np.float32)
        has_SC[np.repeat(np.arange(len(rows)), counts_S), self.label_ids_L[positions(starts_S, counts_S)]] = 1
        return has_SC

    def class_counts_C(self, num_classes: int) -> np.ndarray:
        """Rows, not sequences, of every class."""
        firsts = self.firsts
        counts_S = np.diff(self.label_offsets_S1)[firsts]
        return np.bincount(
            self.label_ids_L[positions(self.label_offsets_S1[firsts], counts_S)], minlength=num_classes
        ).astype(np.int64)

    def of_documents(self, is_wanted_N: np.ndarray) -> TrainingRows:
        """The sequences of some rows of the split, which keep their numbers; is_wanted_N (bool) is of all its rows."""
        sequences = np.flatnonzero(is_wanted_N[self.tokens.documents_S])

        def taken(values: np.ndarray, offsets_S1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            lengths = np.diff(offsets_S1)[sequences]
            return values[positions(offsets_S1[sequences], lengths)], offsets(lengths)

        tokens = Sequences(*taken(self.tokens.ids_T, self.tokens.offsets_S1), self.tokens.documents_S[sequences])
        return TrainingRows(tokens, *taken(self.label_ids_L, self.label_offsets_S1))

    def document_weights_S(self) -> np.ndarray:
        """What each sequence counts, so that documents count alike; see `bertray.tokenization.windows`."""
        return training_weights(self.tokens.documents_S)


def write_rows(
    folder: Location, dataset: Dataset, tokenizer: ColumnTokenizer, encoder_config: PreTrainedConfig
) -> None:
    """Tokenise and write the training and validation rows of a data set, those in scope."""
    rows = {name: dataset.in_scope(dataset.split(name)) for name in (TRAIN, VALIDATION)}
    was_fast = tokenizer.is_fast
    tokens = {name: tokenizer.encode(of_split[TEXT]) for name, of_split in rows.items()}
    if was_fast and not tokenizer.is_fast:  # other ids than the reference's were met: maybe in both splits
        tokens = {name: tokenizer.encode(of_split[TEXT]) for name, of_split in rows.items()}
    splits = {name: (tokens[name], label_id_lists(rows[name], dataset.problem_type)) for name in rows}
    write(folder, splits, encoder_config.vocab_size, num_special_ids(encoder_config))


def label_id_lists(rows: pa.Table, problem_type: ProblemType) -> pa.LargeListArray:
    """The label ids of every row of a data set, as `write` takes them."""
    if problem_type == "multi_label_classification":
        return rows[LABEL_IDS].combine_chunks().cast(pa.large_list(pa.int32()))
    return pa.LargeListArray.from_arrays(pa.array(np.arange(rows.num_rows + 1)), rows[LABEL_ID].combine_chunks())


def write(
    folder: Location, splits: dict[str, tuple[TokenColumn, pa.LargeListArray]], vocabulary_size: int, num_kept: int
) -> None:
    """Write token files.

    Args:
        splits: of each split, the tokens and the label ids (lists of int32) of every row.
        vocabulary_size: of the encoder.
        num_kept: so many ids from 0 keep their number, for models look at some of them: padding, end of text.
    """
    compact_V, vocabulary_V = compact_vocabulary([tokens for tokens, _ in splits.values()], vocabulary_size, num_kept)
    for name, (tokens, label_ids) in splits.items():
        columns = [
            pa.LargeListArray.from_arrays(pa.array(tokens.offsets_S1), pa.array(compact_V[tokens.ids_T])),
            pa.array(tokens.documents_S, pa.int64()),
            label_ids.take(pa.array(tokens.documents_S)),
        ]
        _put(folder / f"{name}.arrow", pa.record_batch(columns, schema=_SCHEMA))
    _put(folder / _VOCABULARY, pa.record_batch([pa.array(vocabulary_V.astype(np.int32))], names=["id"]))


def compact_vocabulary(
    columns: list[TokenColumn], vocabulary_size: int, num_kept: int
) -> tuple[np.ndarray, np.ndarray]:
    """Number the ids that some columns use; the arguments are those of `write`.

    Returns:
        By the encoder's id the new one (int32; of an unused id, any), and by the new id the encoder's (int64).
    """
    is_used_V = np.zeros(vocabulary_size, dtype=bool)
    is_used_V[:num_kept] = True
    for tokens in columns:
        is_used_V[tokens.ids_T] = True
    return np.cumsum(is_used_V, dtype=np.int32) - 1, np.flatnonzero(is_used_V)


@contextmanager
def opened(folder: Location) -> Iterator[tuple[dict[str, TrainingRows], np.ndarray]]:
    """The splits of a folder, and the encoder's ids of the compact vocabulary (int64), inside the block.

    Raises:
        RequestError: this machine does not see it.
    """
    with ExitStack() as stack:
        path = stack.enter_context(folder.local_copy())

        def table_of(name: str) -> pa.Table:
            try:
                mapped = stack.enter_context(pa.memory_map(str(path / name)))
            except FileNotFoundError as error:
                raise RequestError(
                    f"{folder / name}, written where the job was started, is not there on {socket.gethostname()}: let "
                    "--output be on S3, or on a file system that every node has"
                ) from error
            return pa.ipc.open_file(mapped).read_all()

        splits = {}
        for name in (TRAIN, VALIDATION):
            table = table_of(f"{name}.arrow")
            ids, labels = table["ids"].chunk(0), table["label_ids"].chunk(0)
            tokens = Sequences(ids.values.to_numpy(), ids.offsets.to_numpy(), table["document"].chunk(0).to_numpy())
            splits[name] = TrainingRows(tokens, labels.values.to_numpy(), labels.offsets.to_numpy())
        yield splits, table_of(_VOCABULARY)["id"].to_numpy().astype(np.int64)


def _put(file: Location, batch: pa.RecordBatch) -> None:
    with file.staged() as path, pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
