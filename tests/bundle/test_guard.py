"""fp16 is used where it costs no accuracy; one process decides, the others follow, and what was decided is said."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertray import Bundle
from bertray.bundle import bundle as bundle_module
from bertray.bundle import guard
from bertray.bundle.guard import decided_before, user_cache
from bertray.cli import load_config
from bertray.drivers.config import EvaluateConfig, PredictConfig
from bertray.drivers.evaluate import evaluate
from bertray.drivers.score import score
from bertray.errors import UnavailableError
from bertray.model import encoder as encoder_module
from bertray.scoring.config import ScoreConfig
from bertray.storage.location import Location
from tests.bundle.conftest import TEXTS, copied, dataset
from tests.conftest import write_shard


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture(scope="module")
def overflowing_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle that is right in fp32 and has states of more than 65,504, which are infinite in fp16."""
    folder = tmp_path_factory.mktemp("overflowing")
    large = folder / "large"
    unsealed = copied(tiny_bundle, large, str(_any_data(tiny_bundle, folder)))
    weights = load_file(large / "model.safetensors")
    weights["bert.encoder.layer.0.intermediate.dense.weight"] *= 1e5
    save_file(weights, large / "model.safetensors", metadata={"format": "pt"})
    _seal_again(large)
    return copied(Path(unsealed), folder / "bundle", dataset(folder / "labelled", large, right=True))


def _any_data(bundle: Path, folder: Path) -> str:
    return dataset(folder / "any", bundle, right=False)


def _seal_again(folder: Path) -> None:
    from bertray.bundle.info import hash_files

    info = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**info, "files": hash_files(folder)}))


def test_fp16_is_used_where_it_costs_nothing(never_right_bundle: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="bertray"):
        bundle = Bundle.load(never_right_bundle, "fp16", "cpu")
    assert bundle.precision == "fp16"
    assert {weights.dtype for weights in bundle.encoder.model.bert.parameters()} == {torch.float16}
    assert "fp16: accuracy on 120 validation rows is 0.0" in caplog.text
    record = decided_before(user_cache(), bundle.info)
    assert record is not None and record.is_fp16 and record.num_validation_rows == 120
    assert 0.95 < (record.label_agreement_fp16 or 0) <= 1


def test_a_model_that_overflows_is_run_in_fp32(
    overflowing_bundle: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.load(overflowing_bundle, "fp16", "cpu")
    assert bundle.precision == "fp32"
    assert "warning: not fp16: accuracy on 120 validation rows is 0.0000, in fp32 1.0000" in caplog.text
    assert all(one.error is None for one in bundle.predict(TEXTS))

    write_shard(tmp_path / "archive" / "one.parquet", TEXTS)
    places = {"bundle": overflowing_bundle, "input": str(tmp_path / "archive"), "output": str(tmp_path / "scored")}
    summary = score(ScoreConfig(**places, precision="fp16", num_actors=0)).summary
    assert (summary["precision"], summary["accuracy_fp32"], summary["accuracy_fp16"]) == ("fp32", 1.0, 0.0)
    assert summary["engine_note"].startswith("not fp16: ")


def test_auto_takes_it_on_a_gpu_without_bf16(never_right_bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_t4(precision: str, _: torch.device) -> str:
        return "fp16" if precision == "auto" else precision

    for module in (bundle_module, encoder_module):
        monkeypatch.setattr(module, "resolve_precision", on_a_t4)
    assert Bundle.load(never_right_bundle, device="cpu").precision == "fp16"
    assert Bundle.load(never_right_bundle, "fp32", "cpu").precision == "fp32"


def test_one_process_decides_for_all(
    never_right_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Location.of(str(tmp_path / "cache"))
    assert Bundle.load(never_right_bundle, "fp16", "cpu", cache).precision == "fp16"
    file = next((tmp_path / "cache").rglob("fp16.json"))
    other = json.loads(file.read_text()) | {"is_fp16": False, "note": "not fp16: another process says"}
    file.write_text(json.dumps(other))
    assert Bundle.load(never_right_bundle, "fp16", "cpu", cache).precision == "fp32"

    # Another process decides while this one measures: what it kept holds.
    file.unlink()
    measure = guard.measure

    def overtaken(*arguments: object) -> dict[str, object]:
        file.write_text(json.dumps(other))
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(guard, "measure", overtaken)
    assert Bundle.load(never_right_bundle, "fp16", "cpu", cache).precision == "fp32"

    monkeypatch.setattr(guard, "measure", measure)
    file.write_text("{")
    assert Bundle.load(never_right_bundle, "fp16", "cpu", cache).precision == "fp16"
    assert "fp16.json cannot be read, so fp16 is measured again" in caplog.text
    assert json.loads(file.read_text())["is_fp16"]


def test_the_summary_speaks_of_fp16_where_it_was_in_question(never_right_bundle: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "archive" / "one.parquet", TEXTS)
    places = {"bundle": never_right_bundle, "input": str(tmp_path / "archive"), "output": str(tmp_path / "scored")}
    for precision, is_said in (("fp16", True), ("fp32", False), ("bf16", False)):
        summary = score(ScoreConfig(**places, precision=precision, num_actors=0, accept=True, rescore=True)).summary
        assert summary["precision"] == precision
        assert ("accuracy_fp16" in summary) is is_said


@pytest.mark.parametrize("fault", ["read-only", "a folder in its place"])
def test_a_cache_that_cannot_be_written_costs_the_record_alone(
    fault: str, never_right_bundle: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Path(str(guard.place_of(user_cache(), Bundle.load(never_right_bundle, "fp32", "cpu").info)))
    if fault == "read-only":
        place.parent.mkdir(parents=True)
        place.write_text("a file where the folder should be")
    else:
        (place / "fp16.json").mkdir(parents=True)
    assert Bundle.load(never_right_bundle, "fp16", "cpu").precision == "fp16"
    assert "the decision on fp16 cannot be kept, so the next process measures again" in caplog.text


def test_data_that_cannot_be_read_now_is_asked_for_again(
    never_right_bundle: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as outage:

        def refuse(_: object) -> None:
            raise UnavailableError("s3://bucket/data does not answer")

        outage.setattr(guard, "training_data", refuse)
        assert Bundle.load(never_right_bundle, "fp16", "cpu").precision == "fp32"
    assert "no texts to measure it on: s3://bucket/data does not answer" in caplog.text
    with caplog.at_level("INFO", logger="bertray"):
        assert Bundle.load(never_right_bundle, "fp16", "cpu").precision == "fp16"
        assert Bundle.load(never_right_bundle, "fp16", "cpu").precision == "fp16"
    assert "fp16.json to decide again" in caplog.text


def test_without_the_training_data_there_is_no_fp16(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Bundle.load(str(tiny_bundle), "fp16", "cpu").precision == "fp32"
    assert "warning: not fp16, because there are no texts to measure it on: " in caplog.text


def test_evaluate_says_what_was_measured(never_right_bundle: str, tmp_path: Path) -> None:
    data = json.loads((Path(never_right_bundle) / "bundle.json").read_text())["training"]["data"]
    config = EvaluateConfig(
        bundle=never_right_bundle, data=data, output=str(tmp_path / "evaluation"), precision="fp16", split="validation"
    )
    metrics = evaluate(config).metrics
    assert (metrics["precision"], metrics["accuracy_fp32"]) == ("fp16", 0.0)
    assert metrics["accuracy_fp16"] == metrics["accuracy"]


def test_openvino_has_no_fp16(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="precision fp16 needs engine torch, and engine is openvino"):
        load_config("predict", PredictConfig, ["--bundle", "b", "--precision", "fp16", "--engine", "openvino", "text"])
