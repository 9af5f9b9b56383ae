"""Masks have the right rate and scale, follow from their seed, and pass gradients."""

import numpy as np
import pytest
import torch

from bertray.model.adapter import replace_layers
from bertray.training.learner import MaskedDropout, Masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_rate_and_scale(rate: float, dtype: torch.dtype) -> None:
    masks = Masks()
    masks.seed(1, 2)
    mask = masks.draw(torch.Size([1000, 1001]), rate, dtype)
    assert mask.dtype == dtype
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rate), dtype=dtype).item()}
    assert (mask == 0).double().mean().item() == pytest.approx(rate, abs=0.002)
    # neither along a row nor from row to row do neighbours know of each other
    zero = (mask == 0).double().numpy()
    for one, other in ((zero[:, :-1], zero[:, 1:]), (zero[:-1], zero[1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.005


def test_masks_follow_from_the_seed() -> None:
    masks, shape = Masks(), torch.Size([7, 9])

    def draw(*words: int) -> list[torch.Tensor]:
        masks.seed(*words)
        return [masks.draw(shape, 0.5, torch.float32) for _ in range(2)]

    one, other = draw(0, 1)
    assert torch.equal(draw(0, 1)[0], one) and not torch.equal(one, other)
    assert not torch.equal(draw(0, 2)[0], one) and not torch.equal(draw(1, 1)[0], one)


def test_a_model_is_changed_everywhere() -> None:
    masks = Masks()
    inner = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.0))
    model = torch.nn.Sequential(torch.nn.Dropout(0.3), inner)
    replace_layers(model, torch.nn.Dropout, lambda layer: MaskedDropout(layer.p, masks))
    assert isinstance(model[0], MaskedDropout) and isinstance(model[1][1], MaskedDropout)
    states = torch.ones(50, 2, requires_grad=True)
    dropped = model[0].train()(states)
    dropped.sum().backward()
    assert torch.equal(states.grad, dropped)
    assert model[0].eval()(states) is states
    assert model[1][1].train()(states) is states
