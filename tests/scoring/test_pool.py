"""The pool of one process, with a real model in its child, beside the bundle in this process."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray import Bundle, BundleError, RequestError, ScoreConfig, score
from bertray.errors import UnavailableError
from bertray.scoring.score_unit import LocalPool, Request
from bertray.scoring.units import Counts, Outcome, divide
from bertray.storage.location import FileInfo
from tests.conftest import write_shard
from tests.stub_pool import Stub, stub_pool


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    for name in ("a", "b/c"):
        write_shard(tmp_path / "archive" / f"{name}.parquet", [f"{name} {row}" for row in range(20)] + [None, ""])
    return tmp_path / "archive"


@pytest.mark.services
def test_it_scores_what_the_bundle_says(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    places = {"bundle": str(tiny_bundle), "input": str(archive), "output": str(tmp_path / "scored")}
    config = ScoreConfig(**places, num_actors=0, precision="fp32", keep_columns=["document_id"])
    scored = score(config)
    assert (scored.failures, scored.is_held) == ([], False)
    assert (scored.summary["num_rows"], scored.summary["num_rows_error"]) == (44, 4)
    assert (scored.summary["precision"], scored.summary["num_actors"]) == ("fp32", 1)
    bundle = Bundle.load(str(tiny_bundle), "fp32")
    for name in ("a", "b/c"):
        source, found = (
            pq.read_table(tmp_path / place / f"{name}.parquet") for place in ("archive", "scored/predictions")
        )
        assert found.select(bundle.schema.names).equals(bundle.predict_column(source["text"]))
        assert found["document_id"].equals(source["document_id"])
    assert score(config).summary["num_shards_skipped"] == 2


@pytest.mark.services
def test_the_driver_loads_neither_torch_nor_ray(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from bertray.__main__ import main; code = main(sys.argv[1:]); "
        "print(code, *sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    options = {"--bundle": tiny_bundle, "--input": archive, "--output": tmp_path / "scored", "--num-actors": 0}
    words = [str(word) for option in options.items() for word in option]
    done = subprocess.run([sys.executable, "-c", code, "score", *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0", done.stderr


@pytest.mark.services
def test_what_the_child_cannot_do_is_its_message(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    places = {"bundle": str(tiny_bundle), "input": str(archive), "output": str(tmp_path / "scored")}
    with pytest.raises(RequestError, match=r"--device cuda: torch .* sees no GPU here"):
        score(ScoreConfig(**places, num_actors=0, device="cuda"))
    assert not (tmp_path / "scored" / "predictions").exists()


def test_a_model_that_can_no_longer_be_loaded_ends_the_run(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    class Gone(Stub):
        def predict_column(self, texts: pa.Array) -> pa.Table:
            raise BundleError("it was replaced")

    @contextmanager
    def open_pool(request: Request, _: list[FileInfo]) -> Iterator[LocalPool]:
        yield LocalPool(request, Gone())

    places = {"bundle": str(tiny_bundle), "input": str(archive), "output": str(tmp_path / "scored")}
    with pytest.raises(BundleError, match="it was replaced"):
        score(ScoreConfig(**places), open_pool=open_pool)


@contextmanager
def pool_of(model: Stub, request: Request, _: list[FileInfo]) -> Iterator[LocalPool]:
    yield LocalPool(request, model)


class Sick(Stub):
    """Fails on any text."""

    def predict_column(self, texts: pa.Array) -> pa.Table:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_machine_that_fails_three_times_ends_the_run(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    for number in range(9):
        write_shard(archive / f"{number}.parquet", ["text"])
    config = ScoreConfig(bundle=str(tiny_bundle), input=str(archive), output=str(tmp_path / "scored"))
    with pytest.raises(UnavailableError, match=r"no machine is left that can score.*No space left on device"):
        score(config, open_pool=partial(pool_of, Sick()))
    assert score(config, open_pool=stub_pool()).summary["num_shards_committed"] == 11


def test_what_the_machine_could_not_do_is_tried_three_times(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    class Flaky(Stub):
        def __init__(self, num_failures: int) -> None:
            self.num_failures = num_failures

        def predict_column(self, texts: pa.Array) -> pa.Table:
            if texts[0].as_py() == b"a 0" and self.num_failures:
                self.num_failures -= 1
                raise MemoryError("no memory")
            return super().predict_column(texts)

    config = ScoreConfig(bundle=str(tiny_bundle), input=str(archive), output=str(tmp_path / "scored"))
    scored = score(config, open_pool=partial(pool_of, Flaky(2)))
    assert (scored.failures, scored.summary["num_shards_committed"]) == ([], 2)
    (at_fault,) = scored.summary["sick_nodes"]
    assert (at_fault["num_failures"], at_fault["last"]) == (2, "MemoryError: no memory")
    other = config.model_copy(update={"output": str(tmp_path / "other")})
    scored = score(other, open_pool=partial(pool_of, Flaky(3)))
    assert scored.failures == [{"path": "a.parquet", "reason": "MemoryError: no memory"}]
    assert scored.summary["num_shards_committed"] == 1


# Says what Ray will find in the environment when it is imported, or that it was not.
WATCHING = """
import json, os, sys
from importlib.abc import MetaPathFinder

class Watch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "ray":
            print(os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
from bertray import ScoreConfig, score
score(ScoreConfig(**json.loads(sys.argv[1])))
print("done")
"""


@pytest.mark.services
@pytest.mark.parametrize(("num_actors", "expected"), [(1, "0"), (0, "done")])
def test_what_a_program_starts_listens_on_loopback(
    num_actors: int, expected: str, archive: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Ray reads a variable when it is imported; the command line's own start is tested with a cluster."""
    places = {"bundle": str(tiny_bundle), "input": str(archive), "output": str(tmp_path / "scored")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", WATCHING, json.dumps(places | {"num_actors": num_actors})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected, done.stderr


def test_a_shard_is_complete_with_its_last_part() -> None:
    whole, cut = FileInfo("whole", 100, "v"), FileInfo("cut", 390, "v")
    work = divide([whole, cut], 100, 1, "request", set())
    assert work.complete() == []
    assert work.take(Outcome(shard=whole, counts=Counts())) is None
    assert [work.take(Outcome(shard=cut, part=part)) for part in (3, 0, 1)] == [None] * 3
    assert work.take(Outcome(shard=cut, part=2, failure="why")) is None
    assert work.take(Outcome(shard=cut, part=2)) == cut
