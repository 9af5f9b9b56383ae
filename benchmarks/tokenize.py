"""An Arrow text column to token ids on one thread, beside the Hugging Face tokenizer it stands in for.

    python -m benchmarks.tokenize
    python -m benchmarks.tokenize --texts archive/part-0.parquet --text-column body --rows 20000

Without options: the data sets of ../shared/data, or the archive of `make demo`. All sides read the same Arrow column
and give the ids of texts cut to the same length; that they are the same ids is checked. `first` starts with an empty
memory of words, `again` has seen the texts before; an actor that has worked for some minutes is between them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for all: before tokenizers is imported

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.results import ROOT, SHARED_DATA, interleaved, write_result
from bertray.model.pretrained import load_tokenizer
from bertray.tokenization.columns import as_text
from bertray.tokenization.tokenizer import ColumnTokenizer
from bertray.tokenization.wordpiece import ColumnWordPiece

CALL_ROWS = 4096
DATA_SETS = ("csabstruct", "goemotions_multilabel", "bulk_cpp_docs", "movie_reviews_long", "sib200_16lang")
# Where the time of a call is spent: method, and what it does.
STAGES = {
    "_split": "classes, words",
    "_tokenize_words": "reference tokenizer, words not seen before",
    "_look_up": "memory of words",
    "_rows_with_added_tokens": "search for added tokens",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="a Parquet file or a folder of them")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--rows", type=int, default=10_000, help="at most so many texts of a data set")
    parser.add_argument("--max-length", type=int, default=512, help="tokens a text is cut to")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    pa.set_cpu_count(1)

    sources = [options.texts] if options.texts else [SHARED_DATA / name for name in DATA_SETS]
    if not options.texts and not SHARED_DATA.is_dir():
        sources = [ROOT / "demo" / "archive"]
    if missing := [path for path in sources if not path.exists()]:
        sys.exit(f"{missing[0]} is missing: run make demo, or give --texts")
    lines = [
        "| texts | tokens | bertray, first | bertray, again | encode_batch_fast | transformers | first / fast "
        "| first / transformers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    spent: dict[str, dict[str, float]] = {}
    for source in sources:
        texts = _read(source, options.text_column, options.rows)
        line, spent[source.stem] = _measure(source.stem, texts, options.max_length, options.repeats)
        lines.append(line)
        print(line, flush=True)
    stages = sorted({stage for one in spent.values() for stage in one})
    lines += ["", "Thousand tokens a second, one thread. Where the time of `first` goes:", ""]
    lines += ["| texts | " + " | ".join(stages) + " |", "|---" * (len(stages) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{100 * one.get(stage, 0):.0f} %" for stage in stages) + " |"
        for name, one in spent.items()
    ]
    facts = {"encoder": "minilm", "max_length": options.max_length, "rows": options.rows, "repeats": options.repeats}
    write_result("tokenize", sources[0].stem if len(sources) == 1 else "real-texts", "\n".join(lines), facts)


def _read(source: Path, column: str, num_rows: int) -> pa.Array:
    files = [source] if source.is_file() else sorted(source.rglob("*.parquet"))
    table = pa.concat_tables([pq.read_table(file, columns=[column]) for file in files])
    return pa.concat_arrays(table[column].slice(0, num_rows).chunks)


def _measure(name: str, texts: pa.Array, max_length: int, num_repeats: int) -> tuple[str, dict[str, float]]:
    """One line of the table, and the shares of the time by stage."""
    reference, _ = load_tokenizer("minilm", max_length)
    reference.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    fast = reference.backend_tokenizer
    fast.no_padding()
    fast.enable_truncation(max_length)
    seen, fresh = ColumnTokenizer(fast, max_length), ColumnTokenizer(fast, max_length)

    def columnar(tokenizer: ColumnTokenizer) -> np.ndarray:
        return np.concatenate([tokenizer.encode(part).ids_T for part in _parts(texts)])

    def encode_batch_fast() -> list[list[int]]:
        return [one.ids for part in _parts(texts) for one in fast.encode_batch_fast(part.to_pylist())]

    def call_transformers() -> list[list[int]]:
        ids: list[list[int]] = []
        for part in _parts(texts):
            ids += reference(part.to_pylist(), truncation=True, max_length=max_length)["input_ids"]
        return ids

    expected = np.array([one for ids in encode_batch_fast() for one in ids])
    ids_T = columnar(seen)
    if not np.array_equal(ids_T, expected):
        raise AssertionError(f"{name}: the columnar tokenizer gives other ids than the reference")
    walls_s = interleaved(
        {
            "first": lambda: columnar(_forget(fresh)),
            "again": lambda: columnar(seen),
            "fast": encode_batch_fast,
            "transformers": call_transformers,
        },
        num_repeats,
    )
    rates = {key: len(ids_T) / wall_s / 1e3 for key, wall_s in walls_s.items()}
    line = (
        f"| {name}, {len(texts)} | {len(ids_T)} | "
        + " | ".join(f"{rate:.0f}" for rate in rates.values())
        + f" | {rates['first'] / rates['fast']:.1f} | {rates['first'] / rates['transformers']:.1f} |"
    )
    return line, _stages(texts, fast, max_length)


def _forget(tokenizer: ColumnTokenizer) -> ColumnTokenizer:
    """The tokenizer with an empty memory of words."""
    assert isinstance(tokenizer._columnar, ColumnWordPiece)
    tokenizer._columnar._known = type(tokenizer._columnar._known)()
    return tokenizer


def _parts(texts: pa.Array) -> Iterator[pa.Array]:
    return (texts[start : start + CALL_ROWS] for start in range(0, len(texts), CALL_ROWS))


def _stages(texts: pa.Array, fast: Any, max_length: int) -> dict[str, float]:
    """Shares of the time of a first run, by stage."""
    tokenizer = ColumnTokenizer(fast, max_length)
    columnar = tokenizer._columnar
    assert isinstance(columnar, ColumnWordPiece)
    spent_s: dict[str, float] = defaultdict(float)
    for method in STAGES:
        setattr(columnar, method, _timed(getattr(columnar, method), STAGES[method], spent_s))
    started_s = time.perf_counter()
    for part in _parts(texts):
        with _clock("validity of the text", spent_s):
            as_text(part)
        tokenizer.encode(part)
    wall_s = time.perf_counter() - started_s - spent_s["validity of the text"]  # which encode does once more
    spent_s["memory of words"] -= spent_s["reference tokenizer, words not seen before"]
    spent_s["distinct words, gathering"] = wall_s - sum(spent_s.values())
    return {stage: one_s / wall_s for stage, one_s in spent_s.items()}


def _timed(method: Callable[..., Any], stage: str, spent_s: dict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        with _clock(stage, spent_s):
            return method(*arguments)

    return timed


@contextmanager
def _clock(stage: str, spent_s: dict[str, float]) -> Iterator[None]:
    started_s = time.perf_counter()
    yield
    spent_s[stage] += time.perf_counter() - started_s


if __name__ == "__main__":
    main()
