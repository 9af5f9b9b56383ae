"""AdamW in 32 bits under a model of any precision: torch's own in fp32, no lost updates in bf16, exact state."""

import copy
import gc
from pathlib import Path

import psutil
import pytest
import torch
from transformers import BertForSequenceClassification

from bertray.errors import RequestError
from bertray.training.config import TrainConfig
from bertray.training.optimizer import Optimizer, _depths, check_memory, learning_rate_factor
from tests.conftest import tiny_config


def build() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(tiny_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def give_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weights in model.parameters():
        weights.grad = torch.randn(weights.shape, generator=generator).to(weights.dtype)


SETTINGS = TrainConfig(data="data", output="output", learning_rate=1e-3, weight_decay=0.01)


def test_fp32_is_torchs_adamw() -> None:
    model, expected = build(), build()
    matrices = [weights for weights in expected.parameters() if weights.ndim > 1]
    vectors = [weights for weights in expected.parameters() if weights.ndim == 1]
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}])
    optimizer = Optimizer(model, SETTINGS, {})
    for step in range(1, 6):
        factor = learning_rate_factor(step, 5, 2)
        give_gradients(model, step)
        give_gradients(expected, step)
        gradients = torch.cat([weights.grad.double().flatten() for weights in expected.parameters()])
        assert optimizer.step(factor).item() == pytest.approx(
            gradients.norm().item(), rel=1e-4
        )  # CPUs add up squares in 32 bits
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = 1e-3 * factor
        adamw.step()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_bf16_is_torchs_adamw_of_32_bits() -> None:
    model, expected = build().to(torch.bfloat16), build()
    exact = {name: weights.detach().clone() for name, weights in expected.named_parameters()}
    optimizer = Optimizer(model, SETTINGS, exact)
    reference = Optimizer(expected, SETTINGS, {})
    for step in range(1, 6):
        give_gradients(model, step)
        for weights, of_model in zip(expected.parameters(), model.parameters(), strict=True):
            weights.grad = of_model.grad.float()
        assert optimizer.step(0.5).item() == pytest.approx(reference.step(0.5).item(), rel=1e-6)
    weights = optimizer.weights()
    for name, of_reference in reference.weights().items():
        torch.testing.assert_close(weights[name], of_reference, rtol=0, atol=1e-7)
        assert torch.equal(model.state_dict()[name], weights[name].bfloat16())


def test_a_gradient_that_is_no_number_shows() -> None:
    model = build().to(torch.bfloat16)
    optimizer = Optimizer(model, SETTINGS, {})
    give_gradients(model, 0)
    model.classifier.weight.grad[0, 0] = torch.nan
    assert optimizer.step(1.0).isnan()
    assert all(weights.isnan().all() for weights in model.parameters())


def test_small_updates_are_not_lost_in_bf16() -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    model.to(torch.bfloat16)
    optimizer = Optimizer(model, SETTINGS.model_copy(update={"learning_rate": 1e-6}), {})
    for step in range(50):
        give_gradients(model, 0)
        optimizer.step(1.0)
        assert all(weights.grad is None for weights in model.parameters()), step
    weights = optimizer.weights()
    name = "bert.encoder.layer.0.output.dense.weight"
    assert weights[name].dtype == torch.float32
    moved = (weights[name] - before[name]).abs().mean().item()
    assert moved == pytest.approx(50 * 1e-6, rel=0.2)  # of weights around 0.02 a step is 1/80 of bf16's spacing
    torch.testing.assert_close(model.state_dict()[name], weights[name].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    whole, first = build().to(dtype), build().to(dtype)
    one, other = (Optimizer(model, SETTINGS, {}) for model in (whole, first))
    for step in range(1, 7):
        give_gradients(whole, step)
        one.step(0.5)
        if step <= 3:
            give_gradients(first, step)
            other.step(0.5)
    second = build().to(dtype)
    resumed = Optimizer(second, SETTINGS, {})
    resumed.load_state(other.state(), 3)
    for step in range(4, 7):
        give_gradients(second, step)
        resumed.step(0.5)
    for name, weights in one.weights().items():
        assert torch.equal(weights, resumed.weights()[name])
        assert torch.equal(whole.state_dict()[name], second.state_dict()[name])


def storages() -> dict[int, int]:
    """Bytes of all that tensors hold in this process, by address."""
    held = [one.untyped_storage() for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return {one.data_ptr(): one.nbytes() for one in held}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_is_asked_for_is_what_is_held(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    before = storages()
    model = build().to(dtype)
    optimizer = Optimizer(model, SETTINGS, {})
    give_gradients(model, 0)
    held = {address: size for address, size in storages().items() if address not in before}
    held |= {weights.grad.data_ptr(): weights.grad.nbytes for weights in model.parameters()}
    num_bytes = sum(held.values())
    assert optimizer

    def check(available: float) -> None:
        free = psutil.virtual_memory()._replace(available=available)
        with monkeypatch.context() as patched:
            patched.setattr("psutil.virtual_memory", lambda: free)
            check_memory(model)

    check(1.02 * num_bytes)
    with pytest.raises(RequestError, match="are free"):
        check(0.98 * num_bytes)


def test_free_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr("bertray.training.optimizer.CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text(f"{(1 << 30) + 1000}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1000\ninactive_file {1 << 30}\nactive_file 0\n")
    for limit in ("max", f"{1 << 30}"):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        check_memory(model)
    (tmp_path / "memory.max").write_text("2000\n")
    with pytest.raises(RequestError, match=r"0\.0 GiB are free"):
        check_memory(model)


def test_lower_layers_learn_slower() -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    optimizer = Optimizer(model, SETTINGS.model_copy(update={"weight_decay": 0.0, "layer_decay": 0.5}), {})
    give_gradients(model, 0)
    optimizer.step(1.0)
    moved = {name: (weights - before[name]).abs().mean().item() for name, weights in model.state_dict().items()}
    # AdamW's first step is the learning rate: head, two layers, embeddings
    assert moved["classifier.weight"] == pytest.approx(1e-3, rel=0.01)
    assert moved["bert.encoder.layer.1.output.dense.weight"] == pytest.approx(5e-4, rel=0.01)
    assert moved["bert.encoder.layer.0.output.dense.weight"] == pytest.approx(2.5e-4, rel=0.01)
    assert moved["bert.embeddings.word_embeddings.weight"] == pytest.approx(1.25e-4, rel=0.01)


def test_depths_of_other_families() -> None:
    names = ["model.embeddings.norm.weight", "model.layers.0.mlp.weight", "model.layers.11.mlp.weight", "head.weight"]
    assert _depths(names, "model") == [0, 1, 12, 13]


def test_the_schedule_rises_and_falls() -> None:
    factors = [learning_rate_factor(step, 10, 4) for step in range(1, 11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == pytest.approx([6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])
    assert learning_rate_factor(1, 10, 0) == pytest.approx(10 / 11)
