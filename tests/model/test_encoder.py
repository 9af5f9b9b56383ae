"""Sorted, padded batches give the logits of one text at a time."""

import copy

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertForSequenceClassification

from bertray.errors import RequestError
from bertray.model.encoder import Encoder
from bertray.model.pretrained import load_tokenizer
from bertray.model.runtime import resolve_device, resolve_precision
from bertray.tokenization.tokenizer import ColumnTokenizer
from tests.conftest import tiny_config

CPU = torch.device("cpu")
TEXTS = ["one", "two words", None, "a much longer text " * 20, "", "x" * 300] * 30


@pytest.fixture(scope="module")
def tokenizer() -> ColumnTokenizer:
    return ColumnTokenizer(load_tokenizer("minilm", 64)[0].backend_tokenizer, 64)


@pytest.fixture
def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(tiny_config(initializer_range=0.5))


def one_at_a_time(model: BertForSequenceClassification, tokenizer: ColumnTokenizer) -> np.ndarray:
    rows = []
    for text in TEXTS[:6]:
        tokens = tokenizer.encode(pa.array([text], pa.string()))
        if tokens.num_tokens == 0:
            rows.append(np.full(3, np.nan))
            continue
        with torch.inference_mode():
            rows.append(model(input_ids=torch.tensor(tokens.ids_T[None].astype(np.int64))).logits[0].numpy())
    return np.stack(rows * 30)


def test_fp32_logits_are_of_single_texts(model: BertForSequenceClassification, tokenizer: ColumnTokenizer) -> None:
    expected_NC = one_at_a_time(model.eval(), tokenizer)
    tokens = tokenizer.encode(pa.array(TEXTS, pa.string()))
    logits_SC = Encoder(model, "fp32", "cpu").logits(tokens)
    assert logits_SC.dtype == np.float32
    np.testing.assert_allclose(logits_SC, expected_NC[tokens.documents_S], atol=1e-5)


def test_bf16_is_close_and_never_nan_with_padding(
    model: BertForSequenceClassification, tokenizer: ColumnTokenizer
) -> None:
    # transformers#31035: BERT with SDPA, bf16 and padded rows once gave NaN.
    expected_NC = one_at_a_time(model.eval(), tokenizer)
    tokens = tokenizer.encode(pa.array(TEXTS, pa.string()))
    expected_SC = expected_NC[tokens.documents_S]
    for packed in (True, False):
        model._supports_attention_backend = packed
        encoder = Encoder(copy.deepcopy(model), "bf16", "cpu")
        assert encoder.layout.is_packed is packed
        logits_SC = encoder.logits(tokens)
        assert np.abs(logits_SC - expected_SC).max() < 0.15
        assert np.mean(logits_SC.argmax(1) == expected_SC.argmax(1)) > 0.99


def test_no_rows(model: BertForSequenceClassification, tokenizer: ColumnTokenizer) -> None:
    assert Encoder(model, "fp32", "cpu").logits(tokenizer.encode(pa.array([], pa.string()))).shape == (0, 3)


def test_auto_precision_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_bf16=has_bf16: has_bf16)
        assert resolve_precision("auto", CPU) == expected
        assert resolve_precision("fp32", CPU) == "fp32"
        assert resolve_precision("bf16", CPU) == "bf16"


def test_the_last_layer_is_not_rounded_to_bf16(
    model: BertForSequenceClassification, tokenizer: ColumnTokenizer
) -> None:
    exact = model.classifier.weight.detach().clone()
    encoder = Encoder(model, "bf16", "cpu")
    assert encoder.model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert torch.equal(encoder.model.classifier.weight, exact)
    logits_NC = encoder.logits(tokenizer.encode(pa.array(["one text"])))
    assert not np.array_equal(logits_NC, torch.from_numpy(logits_NC).bfloat16().float().numpy())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named() -> None:
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(RequestError, match=r"--device cuda: torch .* sees no GPU here"):
        resolve_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_logits_are_those_of_the_cpu(model: BertForSequenceClassification, tokenizer: ColumnTokenizer) -> None:
    expected_NC = one_at_a_time(model.eval(), tokenizer)
    tokens = tokenizer.encode(pa.array(TEXTS, pa.string()))
    logits_SC = Encoder(model, "fp32", "cuda").logits(tokens)
    np.testing.assert_allclose(logits_SC, expected_NC[tokens.documents_S], atol=1e-3)
