"""Classifiers that others have fine-tuned become bundles: what their answers are, what is refused, what rows add."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from bertray import Bundle, PrepareConfig, prepare
from bertray.__main__ import command
from bertray.bundle.guard import training_data
from bertray.bundle.info import read_info
from bertray.errors import RequestError
from bertray.schema import TEXT
from bertray.storage.location import Location
from bertray.training.preflight import check_origin
from tests.conftest import SHARED_DATA, needs_shared_data

adopt = command("adopt")

TEXTS = [
    "Python, SQL",
    "B.Sc. in Physics, 2014",
    "jane@example.org",
    "東京 – Zürich",
    *(f"text {n} of it" for n in range(40)),
]
LONG = "a long text that does not fit " * 60
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL = {"vocab_size": 30522, "initializer_range": 0.3, "pad_token_id": 0}
NAMES: dict[str, Any] = {"id2label": {0: "neg", 1: "neu", 2: "pos"}, "label2id": {"neg": 0, "neu": 1, "pos": 2}}
OF_DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
OF_DEBERTA = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
OF_MODERNBERT = {"cls_token_id": 101, "sep_token_id": 102, "bos_token_id": 101, "eos_token_id": 102}
# Sizes, and the positions that 128 tokens take. BERT is in the other tests; benchmarks/adopted.py has more.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Roberta": {**SIZES, "max_position_embeddings": 130, "pad_token_id": 1},
    "DistilBert": {**OF_DISTILBERT, "max_position_embeddings": 128},
    "ModernBert": {**SIZES, **OF_MODERNBERT, "max_position_embeddings": 128},
    "DebertaV2": {**SIZES, **OF_DEBERTA, "max_position_embeddings": 128},
    "MPNet": {**SIZES, "max_position_embeddings": 130, "pad_token_id": 1},
}


def save_tokenizer(folder: Path, tiny_encoder: Path, **facts: Any) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.model_max_length = 10**30  # as of a tokenizer that says nothing
    tokenizer.save_pretrained(folder)
    return changed(folder, "tokenizer_config.json", **facts)


def changed(folder: Path, name: str, **facts: Any) -> Path:
    """The folder, in which a file of JSON has other fields; None: lacks them."""
    content = json.loads((folder / name).read_text()) | facts
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def of_architecture(name: str, folder: Path, tiny_encoder: Path, **options: Any) -> Path:
    config = getattr(transformers, f"{name}Config")(**SMALL | ARCHITECTURES[name], **NAMES)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder, **options)
    return save_tokenizer(folder, tiny_encoder)


@pytest.fixture
def model(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A classifier of the labels a, b and c, as transformers saves it; decisions on fp16 are kept beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(tiny_bundle, tmp_path / "model")
    (folder / "bundle.json").unlink()
    return folder


def adopted(model: Path, *options: object) -> Bundle:
    output = model.parent / f"{model.name}-bundle"
    assert adopt(["--model", str(model), "--output", str(output), *map(str, options)]) == 0
    return Bundle.load(str(output), "fp32", "cpu")


def pipeline_logits(folder: Path, texts: list[str], max_length: int) -> np.ndarray:
    """Of each text alone, by transformers."""
    classify = pipeline("text-classification", model=str(folder), dtype=torch.float32, top_k=None, device="cpu")
    found = classify(texts, truncation=True, max_length=max_length, function_to_apply="none")
    labels = list(classify.model.config.id2label.values())
    return np.array([[{one["label"]: one["score"] for one in row}[label] for label in labels] for row in found])


def test_the_command_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(model), "--output", str(model.parent / "bundle")]
    assert adopt(words) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert (summary["labels"], summary["max_length"]) == (["a", "b", "c"], 64)
    assert summary["problem_type"] == "single_label_classification" and summary["validation"] == {}
    assert "is for single_label_classification, as config.json says nothing else" in said.err
    assert adopt(words) == 2
    assert "which no other file may enter: choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_bundle_gives_the_logits_of_the_pipeline(name: str, tiny_encoder: Path, tmp_path: Path) -> None:
    folder = of_architecture(name, tmp_path / "model", tiny_encoder, max_shard_size="2MB")
    assert (folder / "model.safetensors.index.json").is_file()
    bundle = adopted(folder)
    assert (bundle.info.max_length, bundle.labels) == (128, ("neg", "neu", "pos"))
    texts = [*TEXTS[:8], LONG]
    expected_NC = pipeline_logits(folder, texts, 128)
    assert np.ptp(expected_NC, axis=0).max() > 0.01  # texts make a difference
    assert np.abs(bundle.logits(pa.array(texts))[1] - expected_NC).max() < 1e-4


def test_a_model_as_transformers_4_saved_it(model: Path, tiny_encoder: Path) -> None:
    """In half precision, with old names of weights and of the tokenizer's class."""
    weights = {name: held.half() for name, held in load_file(model / "model.safetensors").items()}
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for name in list(weights):
        for new, before in old.items():
            if name.endswith(new):
                weights[name.removesuffix(new) + before] = weights.pop(name)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    changed(model, "config.json", torch_dtype="float16", dtype=None, transformers_version="4.30.2", problem_type=None)
    changed(model, "tokenizer_config.json", tokenizer_class="BertTokenizer", padding_side="left", pad_token="[PAD]")
    expected_NC = pipeline_logits(model, TEXTS, 64)
    found = (adopted(model).logits(pa.array(TEXTS))[1], pipeline_logits(Path(f"{model}-bundle"), TEXTS, 64))
    assert max(np.abs(found_NC - expected_NC).max() for found_NC in found) < 1e-4


def test_without_rows_the_card_says_what_is_missing(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = adopted(model, "--max-length", 32, "--labels", "x,y,z").info
    assert (info.labels, info.max_length, info.temperature) == (("x", "y", "z"), 32, 1.0)
    assert (info.data_fingerprint, info.validation_profile, info.review_below, info.history) == (None, None, None, [])
    card = (model.parent / "model-bundle" / "README.md").read_text()
    assert "fine-tuned by others, adopted with bertray" in card and "Missing are its scores" in card
    assert "Epoch" not in card and "learning_rate" not in card
    with pytest.raises(ValueError, match="adopted without a data set; bertray adopt --data gives it one"):
        training_data(info)
    assert Bundle.load(str(model.parent / "model-bundle"), "fp16", "cpu").precision == "fp32"
    assert "not fp16, because there are no texts to measure it on: the bundle was adopted without" in caplog.text


def data_set(folder: Path, rows: list[tuple[str, object]], *options: str) -> str:
    """Of these texts and labels, all of them in the validation rows too, with other words."""
    folder.mkdir()
    for name in ("train", "validation"):
        lines = [json.dumps({"text": f"{text} ({name})", "label": label}) for text, label in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    places = {"validation": str(folder / "validation.jsonl"), "output": str(folder / "data")}
    prepare(PrepareConfig(input=[str(folder / "train.jsonl")], **places, multi_label="--multi-label" in options))
    return str(folder / "data")


def test_rows_calibrate_and_measure(
    model: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The data set has the labels in another order; the model is far too sure."""
    changed(model, "config.json", id2label={"0": "c", "1": "a", "2": "b"}, label2id={"c": 0, "a": 1, "b": 2})
    weights = load_file(model / "model.safetensors")
    weights["classifier.weight"] *= 6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    plain = adopted(model)
    assert plain.labels == ("c", "a", "b")
    answers = [one.label for one in plain.predict([f"{text} (validation)" for text in TEXTS])]
    labels = [answer if row % 3 else "abc"[row // 3 % 3] for row, answer in enumerate(answers)]
    assert set(labels) == set("abc")
    data = data_set(model.parent / "labelled", list(zip(TEXTS, labels, strict=True)))
    shutil.move(f"{model}-bundle", model.parent / "plain")
    capsys.readouterr()
    bundle = adopted(model, "--data", data, "--target-precision", 0.3)
    info, summary = bundle.info, json.loads(capsys.readouterr().out)
    assert bundle.labels == ("a", "b", "c")
    assert info.temperature > 1.5 and summary["temperature"] == info.temperature
    assert np.allclose(
        bundle.logits(pa.array(TEXTS))[1] * info.temperature, plain.logits(pa.array(TEXTS))[1][:, [1, 2, 0]], atol=1e-3
    )
    found = training_data(info)
    rows = found.split("validation")
    right = [one.label for one in bundle.predict(rows[TEXT])] == np.array(rows["label"].to_pylist())
    assert info.metrics["accuracy"] == pytest.approx(right.mean(), abs=0.05)  # perhaps measured in bf16
    assert info.validation_profile is not None and info.validation_profile.num_rows == len(rows)
    assert info.review_below is not None and info.target_precision == 0.3
    place = str(model.parent / "model-bundle")
    Bundle.load(place, "fp16", "cpu")
    assert "fp16: accuracy on 44 validation rows is " in caplog.text
    check_origin(place, info.data_fingerprint or "", is_audit=True)  # nobody says that it was trained on these rows
    assert "was fine-tuned on an unknown data set" in caplog.text
    card = (model.parent / "model-bundle" / "README.md").read_text()
    assert "All figures below are of the validation rows of" in card and "divided by a temperature of" in card
    assert f"| accuracy | {info.metrics['accuracy']:.4f} |" in card and "Missing" not in card


def test_several_labels_a_row(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A config that does not say so is completed by the data set."""
    rows = [(text, [label for at, label in enumerate("abc") if number >> at & 1]) for number, text in enumerate(TEXTS)]
    data = data_set(model.parent / "labelled", rows, "--multi-label")
    bundle = adopted(model, "--data", data)
    assert bundle.info.problem_type == "multi_label_classification" and len(bundle.info.thresholds or ()) == 3
    assert bundle.predict(TEXTS[:1])[0].labels is not None
    assert "problem_type" not in caplog.text


def of_numbers(folder: Path, tiny_encoder: Path) -> Path:
    """A model of one output, whose config says nothing of regression, as many on the Hub are."""
    config = transformers.BertConfig(**SMALL | SIZES, max_position_embeddings=128, num_labels=1)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return save_tokenizer(folder, tiny_encoder)


def test_one_output_is_a_number(tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = of_numbers(tmp_path / "model", tiny_encoder)
    bundle = adopted(folder)
    assert (bundle.info.problem_type, bundle.labels, bundle.info.values) == ("regression", ("value",), None)
    expected_N = pipeline_logits(folder, [*TEXTS, LONG], 128)[:, 0]
    found = bundle.predict([*TEXTS, LONG])
    assert np.abs(np.array([one.value for one in found]) - expected_N).max() < 1e-4
    assert {(one.low, one.label, one.review) for one in found} == {(None, None, False)}
    bundle.probabilities = "all"
    with pytest.raises(RequestError, match="--probabilities all: the bundle gives numbers, which have none"):
        bundle.predict(TEXTS)
    capsys.readouterr()
    refused(folder, ["--labels", "quality"], "has one output and no labels, and --labels names quality", capsys)
    refused(folder, ["--cuts", "2.5"], "cuts needs rows to be found on: add --data DATASET", capsys)


def test_rows_with_numbers_give_intervals(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = of_numbers(tmp_path / "model", tiny_encoder)
    rows = "".join(f"text {number},{number % 7 / 10}\n" for number in range(300))
    (tmp_path / "in.csv").write_text(f"text,label\n{rows}")
    prepare(PrepareConfig(input=[str(tmp_path / "in.csv")], output=str(tmp_path / "data"), regression=True))
    bundle = adopted(folder, "--data", tmp_path / "data", "--cuts", "0.25", "--coverage", "0.8")
    found = bundle.predict(TEXTS[:4])
    assert all(one.low < one.value < one.high and one.label in ("below 0.25", "0.25 or more") for one in found)
    assert bundle.info.metrics["mae"] > 0 and bundle.info.validation_profile
    card = (tmp_path / "model-bundle" / "README.md").read_text()
    assert "`below 0.25`, `0.25 or more`" in card and "for 0.8 of" in card


# What of a model is other, the options, and what the error says.
MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "no names": ({"id2label": None, "num_labels": 3}, "", r"no names \(LABEL_0, LABEL_1, LABEL_2\)\. Name them"),
    "no names, lower case": ({"id2label": {"0": "label_0", "1": "b", "2": "c"}}, "", "outputs have no names"),
    "a blank name": ({"id2label": {"0": " ", "1": "b", "2": "c"}}, "", "outputs have no names"),
    "a null name": ({"id2label": {"0": None, "1": "b", "2": "c"}}, "", "outputs have no names"),
    "one name twice": ({"id2label": {"0": "b", "1": "b\u200b", "2": "c"}}, "", "several outputs have the label 'b'"),
    "too few labels": ({}, "--labels x,y", "--labels names 2 labels, and .* has 3 outputs: a, b, c"),
    "too many labels": ({"id2label": None}, "--labels w,x,y,z", r"stored as \[3\], which are not 4 outputs"),
    "fewer names than outputs": ({"id2label": {"0": "a", "1": "b"}}, "", r"stored as \[3\], which are not 2 outputs"),
    "counted from 1": ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "", "must number outputs from 0"),
    "turned round": ({"id2label": {"a": 0, "b": 1, "c": 2}}, "--labels a,b,c", "must number outputs from 0"),
    "a list": ({"id2label": ["a", "b", "c"]}, "", "must number outputs from 0"),
    "a regression": ({"problem_type": "ranking"}, "", "says problem_type 'ranking'; bertray adopts models for single"),
    "one output": ({"id2label": {"0": "LABEL_0"}}, "", r"stored as \[3\], which are not 1 outputs"),
    "a language model": ({"architectures": ["BertForMaskedLM"]}, "", "is a BertForMaskedLM, no .* To train one: bert"),
    "a generator": ({"architectures": ["GPT2LMHeadModel"]}, "", "is a GPT2LMHeadModel, no …ForSequenceClassification"),
    "tags of tokens": ({"architectures": ["ModernBertForTokenClassification"]}, "", "no whole classification head"),
    "code of its own": ({"auto_map": {"AutoModel": "m.M"}}, "", "asks for Python code of the model's own"),
    "too long": ({}, "--max-length 129", "--max-length 129: .* reads at most 64 tokens"),
    "too short": ({}, "--max-length 4", "--max-length: '4' is not allowed"),
    "no rows": ({}, "--target-precision 0.9", "target_precision needs rows to be found on: add --data DATASET"),
    "no data set": ({}, "--data /nowhere", "is no finished data set"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_refused(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts, options, message = MISTAKES[name]
    changed(model, "config.json", **facts)
    refused(model, options.split(), message, capsys)


def refused(model: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(model.parent.iterdir())
    assert adopt(["--model", str(model), "--output", str(model.parent / "bundle"), *options]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines()[-1].startswith("error: ")
    assert re.search(message, said.err), said.err
    assert sorted(model.parent.iterdir()) == before


def without_tokenizer(model: Path) -> None:
    for path in [*model.glob("tokenizer*"), *model.glob("vocab*"), *model.glob("special*")]:
        path.unlink()


def without_head(model: Path) -> None:
    """Nobody says what it is."""
    changed(model, "config.json", architectures=None)
    weights = {name: held for name, held in load_file(model / "model.safetensors").items() if "classifier" not in name}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def without_pooler(model: Path) -> None:
    weights = {name: held for name, held in load_file(model / "model.safetensors").items() if "pooler" not in name}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def with_numbers_that_are_none(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def of_another(kind: str, model: Path, **facts: Any) -> None:
    config = getattr(transformers, f"{kind}Config")(vocab_size=30522, **facts, **NAMES)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(model)
    changed(model, "tokenizer_config.json", model_max_length=10**30)


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64, "eos_token_id": 5}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "initializer_range": 0.3}
SPOILT: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no tokenizer": (without_tokenizer, "", "copy the tokenizer's files"),
    "no head": (without_head, "", r"lacks classifier\.bias\. It has no whole classification head"),
    "no pooler": (without_pooler, "", r"lacks bert\.pooler\.dense\.bias\. It has no whole"),
    "pickled": (
        lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
        "",
        r"pickled weights, which can run code, .* t\.BertForSequenceClassification\.from_pretrained",
    ),
    "no window": (lambda model: of_another("XLNet", model, **XLNET), "", "no file says how many tokens .*--max-length"),
    "padded on the left": (
        lambda model: of_another("XLNet", model, **XLNET),
        "--max-length 64",
        "does not give what it gives for each text alone",
    ),
    "no padding": (lambda model: of_another("GPT2", model, **GPT2), "", "alone .*If config.json has no pad_token_id"),
    "cut on the left": (
        lambda model: changed(model, "tokenizer_config.json", truncation_side="left"),
        "",
        "its tokenizer cuts texts on the left",
    ),
    "no end of text": (lambda model: of_another("Bart", model, **BART), "", "transformers cannot run it on a text: "),
    "no numbers": (with_numbers_that_are_none, "", "logits differ by nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_does_not_fit_together_is_refused(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, options, message = SPOILT[name]
    spoil(model)
    refused(model, options.split(), message, capsys)


def test_a_decoder_with_padding_is_adopted(model: Path) -> None:
    """The bundle's batches are padded on the right, whatever its tokenizer does."""
    of_another("GPT2", model, **GPT2, pad_token_id=0)
    changed(model, "tokenizer_config.json", padding_side="left", model_input_names=["input_ids"])
    expected_NC = pipeline_logits(model, TEXTS, 128)
    assert np.abs(adopted(model).logits(pa.array(TEXTS))[1] - expected_NC).max() < 1e-4


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ("A B C", "", r"other labels \(a, b, c\) than --data .* \(A, B, C\)\. If they mean the same, give --labels"),
        ("a b", "", "Prepare rows of the model's labels, and no others, or leave --data out"),
        ("a b c d", "", "Prepare rows of the model's labels, and no others, or leave --data out"),
        ("x y z", "", "If they mean the same, give --labels the data set's names, in the model's order"),
        ("a b c", "--labels LABEL_0,LABEL_1,LABEL_2", "no names .* The data set has a, b, c"),
    ],
)
def test_a_data_set_of_other_labels_is_refused(
    labels: str, options: str, message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = labels.split()
    rows: list[tuple[str, object]] = [(text, names[row % len(names)]) for row, text in enumerate(TEXTS)]
    data = data_set(model.parent / "labelled", rows)
    refused(model, ["--data", data, *options.split()], message, capsys)
    if labels == "A B C":
        assert adopted(model, "--data", data, "--labels", "A,B,C").labels == ("A", "B", "C")


def test_labels_with_commas(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("orders, returns", 'a "good" one', "it's")
    data = data_set(model.parent / "labelled", [(text, names[row % 3]) for row, text in enumerate(TEXTS)])
    changed(model, "config.json", id2label={number: name.upper() for number, name in enumerate(names)})
    labels = '"orders, returns", "a ""good"" one", it\'s'
    assert adopted(model, "--data", data, "--labels", labels).info.labels == tuple(sorted(names))
    capsys.readouterr()
    refused(model, ["--labels", 'a,"b'], r"--labels: 'a,\"b' is not allowed\. give names as CSV has them", capsys)


def test_a_data_set_of_another_kind_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(model, "config.json", problem_type="multi_label_classification")
    rows: list[tuple[str, object]] = [(text, "abc"[row % 3]) for row, text in enumerate(TEXTS)]
    data = data_set(model.parent / "labelled", rows)
    refused(model, ["--data", data], "is for multi_label_classification, --data .* for single_label_class", capsys)


def test_places_that_do_not_do(
    model: Path, tiny_bundle: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model.parent / "bundle").mkdir()
    for source, message in (
        (tiny_bundle, "is a bundle already: give it to bertray score --bundle"),
        (tiny_encoder, r"is a BertModel, no …ForSequenceClassification\. .* bertray train --encoder"),
        (model / "config.json", "--model .* is a file: give its folder"),
        (Path("bertray-tests/not-cached"), "--model .* Give a local folder with --model PATH$"),
        (Path("./missing"), "no such folder"),
    ):
        assert adopt(["--model", str(source), "--output", str(model.parent / "bundle")]) == 2
        assert re.search(message, capsys.readouterr().err.strip())
    (model.parent / "bundle" / "note.txt").write_text("mine")
    refused(model, [], "--output .*/bundle exists: choose another folder", capsys)


def test_an_old_bundle_was_trained(tiny_bundle: Path) -> None:
    """One of before there were others."""
    info = read_info(Location.of(str(tiny_bundle)))
    facts = info.model_dump()
    assert facts.pop("origin") == "trained"
    assert type(info)(**facts) == info


@needs_shared_data
def test_real_texts_get_the_logits_of_the_pipeline(model: Path) -> None:
    """50 of them exceed the window."""
    import pyarrow.parquet as pq

    many = pq.read_table(SHARED_DATA / "banking77" / "test.parquet", columns=["text"])["text"].to_pylist()[:150]
    long = pq.read_table(SHARED_DATA / "movie_reviews_long" / "test.parquet")["text"].to_pylist()[:50]
    expected_NC = pipeline_logits(model, [*many, *long], 64)
    bundle = adopted(model)
    tokens, found_NC = bundle.logits(pa.array([*many, *long]))
    assert tokens.truncated_N.sum() >= 50
    assert np.abs(found_NC - expected_NC).max() < 1e-4
