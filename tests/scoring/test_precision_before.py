"""An output goes on in one precision: as was decided, or as an earlier version has scored it."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from bertray.bundle.guard import PrecisionDecision, decided, keep, place_of
from bertray.bundle.info import BundleInfo, read_info
from bertray.drivers.forecast import preview
from bertray.drivers.score import score
from bertray.errors import RequestError
from bertray.scoring.config import ScoreConfig
from bertray.scoring.units import ENGINE_FOLDER
from bertray.storage.location import Location
from tests.conftest import write_shard
from tests.stub_pool import Stub, stub_pool


@pytest.fixture
def info(tiny_bundle: Path) -> BundleInfo:
    return read_info(Location.of(str(tiny_bundle)))


@pytest.fixture
def config(tiny_bundle: Path, tmp_path: Path) -> ScoreConfig:
    return ScoreConfig(
        bundle=str(tiny_bundle), input=str(tmp_path / "archive"), output=str(tmp_path / "scored"), accept=True
    )


def night(
    config: ScoreConfig, name: str, precision: str, monkeypatch: pytest.MonkeyPatch, text: str = "a text"
) -> dict[str, Any]:
    """Score a new shard with a stub in this precision; a stub decides nothing, as processes of an earlier version."""
    monkeypatch.setattr(Stub, "precision", precision)
    write_shard(Path(config.input) / f"{name}.parquet", [text])
    return score(config, open_pool=stub_pool()).summary


def engine(config: ScoreConfig) -> Location:
    return Location.of(config.output) / ENGINE_FOLDER


def test_an_output_of_an_earlier_version_goes_on(
    config: ScoreConfig, info: BundleInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    night(config, "a", "bf16", monkeypatch)
    # The gate holds the second night back: of its shard a record in staged/ says it.
    held = config.model_copy(update={"accept": False, "max_error_fraction": 0.0})
    assert night(held, "b", "bf16", monkeypatch, text="")["gate"] == "held"
    shutil.rmtree(str(engine(config)))

    write_shard(Path(config.input) / "c.parquet", ["a third"])
    planned = preview(config)
    assert (planned["precision"], planned["num_shards_pending"], planned["num_shards_anew"]) == ("bf16", 1, 0)
    assert planned["engine_note"].startswith("scored so before: ")
    assert decided(engine(config), info) is None  # a plan writes nothing

    summary = night(config, "c", "bf16", monkeypatch)
    assert (summary["num_shards_committed"], summary["num_shards_anew"]) == (1, 0)
    assert summary["engine_note"] == planned["engine_note"] == "scored so before: 2 shards in bf16"
    decision = decided(engine(config), info)
    assert decision is not None and (decision.precision, decision.reason) == ("bf16", planned["engine_note"])

    night(config, "d", "fp32", monkeypatch)  # whatever is scored later, the decision stays
    assert decided(engine(config), info) == decision


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [("bf16", "fp32", "1 shards in bf16, 1 shards in fp32"), ("bf16+fp32", "bf16+fp32", "2 shards in bf16+fp32")],
)
def test_of_two_precisions_none_is_taken(
    first: str,
    second: str,
    said: str,
    config: ScoreConfig,
    info: BundleInfo,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    night(config, "a", first, monkeypatch)
    shutil.rmtree(str(engine(config)), ignore_errors=True)
    night(config, "b", second, monkeypatch)
    shutil.rmtree(str(engine(config)), ignore_errors=True)
    caplog.clear()
    summary = night(config, "c", second, monkeypatch)
    assert decided(engine(config), info) is None and "engine_note" not in summary
    assert f"scored has {said}: --precision fp32 --rescore" in caplog.text


def test_records_of_another_request_say_nothing(
    config: ScoreConfig, info: BundleInfo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    night(config.model_copy(update={"precision": "fp32"}), "a", "fp32", monkeypatch)
    night(config.model_copy(update={"precision": "fp32"}), "b", "fp32", monkeypatch)
    assert not (Path(config.output) / ENGINE_FOLDER).exists()  # what is named needs no decision
    night(config.model_copy(update={"rescore": True}), "c", "bf16", monkeypatch)
    assert decided(engine(config), info) is None
    assert "shards in" not in caplog.text


def test_a_decision_that_cannot_be_read_ends_the_run_before_anything_is_scored(
    config: ScoreConfig, info: BundleInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    night(config, "a", "bf16", monkeypatch)
    file = Path(str(place_of(engine(config), info))) / "decision.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{")
    runs = sorted((Path(config.output) / "runs").iterdir())
    for run in (score, preview):
        write_shard(Path(config.input) / "b.parquet", ["a text"])
        with pytest.raises(RequestError, match=r"decision.json does not say what --precision auto is"):
            run(config)
    assert (file.read_text(), sorted((Path(config.output) / "runs").iterdir())) == ("{", runs)
    assert night(config.model_copy(update={"precision": "fp32", "rescore": True}), "b", "fp32", monkeypatch)["num_rows"]


@pytest.mark.services
def test_a_model_runs_in_what_was_decided(config: ScoreConfig, info: BundleInfo) -> None:
    write_shard(Path(config.input) / "a.parquet", ["a text"])
    config = config.model_copy(update={"num_actors": 0, "device": "cpu"})
    decision = PrecisionDecision(bundle_fingerprint=info.fingerprint(), precision="fp32", reason="a CPU was first")
    keep(engine(config), info, decision)
    summary = score(config).summary
    assert (summary["precision"], summary["engine_note"]) == ("fp32", "a CPU was first")
