"""Base class of the custom operators: one operator of one backend.

`torch.ops.manifold_hc.<backend>_<operator>` is known to autograd, `torch.compile` and CUDA graphs
by a schema, a fake and a derivative. Each file in `operators/` holds one of them with its
derivatives and the call that flattens the tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, library

from manifold_hc.errors import BackendError
from manifold_hc.kernels.arguments import Arguments, Support, arguments_of
from manifold_hc.kernels.values import GROUPS

NAMESPACE = "manifold_hc"

_library = library.Library(NAMESPACE, "FRAGMENT")


class Operator(ABC):
    """One operator of one backend; a subclass has the schema and the four methods below.

    Shapes: N tokens, n streams, C channels, R rows of phi. Arguments that a schema spells as one of
    `values.GROUPS` reach the methods as that value.
    """

    schema: ClassVar[str]
    """Name, arguments and results, as PyTorch takes it."""

    def __init__(self, backend: str, support: Support) -> None:
        """Define the operator, which raises for arguments beyond `support`: kernels trust them."""
        operator, _, arguments = self.schema.partition("(")
        name = f"{backend}_{operator}"
        typed = arguments_of(arguments)
        self.backend = backend
        self.operator = operator
        self._count = len(typed)
        self._check = Arguments(name, f"({arguments}", support)
        # A link is an expanded stand-in of the streams' shape, which must not be materialised.
        self._dense = [
            index
            for index, (kind, argument) in enumerate(typed)
            if kind.startswith("Tensor") and argument != "link"
        ]
        self._groups = _groups(typed)
        qualified = f"{NAMESPACE}::{name}"
        # The tag promises torch.compile a fake that is true to `run`.
        _library.define(f"{backend}_{self.schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, self._checked_run, "CompositeExplicitAutograd")
        library.register_fake(qualified, self._checked_fake, lib=_library)
        library.register_autograd(
            qualified, self._whole_backward, setup_context=self._setup_context, lib=_library
        )
        self.op: Any = getattr(torch.ops.manifold_hc, name).default

    @abstractmethod
    def run(self, *arguments: Any, **_: Any) -> Any:
        """Compute the results; every tensor but a link is contiguous."""

    @abstractmethod
    def fake(self, *arguments: Any, **_: Any) -> Any:
        """Return empty results: shapes, dtypes and devices alone."""

    def save(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:  # noqa: B027
        """Save for the backward pass; an operator without a derivative keeps this empty one."""

    def backward(self, ctx: Any, *grads: Any, **_: Any) -> Sequence[Tensor | None]:
        """Return gradients of the leading inputs; those of the rest are None."""
        raise BackendError(
            f"{self.operator}: compiled backends have first derivatives only; "
            'use backend="reference" for higher ones'
        )

    def _checked_run(self, *arguments: Any) -> Any:
        self._check(arguments, computes=True)
        dense = list(arguments)
        for index in self._dense:
            argument = arguments[index]
            if isinstance(argument, Tensor):
                dense[index] = argument.contiguous()
            elif argument is not None:
                dense[index] = [None if t is None else t.contiguous() for t in argument]
        return self.run(*(dense if self._groups is None else self._grouped(dense)))

    def _checked_fake(self, *arguments: Any) -> Any:
        self._check(arguments, computes=False)
        return self.fake(*self._grouped(arguments))

    def _setup_context(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        self.save(ctx, self._grouped(inputs), output)

    def _whole_backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # PyTorch wants a gradient of every argument: None for the numbers after the last tensor.
        found = self.backward(ctx, *grads)
        return (*found, *[None] * (self._count - len(found)))

    def _grouped(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """Arguments in the schema's order, each group of `values.GROUPS` as its value."""
        if self._groups is None:
            return arguments
        return [
            arguments[first] if make is None else make(arguments[first:end])
            for first, end, make in self._groups
        ]


def _groups(
    typed: Sequence[tuple[str, str]],
) -> list[tuple[int, int, Callable[[Sequence[Any]], Any] | None]] | None:
    """(first, end, value) of every argument or group of a schema; None where it has no group."""
    found: list[tuple[int, int, Callable[[Sequence[Any]], Any] | None]] = []
    index = 0
    while index < len(typed):
        end, make = index + 1, None
        for fragment, value in GROUPS.items():
            wanted = arguments_of(fragment)
            if list(typed[index : index + len(wanted)]) == wanted:
                end, make = index + len(wanted), value
        found.append((index, end, make))
        index = end
    return found if any(make for _, _, make in found) else None


def flattened(weights: Tensor, batch: Sequence[int], tokens: int, *own: int) -> Tensor:
    """Coefficients [*#batch, *own] of all tokens: [N, *own]."""
    return weights.expand(*batch, *own).reshape(tokens, *own)


def unflattened(batch: Sequence[int], flat: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [N, ...] in the batch's own shape: [*batch, ...]."""
    return [tensor.view(*batch, *tensor.shape[1:]) for tensor in flat]


def grad_carrier(x: Tensor) -> Tensor:
    """A stand-in of x's shape, without memory, whose gradient is that of the next written streams.

    A write hands the gradient g of the written streams on as the gradient of its link. The backward
    of the coefficients then makes `res^T g`, for the streams, and `<g[o], x[i]>`, for res, in the
    pass over the streams that it needs anyway.
    """
    return x.new_zeros(()).expand(x.shape)


def fake_maps(x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty pre, post, res, projected and inverse_rms of the streams x."""
    N, n, _ = x.shape
    return (
        phi.new_empty(N, n),
        phi.new_empty(N, n),
        phi.new_empty(N, n, n),
        phi.new_empty(N, phi.shape[0]),
        phi.new_empty(N),
    )


def fake_input(x: Tensor) -> Tensor:
    """An empty sublayer input u [N, C] of the streams x."""
    return x.new_empty(x.shape[0], x.shape[2])


def fake_carrier(x: Tensor) -> Tensor:
    """An empty `grad_carrier`."""
    return x.new_empty(()).expand(x.shape)
