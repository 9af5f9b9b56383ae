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
from collections.abc import Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for all: before tokenizers is imported

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.results import ROOT, SHARED_DATA, interleaved, write_result
from bertray.model.pretrained import load_tokenizer
from bertray.tokenization.tokenizer import ColumnTokenizer

CALL_ROWS = 4096
DATA_SETS = ("csabstruct", "goemotions_multilabel", "bulk_cpp_docs", "movie_reviews_long", "sib200_16lang")


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
    for source in sources:
        texts = _read(source, options.text_column, options.rows)
        lines.append(_measure(source.stem, texts, options.max_length, options.repeats))
        print(lines[-1], flush=True)
    lines += ["", "Thousand tokens a second, one thread."]
    facts = {"encoder": "minilm", "max_length": options.max_length, "rows": options.rows, "repeats": options.repeats}
    write_result("tokenize", sources[0].stem if len(sources) == 1 else "real-texts", "\n".join(lines), facts)


def _read(source: Path, column: str, num_rows: int) -> pa.Array:
    files = [source] if source.is_file() else sorted(source.rglob("*.parquet"))
    table = pa.concat_tables([pq.read_table(file, columns=[column]) for file in files])
    return pa.concat_arrays(table[column].slice(0, num_rows).chunks)


def _measure(name: str, texts: pa.Array, max_length: int, num_repeats: int) -> str:
    """One line of the table."""
    reference, _ = load_tokenizer("minilm", max_length)
    reference.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    fast = reference.backend_tokenizer
    fast.no_padding()
    fast.enable_truncation(max_length)
    tokenizer = ColumnTokenizer(fast, max_length)
    assert tokenizer.is_fast, "nanotoken is not installed"

    def columnar() -> np.ndarray:
        return np.concatenate([tokenizer.encode(part).ids_T for part in _parts(texts)])

    def columnar_first() -> np.ndarray:
        tokenizer._texts._fast.clear_cache()
        return columnar()

    def encode_batch_fast() -> list[list[int]]:
        return [one.ids for part in _parts(texts) for one in fast.encode_batch_fast(part.to_pylist())]

    def call_transformers() -> list[list[int]]:
        ids: list[list[int]] = []
        for part in _parts(texts):
            ids += reference(part.to_pylist(), truncation=True, max_length=max_length)["input_ids"]
        return ids

    expected = np.array([one for ids in encode_batch_fast() for one in ids])
    ids_T = columnar()
    if not np.array_equal(ids_T, expected):
        raise AssertionError(f"{name}: other ids than the reference's")
    walls_s = interleaved(
        {"first": columnar_first, "again": columnar, "fast": encode_batch_fast, "transformers": call_transformers},
        num_repeats,
    )
    rates = {key: len(ids_T) / wall_s / 1e3 for key, wall_s in walls_s.items()}
    return (
        f"| {name}, {len(texts)} | {len(ids_T)} | "
        + " | ".join(f"{rate:.0f}" for rate in rates.values())
        + f" | {rates['first'] / rates['fast']:.1f} | {rates['first'] / rates['transformers']:.1f} |"
    )


def _parts(texts: pa.Array) -> Iterator[pa.Array]:
    return (texts[start : start + CALL_ROWS] for start in range(0, len(texts), CALL_ROWS))


if __name__ == "__main__":
    main()
