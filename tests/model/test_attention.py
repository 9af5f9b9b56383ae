"""Packed batches give the logits of the plain padded forward, on every architecture that can be packed."""

import copy
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from bertray.model import attention
from bertray.model.adapter import begin_with_logits, scale_logits
from bertray.model.attention import Packing, packed_attention
from bertray.model.buckets import Rectangles
from bertray.model.encoder import Encoder
from bertray.tokenization.tokenizer import TokenColumn
from bertray.tokenization.windows import offsets

SIZES = {
    "vocab_size": 500,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 160,
    "initializer_range": 0.06,
    "num_labels": 2,
}
DISTILBERT = {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 96}
MODERNBERT = {"local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
# name, what is special, whether it can be packed, and its last layer cut
ARCHITECTURES: list[tuple[str, dict[str, Any], bool, bool]] = [
    ("Bert", {}, True, True),
    ("Roberta", {"pad_token_id": 1}, True, True),
    ("DistilBert", DISTILBERT, True, False),
    ("ModernBert", {**MODERNBERT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, True, False),
    ("Electra", {"embedding_size": 32}, True, True),
    ("DebertaV2", DEBERTA, False, True),  # does not use the attention interface
    ("Albert", {"embedding_size": 32}, False, False),  # its pooler reads a batch of whole sequences
]


def build(name: str, changes: dict[str, Any]) -> Any:
    sizes = {key: value for key, value in SIZES.items() if name != "DistilBert" or key[:6] not in ("hidden", "interm")}
    sizes = {key: value for key, value in sizes.items() if name != "DistilBert" or not key.startswith("num_a")}
    sizes.pop("num_hidden_layers") if name == "DistilBert" else None
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **changes)
    return getattr(transformers, f"{name}ForSequenceClassification")(config).eval()


def random_tokens(num_sequences: int, longest: int) -> TokenColumn:
    rng = np.random.default_rng(1)
    lengths_S = rng.integers(2, longest, num_sequences)
    return TokenColumn(
        rng.integers(3, SIZES["vocab_size"], lengths_S.sum()).astype(np.int32),
        offsets(lengths_S),
        np.arange(num_sequences),
        np.zeros(num_sequences, dtype=bool),
        pa.nulls(num_sequences, pa.string()),
    )


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
]
TOKENS = random_tokens(400, 100)


@torch.inference_mode()
def padded_forward(model: Any) -> np.ndarray:
    """What transformers alone gives, in batches of 50 as they come."""
    parts = []
    for start in range(0, len(TOKENS.lengths_S), 50):
        rows = range(start, start + 50)
        pieces = [torch.from_numpy(TOKENS.ids_T[TOKENS.offsets_S1[row] : TOKENS.offsets_S1[row + 1]]) for row in rows]
        input_ids_BL = torch.nn.utils.rnn.pad_sequence(
            pieces, batch_first=True, padding_value=model.config.pad_token_id or 0
        ).long()
        lengths_B = torch.tensor([len(piece) for piece in pieces])
        mask_BL = (torch.arange(input_ids_BL.shape[1]) < lengths_B[:, None]).long()
        parts.append(model(input_ids=input_ids_BL, attention_mask=mask_BL).logits)
    return torch.cat(parts).numpy()


@pytest.mark.parametrize(
    ("name", "changes", "is_packed", "is_cut"), ARCHITECTURES, ids=[one[0] for one in ARCHITECTURES]
)
def test_logits_are_those_of_the_padded_forward(
    name: str, changes: dict[str, Any], is_packed: bool, is_cut: bool
) -> None:
    model = build(name, changes)
    expected_SC = padded_forward(model)
    encoder = Encoder(copy.deepcopy(model), "fp32", "cpu")
    assert (encoder.layout.is_packed, encoder.layout.is_cut) == (is_packed, is_cut)
    np.testing.assert_allclose(encoder.logits(TOKENS), expected_SC, atol=1e-4)

    logits_SC = Encoder(copy.deepcopy(model), "bf16", "cpu").logits(TOKENS)
    assert np.abs(logits_SC - expected_SC).max() <= 0.05
    is_clear_S = np.ptp(expected_SC, axis=1) > 0.01  # random weights bring near ties that a trained head does not
    assert np.mean((logits_SC.argmax(1) == expected_SC.argmax(1))[is_clear_S]) >= 0.995
    assert is_clear_S.mean() > 0.9


def whole_attention(
    query_HTD: torch.Tensor, key_HTD: torch.Tensor, value_HTD: torch.Tensor, is_seen_TT: torch.Tensor
) -> torch.Tensor:
    return scaled_dot_product_attention(query_HTD, key_HTD, value_HTD, attn_mask=is_seen_TT, scale=0.3)


@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize(("way", "size"), [("runs", 8), ("rectangles", 8), ("on_cuda", 8), ("on_cuda", 6)])
@pytest.mark.parametrize(("has_splits", "hip"), [(True, None), (True, "7.0"), (False, None)])
def test_documents_see_themselves_alone(
    sliding_window: int | None,
    way: str,
    size: int,
    has_splits: bool,
    hip: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offsets_B1 = torch.tensor([0, 5, 10, 12], dtype=torch.int32)
    rectangles = Rectangles(np.array([5, 5, 2]), 12, torch.device("cpu"))
    ways: dict[str, Any] = {"runs": {"runs": ((0, 2, 5), (10, 1, 2))}, "rectangles": {"rectangles": rectangles}}
    packing = Packing(offsets_B1, 5, **ways.get(way, {}))
    torch.manual_seed(0)
    query_1HTD, key_1HTD, value_1HTD = (torch.randn(1, 12, 4, size).transpose(1, 2) for _ in range(3))
    documents_T = torch.tensor([0] * 5 + [1] * 5 + [2] * 2)
    is_seen_TT = documents_T[:, None] == documents_T
    if sliding_window:
        is_seen_TT &= (torch.arange(12)[:, None] - torch.arange(12)).abs() < sliding_window
    expected_1THD = whole_attention(query_1HTD, key_1HTD, value_1HTD, is_seen_TT).transpose(1, 2)
    if way == "on_cuda":  # the kernel needs a GPU; here its documented meaning stands in for it

        def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):  # type: ignore[no-untyped-def]
            assert query.shape == key.shape == value.shape == (12, 4, 8)  # the kernel takes no heads of 6
            assert cu_seq_q is cu_seq_k is offsets_B1
            assert (max_q, max_k, scale) == (5, 5, 0.3)
            assert window_size == ((2, 2) if sliding_window else (-1, -1))
            return whole_attention(*(one.transpose(0, 1) for one in (query, key, value)), is_seen_TT).transpose(0, 1)

        def in_one_split(*args, num_splits=None, **options):  # type: ignore[no-untyped-def]
            assert num_splits == (None if hip else 1)  # else the other documents of a batch change a document's states
            return kernel(*args, **options)

        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", in_one_split if has_splits else kernel)
        monkeypatch.setattr(torch.version, "hip", hip)
    states_1THD, weights = packed_attention(
        torch.nn.Module(), query_1HTD, key_1HTD, value_1HTD, None, 0.3, packing=packing, sliding_window=sliding_window
    )
    assert weights is None
    torch.testing.assert_close(states_1THD, expected_1THD)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("fault", [None, "refuses", "sees other documents", "sees one token too many"])
def test_a_kernel_that_does_not_work_is_noticed(
    fault: str | None, with_gradients: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def on_cuda(qkv, packing, scaling, sliding_window):  # type: ignore[no-untyped-def]
        assert {one.dtype for one in qkv} == {torch.bfloat16}
        if fault == "refuses":
            raise TypeError("varlen_attn() got an unexpected keyword argument 'scale'")
        lengths_B = packing.offsets_B1.diff()
        documents_T = torch.arange(len(lengths_B)).repeat_interleave(lengths_B)
        is_seen_TT = documents_T[:, None] == documents_T if fault != "sees other documents" else torch.ones(114, 114)
        reach = (sliding_window or 114) + (fault == "sees one token too many")
        is_seen_TT = is_seen_TT.bool() & ((torch.arange(114)[:, None] - torch.arange(114)).abs() < reach)
        return scaled_dot_product_attention(*qkv, attn_mask=is_seen_TT).transpose(1, 2)

    to = torch.Tensor.to  # this machine's memory stands in for a GPU's
    monkeypatch.setattr(attention, "_on_cuda", on_cuda)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, _, dtype=None, **__: to(self, dtype) if dtype else self)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    tiny_bert = transformers.BertConfig(hidden_size=312, num_attention_heads=12)  # heads of 26
    works = attention.kernel_works(torch.device("cuda"), torch.bfloat16, tiny_bert, with_gradients=with_gradients)
    assert works is (fault is None)
    assert ("batches will be padded" in caplog.text) is (fault is not None)


@pytest.mark.parametrize(("name", "changes"), [one[:2] for one in ARCHITECTURES], ids=[one[0] for one in ARCHITECTURES])
def test_a_temperature_goes_into_the_last_layer(name: str, changes: dict[str, Any]) -> None:
    model = build(name, changes)
    expected_SC = padded_forward(model)
    assert scale_logits(model, 2.5)
    np.testing.assert_allclose(padded_forward(model), expected_SC / 2.5, atol=1e-5)


@pytest.mark.parametrize(("name", "changes"), [one[:2] for one in ARCHITECTURES], ids=[one[0] for one in ARCHITECTURES])
def test_a_new_head_begins_with_the_logits_that_it_is_given(name: str, changes: dict[str, Any]) -> None:
    model = build(name, changes)
    before_SC = padded_forward(model)
    begin_with_logits(model, torch.tensor([-3.0, 1.5]))  # a new head's bias is 0
    np.testing.assert_allclose(padded_forward(model) - before_SC, np.tile([-3.0, 1.5], (len(before_SC), 1)), atol=1e-5)
    after_SC = padded_forward(model)
    begin_with_logits(model, torch.tensor([2.0, 2.0]))  # what was trained before is kept
    np.testing.assert_array_equal(padded_forward(model), after_SC)


def test_a_head_without_a_bias_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = build("Bert", {})
    model.classifier.bias = None
    begin_with_logits(model, torch.tensor([-3.0, 1.5]))
    assert "cannot begin at the labels' shares: no bias in the layer that gives the logits" in caplog.text
    model.classifier = torch.nn.Identity()
    begin_with_logits(model, torch.tensor([-3.0, 1.5]))
    assert "no layer that gives the logits was found" in caplog.text


class Clipped(transformers.BertForSequenceClassification):
    """A model that does more with the logits than its last linear layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.clamp(-0.05, 0.05)
        return output


class OfAnotherKind(transformers.BertForSequenceClassification):
    """A model whose code refuses what the encoder tries."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if input_ids.shape[0] != 1:
            raise ValueError("All examples must have the same number of <eos> tokens.")
        return super().forward(input_ids, attention_mask, **kwargs)


def test_a_model_that_cannot_be_tried_is_run_as_it_is() -> None:
    encoder = Encoder(OfAnotherKind(build("Bert", {}).config), "fp32", "cpu")
    assert not encoder.layout.is_packed and not encoder.layout.is_cut
    one = TokenColumn(np.array([2, 5, 3], np.int32), offsets([3]), np.zeros(1, int), np.zeros(1, bool), pa.nulls(1))
    assert np.isfinite(encoder.logits(one)).all()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Clipped, "logits differ by 0.0"),
        (OfAnotherKind, "ValueError: All examples must have the same number of <eos> tokens."),
    ],
)
def test_a_temperature_that_cannot_go_into_the_weights(
    kind: type[Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = kind(build("Bert", {}).config).eval()
    before = copy.deepcopy(model.state_dict())
    assert not scale_logits(model, 0.5)
    said = "stays uncalibrated: its last linear layer alone does not divide logits by 0.5"
    assert f"warning: {kind.__name__} {said} ({why}" in caplog.text
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())


def test_a_model_without_a_last_linear_layer_stays_uncalibrated(caplog: pytest.LogCaptureFixture) -> None:
    model = build("Bert", {})
    model.config.num_labels = 7
    assert not scale_logits(model, 2.0)
    assert "stays uncalibrated: its last linear layer alone does not divide logits by 2 (logits differ" in caplog.text


def test_padding_may_be_the_last_id() -> None:
    assert Encoder(build("Bert", {"pad_token_id": SIZES["vocab_size"] - 1}), "fp32", "cpu").layout.is_packed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("name", "settings"), [("Bert", {}), ("ModernBert", {})])
def test_packed_on_a_gpu(name: str, settings: dict[str, Any]) -> None:
    expected_SC = padded_forward(build(name, settings))
    encoder = Encoder(build(name, settings), "bf16", "cuda")
    assert encoder.layout.is_packed
    np.testing.assert_allclose(encoder.logits(TOKENS), expected_SC, atol=0.05)


def test_a_model_that_reads_other_positions_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Roberta", {"pad_token_id": 1})
    expected_SC = padded_forward(model)
    monkeypatch.setattr("bertray.model.adapter.first_position", lambda _: 0)
    encoder = Encoder(model, "fp32", "cpu")
    assert not encoder.layout.is_packed
    np.testing.assert_allclose(encoder.logits(TOKENS), expected_SC, atol=1e-4)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_answered_by_smaller_batches(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(build("Bert", {}), "fp32", "cpu")
    expected_SC = encoder.logits(TOKENS)
    forward, sizes = encoder.layout.forward, []

    def limited(model: Any, tokens: TokenColumn, rows: np.ndarray) -> torch.Tensor:
        sizes.append(int(tokens.lengths_S[rows].sum()))
        if sizes[-1] > 600:
            raise error
        return forward(model, tokens, rows)

    monkeypatch.setattr(encoder.layout, "forward", limited)
    np.testing.assert_allclose(encoder.logits(TOKENS), expected_SC, atol=1e-5)
    assert (budget := encoder.token_budget) == 490  # half of half of a batch
    assert [size > 600 for size in sizes[:3]] == [True, True, False]

    raised = error

    def never(model: Any, tokens: TokenColumn, rows: np.ndarray) -> torch.Tensor:
        sizes.append(len(rows))
        raise raised

    monkeypatch.setattr(encoder.layout, "forward", never)
    with pytest.raises(type(error)):
        encoder.logits(TOKENS)
    assert sizes[-1] == 1
    assert encoder.token_budget == budget  # what this text needs says nothing of the next
    raised = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        encoder.logits(TOKENS)
    assert sizes[-1] > 1  # no matter of memory
