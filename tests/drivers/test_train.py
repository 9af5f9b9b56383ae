"""Training on a two-node cluster: it learns, the bundle holds what was measured, workers do not change the batches."""

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from bertray import Bundle
from bertray.data.config import PrepareConfig
from bertray.data.dataset import Dataset
from bertray.data.prepare import prepare
from bertray.drivers.train import TrainResult, train
from bertray.drivers.train_on_ray import warn_of_shared_machines
from bertray.errors import BertrayError, RequestError
from bertray.metrics.calibration import calibrate, threshold_for_precision, tune_thresholds
from bertray.metrics.profile import Profile
from bertray.model.pretrained import load_classifier
from bertray.model.runtime import resolve_precision
from bertray.storage import s3
from bertray.storage.location import Location
from bertray.training.checkpoints import Progress
from bertray.training.config import TrainConfig
from bertray.training.export import write_bundle
from bertray.training.loss import validation_metrics
from tests.conftest import WHAT_A_DIVERGING_WORKER_LOGS
from tests.drivers.conftest import WORDS

PROGRESS = Progress(
    history=[dict.fromkeys(("epoch", "step", "train_loss", "loss", "accuracy", "f1_macro", "wall_s"), 1.0)],
    best_epoch=1,
    is_done=True,
)


def run(dataset: str, output: Path | str, encoder: str, **options: Any) -> tuple[TrainResult, Bundle]:
    settings = {"epochs": 6, "learning_rate": 3e-3, "batch_size": 32, "max_length": 32, "precision": "fp32", **options}
    result = train(TrainConfig(data=dataset, output=str(output), encoder=encoder, **settings))
    return result, Bundle.load(str(output), "fp32")


@pytest.fixture(scope="module")
def one_worker(
    dataset: str, calm_encoder: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainResult, Bundle, Path]:
    """Which gives the bundle of one worker of Ray: test_train_here."""
    output = tmp_path_factory.mktemp("trained") / "bundle"
    return (*run(dataset, output, calm_encoder, num_workers=0), output)


def test_it_learns_and_the_best_epoch_is_kept(one_worker: tuple[TrainResult, Bundle, Path], dataset: str) -> None:
    result, bundle, _ = one_worker
    history = bundle.info.history
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    best = max(history, key=lambda epoch: epoch["f1_macro"])
    assert best["f1_macro"] > 0.9
    assert history[result.best_epoch - 1]["f1_macro"] == best["f1_macro"]
    # the kept weights give the metrics that were measured during training
    rows = Dataset.open(dataset).split("validation")
    predicted = [prediction.label for prediction in bundle.predict(rows["text"].to_pylist())]
    accuracy = sum(a == b for a, b in zip(predicted, rows["label"].to_pylist(), strict=True)) / rows.num_rows
    assert accuracy == pytest.approx(bundle.info.metrics["accuracy"])
    assert bundle.info.metrics["f1_macro"] == best["f1_macro"]


def test_the_bundle_says_where_it_comes_from(one_worker: tuple[TrainResult, Bundle, Path], dataset: str) -> None:
    result, bundle, output = one_worker
    info = bundle.info
    assert info.labels == ("car", "fruit", "sea")
    assert info.data_fingerprint == Dataset.open(dataset).fingerprint()
    assert info.training["learning_rate"] == 3e-3
    assert set(info.versions) >= {"python", "torch", "transformers", "ray", "bertray"}
    assert info.max_length == 32
    assert result.fingerprint == info.fingerprint()
    card = (output / "README.md").read_text()
    assert "3-way text classifier" in card
    assert f"{info.metrics['f1_macro']:.4f}" in card
    # how it went: page, event files; how sure it is
    page = (output / "report.html").read_text()
    assert "training, by step: from " in page and "were taken out" in page
    assert list((output / "tensorboard").iterdir())
    assert info.temperature != 1
    assert info.calibration["nll_after"] <= info.calibration["nll_before"]
    # nothing but the bundle is left: the run's checkpoints are gone
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]


def test_two_workers_take_the_same_steps(
    ray_cluster: str, one_worker: tuple[TrainResult, Bundle, Path], dataset: str, calm_encoder: str, tmp_path: Path
) -> None:
    _, bundle = run(dataset, tmp_path / "bundle", calm_encoder, num_workers=2)
    for one, two in zip(one_worker[1].info.history, bundle.info.history, strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-4)
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["accuracy"] == one["accuracy"]


def test_cpu_workers_that_share_a_machine_are_told(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_shared_machines(2, [{"CPU": 4.0}, {"CPU": 4.0}, {"memory": 1.0}])
    assert not caplog.text
    warn_of_shared_machines(3, [{"CPU": 4.0}, {"CPU": 4.0}])
    assert "3 workers share the CPUs of 2 machines: --num-workers 2, one a machine, is faster" in caplog.text


def test_bf16_to_s3(dataset: str, tiny_encoder: Path, s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = s3.upload

    def fail_on_the_model(fs: Any, path: str, file: Path) -> None:
        if path.endswith("/bundle/model.safetensors"):
            raise OSError("the network is gone")
        upload(fs, path, file)

    options = {"precision": "bf16", "epochs": 1, "num_workers": 0}
    with monkeypatch.context() as patch, pytest.raises(RequestError, match="the network is gone"):
        patch.setattr("bertray.storage.s3.upload", fail_on_the_model)
        run(dataset, f"{s3_folder}/bundle", str(tiny_encoder), **options)
    # Half a bundle lies there, and the same command goes on.
    result, bundle = run(dataset, f"{s3_folder}/bundle", str(tiny_encoder), **options)
    assert result.resumed_from_step > 0
    assert 0 < bundle.info.metrics["loss"] < 3  # guessing costs ln 3 = 1.1; a NaN fails both
    import s3fs

    assert s3fs.S3FileSystem().ls(s3_folder) == [f"{s3_folder.removeprefix('s3://')}/bundle"]


def test_a_diverging_run_says_so(
    ray_cluster: str, dataset: str, diverging_encoder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bertray")
    with pytest.raises(BertrayError, match=r"the loss is nan at epoch 1, step 1: lower --learning-rate \(now 0\.003\)"):
        run(dataset, tmp_path / "bundle", diverging_encoder)
    assert list(tmp_path.iterdir()) == []  # no bundle, no checkpoints
    assert WHAT_A_DIVERGING_WORKER_LOGS in caplog.text


def test_a_data_set_that_was_written_anew_makes_no_bundle(dataset: str, tiny_encoder: Path, tmp_path: Path) -> None:
    opened, output = Dataset.open(dataset), Location.of(str(tmp_path / "bundle"))
    config = TrainConfig(data=dataset, output=str(output), encoder=str(tiny_encoder))
    with pytest.raises(RequestError, match=r"was rewritten while the model was trained.*--restart"):
        write_bundle(config, opened, "fingerprint of another", output, Progress(), {})
    assert not output.exists()


def test_a_model_that_gives_no_number_makes_no_bundle(dataset: str, tiny_encoder: Path, tmp_path: Path) -> None:
    opened, output = Dataset.open(dataset), Location.of(str(tmp_path / "bundle"))
    config = TrainConfig(data=dataset, output=str(output), encoder=str(tiny_encoder), max_length=32)
    model = load_classifier(str(tiny_encoder), opened.labels, opened.problem_type, 0)
    model.classifier.bias.data.fill_(torch.nan)
    with pytest.raises(RequestError, match=r"gives a number for none of 17 validation rows of .*--learning-rate"):
        write_bundle(config, opened, opened.fingerprint(), output, PROGRESS, model.state_dict())
    assert not output.exists()


def test_a_bundle_from_the_hub(
    dataset: str,
    tiny_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It names the commit, and a tokenizer class that transformers 4 knows too; fine-tuned again, it keeps its head."""
    caplog.set_level(logging.INFO, "bertray")
    cache, commit = tmp_path / "hub" / "models--some--tiny", "0123456789" * 4
    folder = shutil.copytree(tiny_encoder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "v1.0").write_text(commit)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "TokenizersBackend"}
    names = ["input_ids", "attention_mask"]  # as of DistilBERT, whose model takes no token_type_ids
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_input_names": names}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    output = tmp_path / "bundle"
    _, bundle = run(dataset, output, "some/tiny@v1.0", epochs=1, num_workers=0)
    assert (bundle.info.encoder, bundle.info.encoder_commit) == ("some/tiny", commit)
    assert bundle.info.training["encoder"] == f"some/tiny@{commit}"
    assert f"`some/tiny` at commit `{commit}`, fine-tuned" in (output / "README.md").read_text()
    saved = json.loads((output / "tokenizer_config.json").read_text())
    assert (saved["tokenizer_class"], saved["model_input_names"]) == ("PreTrainedTokenizerFast", names)
    texts = ["Hello, World!", "a [MASK] é  x", "東京"]
    assert AutoTokenizer.from_pretrained(output)(texts).data == AutoTokenizer.from_pretrained(folder)(texts).data
    assert "the head is new: some/tiny@v1.0 has none" in caplog.text

    _, again = run(dataset, tmp_path / "again", str(output), epochs=1, num_workers=0, learning_rate=1e-9)
    assert (again.info.encoder, again.info.encoder_commit) == (str(output), None)
    assert f"the head is kept: {output} has the same labels" in caplog.text
    assert again.info.metrics["accuracy"] == pytest.approx(bundle.info.metrics["accuracy"], abs=0.1)


def test_texts_out_of_scope_count_where_a_precision_is_wanted(tiny_encoder: Path, tmp_path: Path) -> None:
    """A model that knows nothing: a third of the rows in scope is right, and of the others none."""
    for name, num_rows, labels in (("in", 60, ["a", "b", "c"]), ("validation", 800, ["a", "b", "c", "oos"])):
        lines = [{"text": f"{name} {row} of {row * 7}", "label": labels[row % len(labels)]} for row in range(num_rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prepare(
        PrepareConfig(
            input=[str(tmp_path / "in.jsonl")],
            validation=str(tmp_path / "validation.jsonl"),
            oos_label="oos",
            output=str(tmp_path / "data"),
        )
    )
    dataset = Dataset.open(str(tmp_path / "data"))
    config = TrainConfig(
        data="unused", output="unused", encoder=str(tiny_encoder), max_length=32, target_precision=0.24
    )
    model = load_classifier(str(tiny_encoder), dataset.labels, dataset.problem_type, 0)
    rows = dataset.split("validation")
    output = Location.of(str(tmp_path / "bundle"))
    info = write_bundle(config, dataset, dataset.fingerprint(), output, PROGRESS, model.state_dict())

    predicted = Bundle.load(str(output)).predict_column(rows["text"])
    scores_N, is_right_N = predicted["score"].to_numpy(), pc.equal(predicted["label"], rows["label"]).to_numpy()
    is_in_scope_N = pc.not_equal(rows["label"], "oos").to_numpy()
    assert 0 < is_in_scope_N.sum() < len(rows)
    expected = threshold_for_precision(scores_N, is_right_N, 0.24)
    without = threshold_for_precision(scores_N[is_in_scope_N], is_right_N[is_in_scope_N], 0.24)
    assert info.review_below == (2 if expected is None else pytest.approx(expected, rel=1e-5))
    assert without is not None and info.review_below != pytest.approx(without, rel=1e-5)


@pytest.mark.parametrize("multi_label", [False, True])
def test_what_is_fitted_is_fitted_to_what_the_bundle_gives(
    multi_label: bool, calm_encoder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The precision of training is the one that scoring does not choose here; long texts are read in windows."""
    caplog.set_level(logging.INFO, "bertray")
    words, rng = [word for named in WORDS.values() for word in named.split()], random.Random(0)
    lines = []
    for number in range(400):
        label = rng.choice(sorted(WORDS))
        given = f"{label};{rng.choice(sorted(WORDS))}" if multi_label and number % 2 else label
        noisy = rng.choice([*(WORDS[label].split() * 6), *words])
        lines.append({"text": f"the {noisy} of day {number} " + "and so on " * (number % 9), "label": given})
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = str(tmp_path / "data")
    prepare(
        PrepareConfig(input=[str(tmp_path / "in.jsonl")], output=data, multi_label=multi_label, validation_fraction=0.4)
    )
    precision = "bf16" if resolve_precision("auto", torch.device("cpu")) == "fp32" else "fp32"
    options = {"long_documents": "mean", "max_length": 16, "batch_size": 16, "device": "cpu", "precision": precision}
    run(data, tmp_path / "bundle", calm_encoder, num_workers=0, target_precision=0.8 if multi_label else 0.7, **options)

    bundle, dataset = Bundle.load(str(tmp_path / "bundle"), device="cpu"), Dataset.open(data)
    info, rows = bundle.info, dataset.split("validation")
    tokens, logits_NC = bundle.logits(rows["text"])
    temperature, measured = calibrate(logits_NC * info.temperature, dataset.targets(rows))
    assert info.temperature != 1
    assert info.temperature == pytest.approx(temperature, rel=1e-3)
    assert info.calibration == pytest.approx(measured, rel=1e-3, abs=1e-5)
    metrics = validation_metrics(logits_NC, dataset.targets(rows))
    assert {name: info.metrics[name] for name in metrics} == pytest.approx(metrics, rel=1e-5)
    assert info.metrics["loss"] == pytest.approx(info.calibration["nll_after"], rel=1e-5)
    predicted = bundle.predictions(tokens, logits_NC)
    found, held = (one.model_dump() for one in (Profile.of(predicted), info.validation_profile))
    sums = [{name: one.pop(name) for name in ("score_sum", "score_square_sum")} for one in (found, held)]
    assert found == held and sums[0] == pytest.approx(sums[1], rel=1e-6)
    assert 0 < held["num_rows_review"] < rows.num_rows
    lowest = pc.min(predicted.filter(pc.invert(predicted["review"]))["score"]).as_py()
    assert 5e-7 < lowest - info.review_below < 2e-6  # rounding does not have the row at the limit reviewed
    if multi_label:
        thresholds_C = tune_thresholds(bundle.predict_proba(rows["text"]), dataset.targets(rows))
        assert info.thresholds == pytest.approx(thresholds_C, abs=1e-5)
    assert f"running the bundle over {rows.num_rows} validation rows (CPU, {bundle.precision})" in caplog.text


def test_what_cannot_be_trained_is_refused_before_ray_starts(dataset: str, tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no finished data set"):
        run(str(tmp_path), tmp_path / "bundle", str(tiny_encoder))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("")
    with pytest.raises(RequestError, match=r"--output .* exists.*--overwrite"):
        run(dataset, tmp_path / "sub", str(tiny_encoder))
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(RequestError, match=r"exists and is no bundle .*it is not replaced"):
        run(dataset, tmp_path, str(tiny_encoder), overwrite=True)
    with pytest.raises(RequestError, match=r"--output .* holds --data"):
        run(dataset, Path(dataset).parent, str(tiny_encoder), overwrite=True)
    with pytest.raises(RequestError, match=r"--max-length 500: .* reads at most 128 tokens"):
        run(dataset, tmp_path / "bundle", str(tiny_encoder), max_length=500)


def test_a_folder_of_hidden_files_is_not_replaced(dataset: str, tiny_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / ".other.training").mkdir(parents=True)
    (tmp_path / "models" / ".other.training" / "run.json").write_text("{}")
    with pytest.raises(RequestError, match=r"--output .*models exists\."):
        run(dataset, tmp_path / "models", str(tiny_encoder))


def test_several_labels_a_row(calm_encoder: str, tmp_path: Path) -> None:
    """From prepare to predictions: texts that name one or two of three things."""
    rows = []
    for number in range(240):
        named = sorted({sorted(WORDS)[number % 3], sorted(WORDS)[number // 3 % 3]})
        words = " and ".join(WORDS[label].split()[number % 4] for label in named)
        rows.append({"text": f"{words}, day {number}", "label": ";".join(named)})
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = str(tmp_path / "data")
    prepare(PrepareConfig(input=[str(tmp_path / "in.jsonl")], output=data, multi_label=True))
    result, bundle = run(data, tmp_path / "bundle", calm_encoder, epochs=10, target_precision=0.5, num_workers=0)
    assert bundle.info.problem_type == "multi_label_classification"
    assert result.validation["f1_macro"] == bundle.info.metrics["f1_macro"] > 0.8
    assert len(bundle.info.thresholds) == 3
    assert bundle.info.review_below is not None
    table = bundle.predict_column(Dataset.open(data).split("test")["text"])
    true = Dataset.open(data).split("test")["labels"].to_pylist()
    right = [sorted(found) == sorted(given) for found, given in zip(table["labels"].to_pylist(), true, strict=True)]
    assert sum(right) / len(right) > 0.7


def test_texts_that_tell_nothing_are_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    rows = [{"text": f"text {number}", "label": f"label {number % 5}"} for number in range(60)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(PrepareConfig(input=[str(tmp_path / "in.jsonl")], output=str(data)))
    table = pq.read_table(data / "train.parquet")
    pq.write_table(table.set_column(0, "text", pa.array(["same"] * table.num_rows)), data / "train.parquet")
    with pytest.raises(RequestError, match=r"all 48 training texts in .* are the same.*--text-column"):
        run(str(data), tmp_path / "bundle", str(tiny_encoder))
    pq.write_table(table.slice(0, 4), data / "train.parquet")
    with pytest.raises(RequestError, match=r"has 5 labels and 4 training rows; .*--label-column"):
        run(str(data), tmp_path / "bundle", str(tiny_encoder))
    assert not (tmp_path / "bundle").exists()
