"""The demo's corpus: passages of docstrings and their sections (demo_NOTICE.txt), and an archive of others to score."""

from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet as pq

NUM_LABELLED, NUM_ARCHIVE = 3000, 4000
# Where shards end, in fiftieths of the archive: they are of uneven size.
_SHARD_ENDS = (0, 3, 10, 12, 22, 27, 35, 39, 50)


def write_corpus(folder: Path, num_labelled: int, num_archive: int) -> Path:
    """Write `folder`/labelled.csv and 8 shards below `folder`/archive, two a day; return the path of the former."""
    # benchmarks/docstrings.py wrote both files.
    archive = pq.ParquetFile(Path(__file__).with_name("demo_archive.parquet")).read(use_threads=False)
    for number, ends in enumerate(pairwise(_SHARD_ENDS)):
        start, end = (num_archive * one // 50 for one in ends)
        day = date(2026, 1, 5) + timedelta(days=number // 2)
        shard = folder / "archive" / f"date={day}" / f"part-{number % 2:04d}.parquet"
        shard.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(archive.slice(start, end - start), shard)
    labelled = pq.ParquetFile(Path(__file__).with_name("demo_labelled.parquet")).read(use_threads=False)
    pyarrow.csv.write_csv(labelled.slice(0, num_labelled), folder / "labelled.csv")
    return folder / "labelled.csv"
