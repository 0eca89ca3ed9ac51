"""One forward and backward pass: the unit that the benches time, count and compare."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """A pass that can be repeated."""

    forward: Callable[[], Sequence[Tensor]]
    """Runs a fresh forward pass; returns its outputs."""
    leaves: tuple[Tensor, ...]
    """Tensors whose gradients the backward pass computes."""
    cotangents: tuple[Tensor, ...]
    """Gradient of each output, where the backward pass starts."""

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.cotangents[0].device

    def clear(self) -> None:
        """Drop the gradients, so that the next backward pass allocates new ones."""
        for leaf in self.leaves:
            leaf.grad = None

    def backward(self, outputs: Sequence[Tensor]) -> None:
        """Accumulate the gradients of all leaves."""
        torch.autograd.backward(outputs, self.cotangents)

    def both(self) -> None:
        """Run one forward and backward pass; the gradients stay on the leaves."""
        self.clear()
        self.backward(self.forward())

    def tensors(self) -> list[Tensor]:
        """Return the outputs, then the leaves' gradients; zeros for a leaf without influence."""
        outputs = self.forward()
        pairs = zip(outputs, self.cotangents, strict=True)
        connected = [(o, g.to(o.dtype)) for o, g in pairs if o.requires_grad]
        gradients = torch.autograd.grad(
            [output for output, _ in connected],
            self.leaves,
            [cotangent for _, cotangent in connected],
            materialize_grads=True,
        )
        return [*(output.detach() for output in outputs), *gradients]


def call(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Task:
    """Return one call of the function on leaves with these values, with random cotangents."""
    leaves = tuple(map(leaf, tensors))

    def forward() -> tuple[Tensor, ...]:
        result = function(*leaves)
        return result if isinstance(result, tuple) else (result,)

    with torch.no_grad():
        cotangents = tuple(torch.randn_like(output) for output in forward())
    return Task(forward, leaves, cotangents)


def leaf(tensor: Tensor) -> Tensor:
    """Return the tensor as a leaf that requires a gradient."""
    return tensor.detach().requires_grad_()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the prints and warnings of third-party code."""
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield
