"""States enter rectangles and leave them, and gradients go the same ways back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bertray.model.buckets import Rectangles

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(0, 9))
def test_states_come_back_and_gradients_too(lengths: list[int], num_left: int) -> None:
    num_tokens = sum(lengths)
    rectangles = Rectangles(np.array(lengths), num_tokens + num_left, CPU)
    states_TE = torch.arange(1.0, 1 + 2 * (num_tokens + num_left)).view(-1, 2).requires_grad_()
    parts = rectangles.enter(states_TE)

    sequences = iter(states_TE[:num_tokens].split(lengths))
    for part, (num_rows, width), is_hidden in zip(parts, rectangles.sizes, rectangles.is_hidden, strict=True):
        assert part.shape == (num_rows, width, 2)
        for row, places_LE in enumerate(part):
            sequence = next(sequences)
            torch.testing.assert_close(places_LE[: len(sequence)], sequence)
            assert not places_LE[len(sequence) :].any()
            hidden_L = torch.zeros(width, dtype=torch.bool) if is_hidden is None else is_hidden[row, :, 0]
            assert hidden_L.tolist() == [False] * len(sequence) + [True] * (width - len(sequence))
            if is_hidden is not None and len(sequence) < width:
                assert not is_hidden[row, :, len(sequence)].any()  # what is no token sees something all the same
    assert next(sequences, None) is None

    # What is in no rectangle neither gives nor takes: not even a gradient that the places without a token have.
    left_TE = rectangles.leave([3 * part + 1 for part in parts])
    torch.testing.assert_close(left_TE[:num_tokens], 3 * states_TE[:num_tokens] + 1)
    assert not left_TE[num_tokens:].any()
    left_TE.square().sum().backward()
    expected_TE = 6 * (3 * states_TE.detach() + 1)
    expected_TE[num_tokens:] = 0
    torch.testing.assert_close(states_TE.grad, expected_TE)


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([18, 18, 20], [(3, 20)]),
        ([5, 6, 40], [(2, 8), (1, 40)]),  # unlike texts do not fill each other up
        ([300, 290, 9], [(2, 304), (1, 12)]),  # from 128 tokens on multiples of 8 and more
    ],
)
def test_sizes(lengths: list[int], sizes: list[tuple[int, int]]) -> None:
    assert Rectangles(np.array(lengths), sum(lengths), CPU).sizes == sizes


def test_batches_of_training_have_few_sizes() -> None:
    rng = np.random.default_rng(0)
    lengths_S = np.sort(rng.lognormal(2.5, 0.5, 32_000).astype(int).clip(3, 128))
    batches = lengths_S.reshape(-1, 32)
    sizes = {size for lengths_B in batches for size in Rectangles(lengths_B, int(lengths_B.sum()), CPU).sizes}
    assert len(sizes) < 50 < len({(length, count) for row in batches for length, count in enumerate(np.bincount(row))})
