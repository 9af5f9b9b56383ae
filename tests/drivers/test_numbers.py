"""Numbers instead of labels, through the jobs: what each file holds, and that answers are in the user's unit."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import pipeline

from bertray import Bundle
from bertray.bundle.info import read_info
from bertray.data.dataset import Dataset
from bertray.drivers.audit import audit
from bertray.errors import RequestError
from bertray.schema import REGRESSION_PREDICTION_SCHEMA, SPLITS, suspect_schema
from bertray.storage.location import Location
from bertray.training.config import AuditConfig
from jobs import evaluate, predict, prepare, score, train, verify
from tests.conftest import write_shard

OPTIONS = ["--max-length=32", "--epochs=4", "--learning-rate=3e-3", "--batch-size=16", "--precision=fp32"]
CUTS = (1955.0, 1975.0)
WORDS = ["gramophone", "television", "satellite", "computer"]


def a_text(number: int) -> tuple[str, float]:
    """A year that its words tell, but for some noise: far from 0, and of a small deviation for its size."""
    chosen = number % len(WORDS)
    return f"page {number} is about the {WORDS[chosen]} " + "and so on " * (number % 3), 1950.0 + 10 * chosen


def texts(start: int, num_rows: int) -> list[tuple[str, float]]:
    rng = np.random.default_rng(start)
    return [(text, year + round(rng.normal(), 1)) for text, year in map(a_text, range(start, start + num_rows))]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("years")
    with (folder / "pages.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "year"), *texts(0, 400)])
    arguments = ["--input", str(folder / "pages.csv"), "--label-column", "year", "--regression"]
    assert prepare.main([*arguments, "--output", str(folder / "data")]) == 0
    return folder / "data"


def trained(dataset: Path, encoder: str, output: Path, *options: str) -> Path:
    common = ["--data", str(dataset), "--encoder", encoder, "--num-workers", "0", "--output", str(output)]
    assert train.main([*common, *OPTIONS, *options]) == 0
    return output


@pytest.fixture(scope="module")
def bundle(dataset: Path, calm_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "bundle"
    return trained(dataset, calm_encoder, output, "--cuts", ",".join(map(str, CUTS)), "--coverage", "0.8")


def test_the_data_set_has_numbers(dataset: Path) -> None:
    found = Dataset.open(str(dataset))
    assert (found.problem_type, found.labels) == ("regression", ("value",))
    report = json.loads((dataset / "report.json").read_text())
    for split in SPLITS:
        values = found.split(split)["value"].to_numpy()
        assert report["values"][split]["median"] == np.median(values)
        assert abs(values.mean() - 1965) < 2  # all tenths of the values are in every split
    assert report["labels"] == {}


def test_answers_are_in_the_users_unit(bundle: Path, dataset: Path) -> None:
    info, rows = read_info(Location.of(str(bundle))), Dataset.open(str(dataset)).split("test")
    loaded, truth = Bundle.load(str(bundle), precision="fp32", device="cpu"), rows["value"].to_numpy()
    found = loaded.predict(rows["text"].to_pylist())
    values = np.array([one.value for one in found])
    assert np.corrcoef(values, truth)[0, 1] > 0.9
    assert np.abs(values - truth).mean() < 4
    said = pipeline("text-classification", model=str(bundle), truncation=True, function_to_apply="none")
    assert [one["score"] for one in said(rows["text"].to_pylist())] == pytest.approx(values, abs=2e-3)
    assert info.metrics["mae"] < 4 and 0 < info.metrics["loss"] < 0.5  # a share of the variance
    assert all(one.low < one.value < one.high and one.score is None for one in found)
    for one in found:
        assert one.label == ("below 1955", "1955 to 1975", "1975 or more")[np.searchsorted(CUTS, one.value, "right")]
        assert one.review == any(one.low < cut <= one.high for cut in CUTS)
    with pytest.raises(RequestError, match="no probabilities: use predict"):
        loaded.predict_proba(["a text"])
    card = (bundle / "README.md").read_text()
    assert "`below 1955`, `1955 to 1975`, `1975 or more`" in card and "holds the true one for 0.8 of" in card


def test_an_evaluation_says_how_near_it_is(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    arguments = ["--bundle", str(bundle), "--data", str(dataset), "--output", str(tmp_path / "evaluation")]
    assert evaluate.main(arguments) == 0
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    table = pq.read_table(tmp_path / "evaluation" / "predictions.parquet")
    true, given, low, high, other = (
        table[name].to_numpy() for name in ("value", "predicted", "low", "high", "baseline_predicted")
    )
    assert metrics["mae"] == pytest.approx(np.abs(true - given).mean(), rel=1e-4)
    assert metrics["rmse"] == pytest.approx(np.sqrt(np.square(true - given).mean()), rel=1e-4)
    assert metrics["r2"] == pytest.approx(1 - np.square(true - given).mean() / true.var(), abs=1e-4)
    assert metrics["baseline"]["mae"] == pytest.approx(np.abs(true - other).mean(), rel=1e-4)
    start, end = metrics["baseline"]["difference_intervals"]["mae"]
    assert start <= metrics["mae"] - metrics["baseline"]["mae"] <= end
    assert metrics["interval"]["coverage"] == pytest.approx(((low <= true) & (true <= high)).mean(), abs=0.03)
    assert metrics["interval"]["mean_width"] == pytest.approx((high - low).mean(), rel=1e-3)
    assert set(metrics["f1_at_cuts"]) == {"1955", "1975"} and metrics["quadratic_kappa"] > 0.8
    assert metrics["review"]["num_rows_review"] == table["review"].to_numpy().sum()


def test_an_archive_gets_values_and_the_gate_sees_them_move(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, output = tmp_path / "archive", tmp_path / "scored"
    (archive / "day=1").mkdir(parents=True)
    write_shard(archive / "day=1" / "a.parquet", [text for text, _ in texts(1000, 300)] + ["", None])
    arguments = ["--bundle", str(bundle), "--input", str(archive), "--output", str(output), "--num-actors", "0"]
    assert score.main([*arguments, "--precision", "fp32"]) == 0
    table = pq.read_table(output / "predictions" / "day=1" / "a.parquet")
    assert table.column_names == ["row", *REGRESSION_PREDICTION_SCHEMA.names]
    assert table["error"].null_count == 300 and table["value"].null_count == 2
    latest = json.loads((output / "runs" / "latest.json").read_text())["published"]
    assert sum(latest["profile"]["scores"]) == 300
    assert latest["profile"]["score_sum"] == pytest.approx(np.nansum(table["value"].to_numpy().astype(float)))
    assert latest["labels"] == ["below 1955", "1955 to 1975", "1975 or more"]
    edges = np.array(latest["score_edges"])
    counts, _ = np.histogram(table["value"].drop_null().to_numpy(), edges)
    assert latest["profile"]["scores"] == counts.tolist()  # no prediction lies outside
    assert verify.main(["--output", str(output)]) == 0

    (archive / "day=2").mkdir()
    write_shard(archive / "day=2" / "b.parquet", [f"page {number} is about the computer" for number in range(300)])
    capsys.readouterr()
    assert score.main([*arguments, "--precision", "fp32"]) == 5
    said = capsys.readouterr().err
    assert "mean value moved by" in said and "label mix moved by" in said


def test_predict_prints_values(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert predict.main(["--bundle", str(bundle), "about the computer"]) == 0
    line = json.loads(capfd.readouterr().out)
    assert {"text", "value", "low", "high", "label", "review"} <= set(line) and 1960 < line["value"] < 2000


def test_training_goes_on_from_a_bundle_of_numbers(
    dataset: Path, bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its head is in the user's unit: the first epoch begins there, not at the mean."""
    again = trained(dataset, str(bundle), tmp_path / "again", "--epochs=1", "--learning-rate=1e-7", "--huber")
    assert re.search(r"the head is kept: its numbers are about 19\d\d.*, those of the data set about 19", caplog.text)
    first, second = (read_info(Location.of(str(one))) for one in (bundle, again))
    assert second.metrics["mae"] == pytest.approx(first.metrics["mae"], rel=0.02)
    assert second.values and second.values.cuts == ()
    column = Bundle.load(str(again), precision="fp32", device="cpu").predict_column(pa.array(["the computer"]))
    assert column.column_names == [name for name in REGRESSION_PREDICTION_SCHEMA.names if name != "label"]
    assert column["review"].to_pylist() == [False]


def test_a_head_of_numbers_of_another_size_is_drawn_anew(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": text, "label": (year - 1965) / 10 - 100} for text, year in texts(0, 200)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "data"), "--regression"]
    assert prepare.main(common) == 0
    again = trained(tmp_path / "data", str(bundle), tmp_path / "again", "--epochs=1")
    assert read_info(Location.of(str(again))).metrics["mae"] < 5  # they lie 2,000 from the years
    assert "which is kept if its own are near" in caplog.text and "the head is kept" not in caplog.text
    assert "the head is new: its numbers are about 19" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label-smoothing", "0.1"], r"--label-smoothing has no meaning with rows for regression"),
        (["--class-weights=balanced", "--target-precision=0.9"], r"--class-weights, --target-precision has no meaning"),
        (["--long-documents", "max"], r"--long-documents max has no meaning"),
        (["--cuts", "2,1"], r"cuts: .*give ascending numbers, as 2\.5 or 1,2,3, or auto"),
        (["--cuts", "inf"], r"cuts: .*give ascending numbers"),
    ],
)
def test_options_without_a_meaning_are_refused(
    options: list[str], message: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(dataset), "--encoder", "minilm", "--output", str(tmp_path / "bundle")]
    assert train.main([*common, *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_is_about_numbers_is_refused_for_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "data")]
    assert prepare.main([*common, "--max-spread", "1"]) == 2
    assert "max_spread 1 has no meaning without regression" in capsys.readouterr().err
    assert prepare.main([*common, "--regression"]) == 2
    assert "row 0 of column 'label'" in (said := capsys.readouterr().err) and "'a', which is no number" in said
    assert prepare.main(common) == 0
    options: list[Any] = ["--data", str(tmp_path / "data"), "--encoder", "minilm", "--output", str(tmp_path / "bundle")]
    assert train.main([*options, "--huber", "--cuts", "auto"]) == 2
    assert "--cuts, --huber has no meaning" in capsys.readouterr().err


def test_planted_errors_are_the_worst_rows(ray_cluster: str, tiny_encoder: Path, tmp_path: Path) -> None:
    rows = [(text, year + 25 * (number in (30, 50))) for number, (text, year) in enumerate(map(a_text, range(120)))]
    lines = [json.dumps({"text": text, "label": year + 0.1 * (len(text) % 7)}) for text, year in rows]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    common = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "data"), "--regression"]
    assert prepare.main([*common, "--validation-fraction", "0.02", "--test-fraction", "0.02"]) == 0
    config = AuditConfig(
        data=str(tmp_path / "data"),
        output=str(tmp_path / "check"),
        encoder=str(tiny_encoder),
        folds=2,
        epochs=12,
        learning_rate=3e-3,
        max_length=32,
        batch_size=8,
        device="cpu",
    )
    found = audit(config)
    assert found.suspects.schema.equals(suspect_schema("regression"))
    assert found.suspects.column_names[2:5] == ["value", "suggested_value", "quality"]
    kept = set(Dataset.open(config.data).split("train")["source_row"].to_pylist())
    worst = found.suspects.slice(0, 2).to_pylist()
    assert {row["source_row"] for row in worst} == {30, 50} & kept and kept & {30, 50}
    assert all(row["value"] - row["suggested_value"] > 10 for row in worst)
    assert list(found.report["labels"]) == ["value"] and found.report["out_of_fold"]["spearman"] > 0.5
