"""Token files hold what was tokenised, in a vocabulary of what occurs; locally and on S3."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bertray.errors import RequestError
from bertray.model.pretrained import load_tokenizer
from bertray.storage.location import Location
from bertray.tokenization.tokenizer import ColumnTokenizer, TokenColumn
from bertray.tokenization.windows import training_weights
from bertray.training import token_files

TEXTS = {
    "train": ["one two three", "card", "\x01", "one card of two " * 10, "three"],
    "validation": ["four", "one"],
}
LABELS = {"train": [[0], [1], [0], [0, 2], []], "validation": [[1], [2]]}


@pytest.fixture(scope="module")
def tokenizer() -> ColumnTokenizer:
    return ColumnTokenizer(load_tokenizer("minilm", 16)[0].backend_tokenizer, 16, stride=4)


def write(folder: Location, tokenizer: ColumnTokenizer) -> dict[str, TokenColumn]:
    tokens = {name: tokenizer.encode(pa.array(texts)) for name, texts in TEXTS.items()}
    labels = {name: pa.array(ids, pa.large_list(pa.int32())) for name, ids in LABELS.items()}
    token_files.write(folder, {name: (tokens[name], labels[name]) for name in TEXTS}, 30522, num_kept=1)
    return tokens


@pytest.mark.parametrize("place", ["local", "s3"])
def test_what_is_written_is_read(
    place: str, tokenizer: ColumnTokenizer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = Location.of(str(tmp_path) if place == "local" else request.getfixturevalue("s3_folder")) / "rows"
    tokens = write(folder, tokenizer)
    with token_files.opened(folder) as (splits, vocabulary_V):
        assert vocabulary_V[0] == 0  # padding keeps its number
        assert len(vocabulary_V) < 20
        for name in TEXTS:
            found = splits[name].tokens
            np.testing.assert_array_equal(vocabulary_V[found.ids_T], tokens[name].ids_T)
            np.testing.assert_array_equal(found.offsets_S1, tokens[name].offsets_S1)
            np.testing.assert_array_equal(found.documents_S, tokens[name].documents_S)


def test_labels_of_sequences(tokenizer: ColumnTokenizer, tmp_path: Path) -> None:
    folder = Location.of(str(tmp_path))
    write(folder, tokenizer)
    with token_files.opened(folder) as (splits, _):
        rows = splits["train"]
        documents_S = rows.tokens.documents_S
        # the third text has no token of its own, and so no sequence; the fourth has several windows
        assert np.count_nonzero(documents_S == 3) > 2
        for sequence, has_C in enumerate(rows.multi_hot(np.arange(len(documents_S)), 3)):
            assert np.flatnonzero(has_C).tolist() == LABELS["train"][documents_S[sequence]]
        assert rows.class_counts_C(3).tolist() == [2, 1, 1]  # of texts, not of windows
        assert rows.label_ids(rows.firsts[:2]).tolist() == [0, 1]
        weights_S = training_weights(documents_S)
        assert weights_S[documents_S == 3].sum() == pytest.approx(weights_S[documents_S == 0].sum())


def test_a_machine_that_does_not_see_the_rows_says_so(tmp_path: Path) -> None:
    with (
        pytest.raises(RequestError, match=r"train\.arrow, written where the job was started, is not there on .*--out"),
        token_files.opened(Location.of(str(tmp_path / "elsewhere"))),
    ):
        pass
