"""Code that was written for float32 runs in float64, and only inside the mode."""

import pytest
import torch

from manifold_hc.verify import Widened


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.float(),
        lambda x: x.bfloat16(),
        lambda x: x.half(),
        lambda x: x.to(torch.float32),
        lambda x: x.to(dtype=torch.bfloat16),
        lambda x: x.softmax(-1, dtype=torch.float32),
        lambda x: x + torch.zeros(3, dtype=torch.float32),
    ],
)
def test_casts_keep_float64(cast):
    x = torch.rand(3, dtype=torch.float64)
    with Widened():
        found = cast(x)
        assert found.dtype is torch.float32, "checks of the dtype pass"
    assert found.dtype is torch.float64


def test_gradients_are_float64():
    x = torch.rand(3, dtype=torch.float64, requires_grad=True)
    with Widened():
        y = (x.float() / 3).sum()
    y.backward()
    assert x.grad.dtype is torch.float64
    assert x.grad[0] == torch.tensor(1 / 3, dtype=torch.float64)


def test_integers_and_code_outside_are_untouched():
    with Widened():
        assert torch.arange(3).dtype is torch.int64
        assert torch.ones(2).long().dtype is torch.int64
    assert torch.ones(2).dtype is torch.float32
