"""OpenVINO gives torch's logits; int8 is used where it costs no accuracy, and what was decided is said and kept."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bertray import Bundle
from bertray.bundle import guard, openvino
from bertray.bundle.openvino import load_prepared, open_bundle
from bertray.cli import load_config
from bertray.data.config import PrepareConfig
from bertray.data.prepare import prepare
from bertray.drivers.config import EvaluateConfig, PredictConfig
from bertray.drivers.evaluate import evaluate
from bertray.drivers.score import score
from bertray.errors import BundleError, RequestError
from bertray.scoring.config import ScoreConfig
from bertray.storage.location import Location
from tests.bundle.conftest import TEXTS, copied, dataset
from tests.conftest import ROOT, run_job_process, write_shard


@pytest.fixture(scope="module")
def cache(never_right_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Location:
    """A cache that holds the bundle above, in int8. Read only: copy it to change it."""
    place = Location.of(str(tmp_path_factory.mktemp("cache")))
    assert openvino.prepare(never_right_bundle, "auto", place).is_int8
    return place


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("exported again")

    monkeypatch.setattr(openvino, "export", refuse)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_are_those_of_torch(tiny_bundle: Path, tmp_path: Path, precision: Any) -> None:
    reference = Bundle.load(str(tiny_bundle), "fp32", "cpu")
    bundle, summary = open_bundle(str(tiny_bundle), "openvino", precision, cache=Location.of(str(tmp_path)))
    tokens = bundle.tokenizer.encode(pa.array([*TEXTS, None, "", "one"], pa.string()))
    expected_SC, logits_SC = reference.encoder.logits(tokens), bundle.encoder.logits(tokens)
    assert (logits_SC.dtype, logits_SC.shape) == (np.float32, (len(TEXTS) + 1, 3))
    if bundle.encoder.precision == "fp32":  # also where the processor has no bf16
        np.testing.assert_allclose(logits_SC, expected_SC, atol=1e-4)
    else:
        # Weights of 0.5 make rounding errors grow: torch's own bf16 is off by 0.08 on average, 0.5 at most.
        assert np.abs(logits_SC - expected_SC).mean() < 0.15
        assert np.mean(logits_SC.argmax(axis=1) == expected_SC.argmax(axis=1)) > 0.95
        rounded_SC = torch.from_numpy(logits_SC).bfloat16().float().numpy()
        assert not np.array_equal(
            logits_SC, rounded_SC
        )  # the last layer's output is not rounded: close labels do not tie
    assert summary == {"engine": "openvino", "engine_note": f"{precision}, as requested"}
    assert [one.error for one in bundle.predict([None, "text"])] == ["text is null", None]
    assert bundle.predict([]) == []


def test_int8_is_used_where_it_costs_nothing(never_right_bundle: str, cache: Location, no_export: None) -> None:
    bundle, summary = open_bundle(never_right_bundle, "openvino", "auto", cache=cache)
    assert bundle.encoder.precision == "int8"
    assert summary["accuracy_fp32"] == 0
    assert summary["accuracy_drop_points"] == pytest.approx(-100 * summary["accuracy_int8"], abs=1e-3)
    assert summary["engine_note"].startswith("int8: accuracy on 120 validation rows is 0.")
    place = next(Path(cache.path).rglob("engine.json")).parent
    assert place.parts[-1] == "int8" and place.parts[-2] == bundle.info.fingerprint()[:16]
    record = json.loads((place / "engine.json").read_text())
    assert (record["num_calibration_rows"], record["num_validation_rows"]) == (108, 120)  # 12 are the test split's
    assert {"openvino", "nncf", "torch"} <= record["versions"].keys()
    assert "FakeQuantize" in (place / "model.xml").read_text()
    tokens = bundle.tokenizer.encode(pa.array(TEXTS))
    expected_SC = Bundle.load(never_right_bundle, "fp32", "cpu").encoder.logits(tokens)
    logits_SC = bundle.encoder.logits(tokens)
    # Random weights of 0.5 in 32 dimensions leave int8 little to work with; trained ones are off by 0.03.
    assert 0.8 < np.corrcoef(logits_SC.ravel(), expected_SC.ravel())[0, 1] < 0.99999


def test_with_several_labels_a_row_all_of_them_count(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    thresholds = (0.4, 0.5, 0.9)
    several = make_bundle(problem_type="multi_label_classification", thresholds=thresholds)
    answers = Bundle.load(str(several), "fp32", "cpu").predict(TEXTS)
    validation = [{"text": text, "label": one.labels} for text, one in zip(TEXTS, answers, strict=True)]
    train = [{"text": f"training {text}", "label": ["abc"[row % 3]]} for row, text in enumerate(TEXTS)]
    for name, rows in (("train", train), ("validation", validation)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"input": [str(tmp_path / "train.jsonl")], "validation": str(tmp_path / "validation.jsonl")}
    prepare(PrepareConfig(**files, output=str(tmp_path / "data"), multi_label=True))
    uri = copied(several, tmp_path / "bundle", str(tmp_path / "data"))
    bundle, summary = open_bundle(uri, "openvino", "int8", cache=Location.of(str(tmp_path / "cache")))
    assert summary["accuracy_fp32"] == 1.0
    assert 0 < summary["accuracy_int8"] == summary["label_agreement_int8"] < 1
    found = bundle.predict([*TEXTS, None])
    assert np.mean([one.labels == other.labels for one, other in zip(found, answers, strict=False)]) > 0.8
    assert found[-1].labels is None


def test_int8_that_loses_accuracy_is_not_used(
    tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = copied(tiny_bundle, tmp_path / "bundle", dataset(tmp_path / "labelled", tiny_bundle, right=True))
    with caplog.at_level("WARNING", logger="bertray"):
        bundle, summary = open_bundle(uri, "openvino", "int8", cache=Location.of(str(tmp_path / "cache")))
    assert bundle.encoder.precision in {"bf16", "fp32"}
    assert summary["accuracy_fp32"] == 1.0
    assert summary["accuracy_drop_points"] == pytest.approx(100 * (1 - summary["accuracy_int8"]), abs=1e-3)
    assert summary["accuracy_drop_points"] > 0.3
    assert summary["label_agreement_int8"] == summary["accuracy_int8"]
    assert "above the limit of 0.3" in summary["engine_note"]
    assert "warning: openvino: not int8: accuracy on 120 validation rows is 0." in caplog.text


def test_the_limit_decides(never_right_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_DROP_POINTS", -101)
    record = openvino.prepare(never_right_bundle, "auto", Location.of(str(tmp_path)))
    assert not record.is_int8
    assert (record.accuracy_drop_points or 0) <= 0
    assert "FakeQuantize" not in next(tmp_path.rglob("model.xml")).read_text()


def test_without_the_training_data_there_is_no_int8(
    tiny_bundle: Path, never_right_bundle: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone, changed = tmp_path / "gone", tmp_path / "changed"
    for folder in (gone, changed):
        shutil.copytree(never_right_bundle, folder)
    info = json.loads((gone / "bundle.json").read_text())
    (gone / "bundle.json").write_text(json.dumps(info | {"training": {**info["training"], "data": "/nowhere"}}))
    (changed / "bundle.json").write_text(json.dumps(info | {"data_fingerprint": "1" * 64}))
    for folder, message in ((gone, "/nowhere is no finished data set"), (changed, "is not the one that the bundle")):
        with caplog.at_level("INFO", logger="bertray"):
            bundle, summary = open_bundle(str(folder), "openvino", cache=Location.of(f"{folder}-cache"))
        assert bundle.encoder.precision in {"bf16", "fp32"}
        assert "accuracy_int8" not in summary
        assert message in summary["engine_note"]
        assert message in caplog.text


@pytest.mark.parametrize("damage", ["model.bin cut", "engine.json cut", "model.xml gone", "engine.json gone"])
def test_a_broken_cache_is_made_again(
    never_right_bundle: str, cache: Location, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(cache.path, tmp_path / "cache")
    broken = Location.of(str(tmp_path / "cache"))
    name, what = damage.split()
    file = next((tmp_path / "cache").rglob(name))
    before = file.read_bytes()
    if what == "gone":
        file.unlink()
    else:
        file.write_bytes(before[: len(before) // 2])
    with pytest.raises(BundleError, match=r"exported model at .* cannot be used: .*\. Run the job again"):
        load_prepared(never_right_bundle, "auto", broken)

    def export(_folder: Path, _info: object, _precision: str, staging: Path) -> Any:
        place = next(Path(cache.path).rglob("engine.json")).parent
        shutil.copytree(place, staging, dirs_exist_ok=True)
        return openvino.EngineRecord.model_validate_json((staging / "engine.json").read_bytes())

    monkeypatch.setattr(openvino, "export", export)
    openvino.prepare(never_right_bundle, "auto", broken)
    assert file.read_bytes() == before
    assert load_prepared(never_right_bundle, "auto", broken, num_threads=1).encoder.precision == "int8"


def test_the_cache_may_be_in_s3(tiny_bundle: Path, s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Location.of(f"{s3_folder}/engine")
    openvino.prepare(str(tiny_bundle), "fp32", place)
    monkeypatch.setattr(openvino, "export", None)
    openvino.prepare(str(tiny_bundle), "fp32", place)
    assert load_prepared(str(tiny_bundle), "fp32", place).predict(["a text"])[0].label in set("abc")


@pytest.mark.services
def test_scores_of_an_archive(never_right_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, output = tmp_path / "archive", tmp_path / "scored"
    for part in range(3):
        write_shard(archive / f"{part}.parquet", [None, *TEXTS[part * 30 : part * 30 + 30]])

    def run(**options: Any) -> dict[str, Any]:
        places = {"bundle": never_right_bundle, "input": str(archive), "output": str(output)}
        scored = score(ScoreConfig(**places, num_actors=0, accept=True, rescore=True, **options))
        assert scored.failures == []
        return scored.summary

    def predictions() -> pa.Table:
        return pa.concat_tables(pq.ParquetFile(output / "predictions" / f"{part}.parquet").read() for part in range(3))

    summary = run(engine="openvino")
    assert (summary["engine"], summary["precision"], summary["num_rows"]) == ("openvino", "int8", 93)
    assert summary["accuracy_fp32"] == 0 >= summary["accuracy_drop_points"]
    run_id = json.loads((output / "runs" / "latest.json").read_text())["run_id"]
    written = json.loads((output / "runs" / run_id / "summary.json").read_text())
    assert written["accuracy_int8"] == summary["accuracy_int8"]
    bundle = load_prepared(never_right_bundle, "auto", Location.of(str(output / "engine")))
    expected = bundle.predict([text for part in range(3) for text in (None, *TEXTS[part * 30 : part * 30 + 30])])
    assert predictions()["error"].to_pylist() == [one.error for one in expected]
    assert predictions()["label"].to_pylist() == [one.label for one in expected]

    with monkeypatch.context() as patch:
        patch.setattr("bertray.bundle.openvino.prepare", None)
        again = run(engine="openvino")
    assert (again["engine"], again["num_shards_skipped"], again["num_shards_committed"]) == ("openvino", 3, 0)

    assert run(engine="openvino", precision="fp32")["precision"] == "fp32"
    of_openvino = predictions()
    summary = run(engine="torch", precision="fp32")
    assert (summary["engine"], summary["num_shards_committed"]) == ("torch", 3)  # another engine: all again
    of_torch = predictions()
    assert of_openvino["label"].equals(of_torch["label"])
    scores = [[score for score in table["score"].to_pylist() if score is not None] for table in (of_openvino, of_torch)]
    np.testing.assert_allclose(*scores, atol=1e-4)
    assert not of_openvino["score"].equals(of_torch["score"])


def test_evaluation_tells_the_engine(never_right_bundle: str, cache: Location, tmp_path: Path, no_export: None) -> None:
    home = tmp_path / "home" / "bertray"
    home.mkdir(parents=True)
    shutil.copytree(cache.path, home / "engine")
    data = json.loads((Path(never_right_bundle) / "bundle.json").read_text())["training"]["data"]
    config = EvaluateConfig(
        bundle=never_right_bundle, data=data, output=str(tmp_path / "evaluation"), engine="openvino"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        metrics = evaluate(config).metrics
    assert (metrics["engine"], metrics["precision"], metrics["accuracy_fp32"]) == ("openvino", "int8", 0)


def test_a_missing_package_is_named(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(RequestError, match=r"needs the extra 'openvino'\. On every node: pip install '"):
        open_bundle(str(tiny_bundle), "openvino", cache=Location.of(str(tmp_path)))
    assert open_bundle(str(tiny_bundle), "auto", "fp32")[1] == {"engine": "torch"}


def test_a_model_that_cannot_be_exported_is_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = openvino.LogitsOnly.forward

    def of_one_length(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return forward(self, input_ids, attention_mask) * len(input_ids.numpy())  # a constant in a traced graph

    monkeypatch.setattr(openvino.LogitsOnly, "forward", of_one_length)
    with pytest.raises(RequestError, match=r"gives other logits .*Use --engine torch"):
        open_bundle(str(tiny_bundle), "openvino", "fp32", cache=Location.of(str(tmp_path)))

    def fails(*_: object) -> torch.Tensor:
        raise NotImplementedError("no such operator")  # as torch says of an operator that a backend lacks

    monkeypatch.setattr(openvino.LogitsOnly, "forward", fails)
    with pytest.raises(RequestError, match=r"BertForSequenceClassification cannot be exported .*Use --engine torch"):
        open_bundle(str(tiny_bundle), "openvino", "fp32", cache=Location.of(str(tmp_path)))
    assert not list(tmp_path.rglob("engine.json"))


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(RequestError, match=r"precision int8 needs engine openvino, and engine is auto"):
        load_config("predict", PredictConfig, ["--bundle", "b", "--precision", "int8"])
    places = ["--bundle", "b", "--input", "i", "--output", "o", "--engine", "openvino"]
    with pytest.raises(RequestError, match=r"engine openvino runs on CPUs, and device is cuda"):
        load_config("score", ScoreConfig, [*places, "--device", "cuda"])
    assert load_config("score", ScoreConfig, [*places, "--precision", "int8"]).precision == "int8"


@pytest.mark.services
def test_from_the_command_line(tiny_bundle: Path, tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    finished = run_job_process(
        "predict", "--bundle", tiny_bundle, "--engine", "openvino", "a text", "another", env=environment
    )
    assert finished.returncode == 0, finished.stderr
    assert [json.loads(line)["text"] for line in finished.stdout.splitlines()] == ["a text", "another"]
    assert "not int8, because there are no texts to calibrate" in finished.stderr
    assert list((tmp_path / "bertray" / "engine").rglob("engine.json"))


@pytest.mark.services
def test_nothing_is_reported_to_anyone(tmp_path: Path) -> None:
    code = """
import sys
sockets = []
sys.addaudithook(lambda event, _: sockets.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)
from bertray.bundle import openvino
openvino.optional_package("openvino"), openvino.optional_package("nncf")
import openvino.tools.ovc, threading
for thread in threading.enumerate():
    if thread is not threading.main_thread() and not thread.daemon:
        thread.join(10)
print(sockets, sys.modules["openvino_telemetry"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip().splitlines()[-1] == "[] None"
    assert not (tmp_path / "intel").exists()  # where an identifier of this machine would be kept
