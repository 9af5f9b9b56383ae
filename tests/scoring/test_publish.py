"""What readers see: nothing of a run before it has passed the gate, and then all of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from bertray.drivers.forecast import preview
from bertray.drivers.score import ScoreResult, score
from bertray.errors import LockedError, RequestError
from bertray.scoring.config import ScoreConfig
from bertray.scoring.manifest import Manifest
from bertray.scoring.publish import is_under_way
from bertray.scoring.verify import verify
from bertray.storage.location import Location
from tests.conftest import write_shard
from tests.kills import dying_after
from tests.stub_pool import stub_pool


@pytest.fixture(params=["local", "s3"])
def config(request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path: Path) -> ScoreConfig:
    for day in ("monday", "tuesday"):
        for part in "01":
            write_shard(tmp_path / "archive" / day / f"{part}.parquet", [f"{day} text {row}" for row in range(40)])
    output = str(tmp_path / "scored") if request.param == "local" else request.getfixturevalue("s3_folder")
    return ScoreConfig(bundle=str(tiny_bundle), input=str(tmp_path / "archive"), output=output, accept=True)


def run(config: ScoreConfig, **options: Any) -> ScoreResult:
    return score(config.model_copy(update=options), open_pool=stub_pool())


def published(config: ScoreConfig) -> dict[str, bytes]:
    folder = Location.of(config.output) / "predictions"
    return {info.path: (folder / info.path).read_bytes() for info in folder.files()}


def problems(config: ScoreConfig) -> list[dict[str, str]]:
    return verify(Location.of(config.output))[1]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_held_run_changes_nothing_until_it_is_accepted(config: ScoreConfig) -> None:
    run(config)
    before = published(config)
    assert len(before) == 4 and not problems(config)
    write_shard(Path(config.input) / "wednesday.parquet", ["x"] * 400)
    write_shard(Path(config.input) / "monday" / "0.parquet", ["x"] * 400)
    (Path(config.input) / "tuesday" / "0.parquet").unlink()
    held = run(config, accept=False, prune=True)
    assert held.is_held and published(config) == before and not problems(config)
    assert preview(config)["num_shards_staged"] == 2
    accepted = run(config, prune=True).summary
    assert (accepted["num_shards_committed"], accepted["num_shards_staged"]) == (0, 2)
    assert published(config).keys() == {*before, "wednesday.parquet"} - {"tuesday/0.parquet"}
    assert not problems(config)
    assert not (Location.of(config.output) / "staging").exists()


def test_a_new_bundle_is_seen_when_all_is_scored(
    config: ScoreConfig, make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config)
    before = published(config)
    other = config.model_copy(update={"bundle": str(make_bundle(seed=1))})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bertray.drivers.score.profile_of", interrupt)  # all is scored, and nothing judged
        run(other)
    assert published(config) == before and not problems(config)
    (Path(config.input) / "monday" / "1.parquet").write_bytes(b"not Parquet")
    result = run(other)
    assert (result.summary["num_shards_staged"], result.summary["num_shards_older"]) == (3, 1)
    after = published(config)
    assert [path for path in before if after[path] == before[path]] == ["monday/1.parquet"]
    latest = json.loads((Location.of(config.output) / "runs/latest.json").read_bytes())
    assert latest["published"]["older"] == ["monday/1.parquet"]


@pytest.mark.parametrize("is_same", [True, False])
def test_a_publication_that_died_is_completed_first(
    is_same: bool, config: ScoreConfig, make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config)
    other = config.model_copy(update={"bundle": str(make_bundle(seed=1))})
    with dying_after(2, monkeypatch):
        run(other)
    output = Location.of(config.output)
    assert is_under_way(output)
    with pytest.raises(LockedError, match="if it died, the next bertray score completes it"):
        problems(config)
    result = run(other if is_same else config)
    assert result.summary["num_shards_committed"] == (0 if is_same else 4)
    assert not is_under_way(output) and not problems(config)
    (fingerprint,) = set(Manifest(output).latest()["fingerprint"].to_pylist())
    for path in published(config):
        with (output / "predictions" / path).open() as file:
            assert pq.read_schema(file).metadata[b"bertray.request_fingerprint"].decode() == fingerprint


def test_a_part_is_not_scored_otherwise_than_the_rest(config: ScoreConfig) -> None:
    run(config)
    monday = f"{config.input}/monday"
    with pytest.raises(RequestError, match=r"2 other shards .*tuesday/0\.parquet, have predictions of another bundle"):
        run(config, input=monday, precision="fp32", rescore=True)
    assert run(config, input=monday).summary["num_shards_skipped"] == 2


def test_what_is_pruned_is_no_longer_described(config: ScoreConfig) -> None:
    run(config)
    (Path(config.input) / "tuesday" / "1.parquet").unlink()
    summary = run(config, prune=True).summary
    assert (summary["num_outputs_pruned"], summary["gate"]) == (1, None)
    assert not problems(config)
    latest = json.loads((Location.of(config.output) / "runs/latest.json").read_bytes())
    assert (latest["published"]["num_shards"], latest["published"]["profile"]["num_rows"]) == (3, 120)


def test_what_is_staged_without_a_record_is_taken_up(config: ScoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run died in the seconds before it recorded: nothing is scored again but what cannot be read."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bertray.drivers.score.profile_of", interrupt)
        run(config)
    output = Location.of(config.output)
    (output / "staged").remove()
    broken = (output / "staging").files()[0]
    whole = (output / "staging" / broken.path).read_bytes()
    (output / "staging" / broken.path).put(b"PAR1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bertray.drivers.score.profile_of", interrupt)
        run(config)
    assert (output / "staging" / broken.path).read_bytes() == whole
    (output / "staged").remove()
    score(config, open_pool=interrupt)  # which is not called  # type: ignore[arg-type]
    assert len(published(config)) == 4 and not problems(config)
