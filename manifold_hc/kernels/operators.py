"""The custom operators: one schema, one fake and one derivative for every compiled backend.

A backend brings plain functions on tensors (`Kernels`); `register` turns them into
`torch.ops.manifold_hc.<backend>_<operator>`, which autograd, `torch.compile` and CUDA graphs
understand. Tokens are flattened to N here; every tensor is contiguous; coefficients are float32,
streams what the backend takes.

What makes coefficients and the write that uses them share a gradient. For the gradient g of the
written streams, `res^T g` reaches the streams that were mixed, and `<g[o], x[i]>` is the gradient
of `res`. Both are cheapest where the rest of the streams' gradient is made, in the same pass. So a
write hands g on as the gradient of `link`, an empty stand-in of the streams' shape that came with
the coefficients, and their backward does the rest: streams and `res` that are mixed under a link
get their gradients through it alone.

`boundary` is all that lies between two sublayers: the write of one, the coefficients and the read
of the next.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, library

from manifold_hc.errors import BackendError
from manifold_hc.kernels.arguments import FUSED_CONSTRAINTS, IDENTITY, Arguments, Support

__all__ = ["FUSED_CONSTRAINTS", "IDENTITY", "NAMESPACE", "Kernels", "Settings", "register"]

NAMESPACE = "manifold_hc"


class Settings(NamedTuple):
    """The numbers behind a token's coefficients, as the operators take them."""

    constraint: str
    iterations: int
    transposed: bool
    norm_eps: float
    hc_eps: float
    learns: bool
    """Whether what comes through the link is a gradient of res too."""


@runtime_checkable
class Kernels(Protocol):
    """What a backend implements. N tokens, n streams, C channels, R rows of phi.

    Results are new tensors, written whole; the gradient of an input that is None is an empty one.
    `transposed`: logits are DeepSeek-V4's `comb[source, target]` and its order of steps and
    epsilons holds; res is `res[o, i]` all the same.
    """

    def sinkhorn(self, logits: Tensor, iterations: int, transposed: bool, hc_eps: float) -> Tensor:
        """logits [N, n, n] -> res [N, o, i]."""

    def sinkhorn_backward(
        self, grad: Tensor, logits: Tensor, iterations: int, transposed: bool, hc_eps: float
    ) -> Tensor:
        """Gradient of the finite iteration, its iterates recomputed: [N, n, n]."""

    def project(self, v: Tensor, phi: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
        """v [N, K], phi [R, K] -> `v phi^T / rms(v)` [N, R] and 1 / rms [N]."""

    def project_backward(
        self, grad: Tensor, v: Tensor, phi: Tensor, projected: Tensor, inverse_rms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of v (in v's dtype) and phi."""

    def read(self, x: Tensor, pre: Tensor) -> Tensor:
        """x [N, n, C], pre [N, n] -> u [N, C] in x's dtype."""

    def read_backward(self, grad: Tensor, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and pre."""

    def write(self, x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
        """x [N, n, C], y [N, C] of any dtype, post [N, n], res [N, o, i] -> x' in x's dtype."""

    def write_backward(
        self, grad: Tensor, x: Tensor, y: Tensor, post: Tensor, res: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, y, post and res."""

    def branch_backward(self, grad: Tensor, y: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a write's y and post alone."""

    def coefficients(
        self, x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `coefficients_and_read` returns without u, the same bits."""

    def coefficients_and_read(
        self, x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """u [N, C], pre [N, n], post [N, n], res [N, n, n], projected [N, R], 1 / rms [N]."""

    def coefficients_and_read_backward(
        self,
        grad_u: Tensor | None,
        grad_pre: Tensor | None,
        grad_post: Tensor | None,
        grad_res: Tensor | None,
        grad_link: Tensor | None,
        x: Tensor,
        phi: Tensor,
        alpha: Tensor,
        bias: Tensor,
        res: Tensor,
        projected: Tensor,
        inverse_rms: Tensor,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, phi, alpha and bias; `grad_link`: of what is written next."""

    def boundary(
        self,
        x: Tensor,
        y: Tensor,
        post: Tensor,
        res: Tensor,
        pre: Tensor | None,
        phi: Tensor,
        alpha: Tensor,
        bias: Tensor,
        weight: Tensor | None,
        input_eps: float,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The written streams [N, n, C], and of them what `coefficients_and_read` returns.

        `pre`: what is read with, [N, n]; without it the new coefficients. `weight` [C]: u is
        divided by its root mean square, with `input_eps` inside the root, and multiplied by it.
        """

    def boundary_backward(
        self,
        grad_written: Tensor | None,
        grad_u: Tensor | None,
        grad_pre: Tensor | None,
        grad_post: Tensor | None,
        grad_res: Tensor | None,
        grad_link: Tensor | None,
        written: Tensor,
        y: Tensor,
        post: Tensor,
        pre: Tensor | None,
        phi: Tensor,
        alpha: Tensor,
        bias: Tensor,
        weight: Tensor | None,
        input_eps: float,
        res: Tensor,
        projected: Tensor,
        inverse_rms: Tensor,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Whole gradient of the written streams; of y, post, pre, phi, alpha, bias and weight.

        `post`: that of the write; `res`, `projected` and `inverse_rms`: what `boundary` returned.
        """

    def rebuild(
        self,
        x: Tensor,
        writes: Sequence[tuple[Tensor, Tensor, Tensor]],
        reads: Sequence[Tensor],
        norms: Sequence[tuple[Tensor | None, float]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The streams after each of `writes` (y, post, res), and what each of `reads` (pre) reads.

        What is read goes through each of `norms` (weight, input_eps) that has a weight.

        From x [N, n, C], which the first of `reads` reads and the first of `writes` mixes; there is
        one write fewer. All y have one dtype. Bit for bit what `write`, `read` and `boundary` make.
        """


def register(backend: str, kernels: Kernels, support: Support) -> None:
    """Define `torch.ops.manifold_hc.<backend>_<operator>` for everything in `kernels`.

    An operator raises for arguments that `kernels`, which serve no more than `support`, would
    misread.
    """
    definitions = (
        *(_sinkhorn, _project, _read, _write),
        *(_coefficients_and_read, _coefficients, _boundary, _rebuild),
    )
    for define in definitions:
        define(_Definer(backend, kernels, support))


class _Definer:
    """Defines one backend's operators."""

    def __init__(self, backend: str, kernels: Kernels, support: Support) -> None:
        self.backend = backend
        self.kernels: Any = kernels
        self.support = support

    def __call__(
        self,
        operator: str,
        schema: str,
        fake: Any,
        *,
        run: Any = None,
        keep: Any = None,
        backward: Any = None,
    ) -> Any:
        """The new operator, to call. Without `backward` its derivative raises."""
        name = f"{self.backend}_{operator}"
        check = Arguments(name, schema, self.support)
        compute = run or self._plain(operator)

        def checked(*arguments: Any) -> Any:
            check(arguments, computes=True)
            return compute(*arguments)

        def checked_fake(*arguments: Any) -> Any:
            check(arguments, computes=False)
            return fake(*arguments)

        _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, checked, "CompositeExplicitAutograd")
        qualified = f"{NAMESPACE}::{name}"
        library.register_fake(qualified, checked_fake, lib=_library)
        library.register_autograd(
            qualified, backward or _only_once(operator), setup_context=keep, lib=_library
        )
        return self.operator(operator)

    def operator(self, name: str) -> Any:
        """One that is defined."""
        return getattr(torch.ops.manifold_hc, f"{self.backend}_{name}").default

    def _plain(self, operator: str) -> Any:
        kernel = getattr(self.kernels, operator)
        return lambda *arguments: kernel(*_dense(*arguments))


_library = library.Library(NAMESPACE, "FRAGMENT")


def _dense(*arguments: Any) -> tuple[Any, ...]:
    """The tensors among them made contiguous."""
    return tuple(a.contiguous() if isinstance(a, Tensor) else a for a in arguments)


def _only_once(operator: str) -> Any:
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise BackendError(
            f"{operator}: compiled backends have first derivatives only; "
            'use backend="reference" for higher ones'
        )

    return backward


def _sinkhorn(define: _Definer) -> None:
    numbers = "int iterations, bool transposed, float hc_eps"
    differentiate = define(
        "sinkhorn_backward",
        f"(Tensor grad_res, Tensor logits, {numbers}) -> Tensor",
        lambda grad, logits, *_: torch.empty_like(logits),
    )

    def keep(ctx: Any, inputs: Any, output: Tensor) -> None:
        logits, *ctx.numbers = inputs
        ctx.save_for_backward(logits)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return differentiate(grad, *ctx.saved_tensors, *ctx.numbers), None, None, None

    define(
        "sinkhorn",
        f"(Tensor logits, {numbers}) -> Tensor",
        lambda logits, *_: torch.empty_like(logits),
        keep=keep,
        backward=backward,
    )


def _project(define: _Definer) -> None:
    differentiate = define(
        "project_backward",
        "(Tensor grad_projected, Tensor v, Tensor phi, Tensor projected, Tensor inverse_rms)"
        " -> (Tensor, Tensor)",
        lambda grad, v, phi, projected, inverse_rms: (torch.empty_like(v), torch.empty_like(phi)),
    )

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        v, phi, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(v, phi, *output)

    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*differentiate(grad, *ctx.saved_tensors), None)

    define(
        "project",
        "(Tensor v, Tensor phi, float norm_eps) -> (Tensor, Tensor)",
        lambda v, phi, norm_eps: (
            phi.new_empty(v.shape[0], phi.shape[0]),
            phi.new_empty(v.shape[0]),
        ),
        keep=keep,
        backward=backward,
    )


def _read(define: _Definer) -> None:
    differentiate = define(
        "read_backward",
        "(Tensor grad_u, Tensor x, Tensor pre) -> (Tensor, Tensor)",
        lambda grad, x, pre: (torch.empty_like(x), torch.empty_like(pre)),
    )

    def keep(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return differentiate(grad, *ctx.saved_tensors)

    define(
        "read",
        "(Tensor x, Tensor pre) -> Tensor",
        lambda x, pre: x.new_empty(x.shape[0], x.shape[2]),
        keep=keep,
        backward=backward,
    )


def _write(define: _Definer) -> None:
    differentiate = define(
        "write_backward",
        "(Tensor grad_written, Tensor x, Tensor y, Tensor post, Tensor res)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        lambda grad, *inputs: tuple(map(torch.empty_like, inputs)),
    )
    differentiate_branch = define(
        "branch_backward",
        "(Tensor grad_written, Tensor y, Tensor post) -> (Tensor, Tensor)",
        lambda grad, *inputs: tuple(map(torch.empty_like, inputs)),
    )

    def keep(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, y, post, res, link = inputs
        ctx.save_for_backward(*((x, y, post, res) if link is None else (y, post)))

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpoints allow no more
        if len(saved) == 2:
            return (None, *differentiate_branch(grad, *saved), None, grad)
        return (*differentiate(grad, *saved), None)

    define(
        "write",
        "(Tensor x, Tensor y, Tensor post, Tensor res, Tensor? link) -> Tensor",
        lambda x, *_: torch.empty_like(x),
        run=lambda x, y, post, res, link: define.kernels.write(*_dense(x, y, post, res)),
        keep=keep,
        backward=backward,
    )


SETTINGS = (
    "str constraint, int iterations, bool transposed, float norm_eps, float hc_eps, bool learns"
)


def _coefficients_and_read(define: _Definer) -> None:
    differentiate = define(
        "coefficients_and_read_backward",
        "(Tensor? grad_u, Tensor? grad_pre, Tensor? grad_post, Tensor? grad_res, "
        "Tensor? grad_link, Tensor x, Tensor phi, Tensor alpha, Tensor bias, Tensor res, "
        f"Tensor projected, Tensor inverse_rms, {SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
        lambda *a: tuple(map(torch.empty_like, a[5:9])),
        run=lambda *a: define.kernels.coefficients_and_read_backward(
            *_dense(*a[:12]), Settings(*a[12:])
        ),
    )

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        x, phi, alpha, bias, *ctx.settings = inputs
        _, _, _, res, projected, inverse_rms, _ = output
        ctx.mark_non_differentiable(projected, inverse_rms)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, phi, alpha, bias, res, projected, inverse_rms)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        u, pre, post, res, _, _, link = grads
        found = differentiate(u, pre, post, res, link, *ctx.saved_tensors, *ctx.settings)
        return (*found, *[None] * len(ctx.settings))

    def run(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *settings: Any) -> Any:
        tensors = _dense(x, phi, alpha, bias)
        made = define.kernels.coefficients_and_read(*tensors, Settings(*settings))
        return (*made, _grad_carrier(x))

    define(
        "coefficients_and_read",
        f"(Tensor x, Tensor phi, Tensor alpha, Tensor bias, {SETTINGS})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        lambda x, phi, *_: _fake_reading(x, phi),
        run=run,
        keep=keep,
        backward=backward,
    )


def _coefficients(define: _Definer) -> None:
    differentiate = define.operator("coefficients_and_read_backward")

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        x, phi, alpha, bias, *ctx.settings = inputs
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, phi, alpha, bias, *output[2:])

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = differentiate(None, *grads[:3], None, *ctx.saved_tensors, *ctx.settings)
        return (*found, *[None] * len(ctx.settings))

    define(
        "coefficients",
        f"(Tensor x, Tensor phi, Tensor alpha, Tensor bias, {SETTINGS})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        lambda x, phi, *_: _fake_reading(x, phi)[1:6],
        run=lambda *a: define.kernels.coefficients(*_dense(*a[:4]), Settings(*a[4:])),
        keep=keep,
        backward=backward,
    )


def _boundary(define: _Definer) -> None:
    differentiate_write = define.operator("write_backward")
    differentiate = define(
        "boundary_backward",
        "(Tensor? grad_written, Tensor? grad_u, Tensor? grad_pre, Tensor? grad_post, "
        "Tensor? grad_res, Tensor? grad_link, Tensor written, Tensor y, Tensor post, Tensor? pre, "
        "Tensor phi, Tensor alpha, Tensor bias, Tensor? weight, float input_eps, Tensor res, "
        f"Tensor projected, Tensor inverse_rms, {SETTINGS})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        lambda *a: tuple(a[6].new_empty(0) if t is None else torch.empty_like(t) for t in a[6:14]),
        run=lambda *a: define.kernels.boundary_backward(*_dense(*a[:18]), Settings(*a[18:])),
    )

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        x, y, post, res, pre, link, phi, alpha, bias, weight, ctx.input_eps, *ctx.settings = inputs
        written, _, _, _, *made, _ = output
        ctx.mark_non_differentiable(*made[1:])
        ctx.set_materialize_grads(False)
        mixed = (x, res) if link is None else (None, None)
        ctx.save_for_backward(*mixed, written, y, post, pre, phi, alpha, bias, weight, *made)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, res, written, y, post, pre, phi, alpha, bias, weight, *made = ctx.saved_tensors
        inputs = (written, y, post, pre, phi, alpha, bias, weight, ctx.input_eps, *made)
        found = differentiate(*grads[:5], grads[7], *inputs, *ctx.settings)
        whole, dy, dpost, dpre, dphi, dalpha, dbias, dweight = found
        dx, dres, link = None, None, whole
        if x is not None:
            link = None
            dx, dy, dpost, dres = differentiate_write(whole, x, y, post, res)
        return (
            *(dx, dy, dpost, dres, None if pre is None else dpre, link),
            *(dphi, dalpha, dbias, None if weight is None else dweight),
            *[None] * (1 + len(ctx.settings)),
        )

    def run(x: Tensor, *rest: Any) -> Any:
        y, post, res, pre, _, phi, alpha, bias, weight, input_eps, *settings = rest
        tensors = _dense(x, y, post, res, pre, phi, alpha, bias, weight)
        made = define.kernels.boundary(*tensors, input_eps, Settings(*settings))
        return (*made, _grad_carrier(x))

    define(
        "boundary",
        "(Tensor x, Tensor y, Tensor post, Tensor res, Tensor? pre, Tensor? link, Tensor phi, "
        f"Tensor alpha, Tensor bias, Tensor? weight, float input_eps, {SETTINGS})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        lambda x, *rest: (torch.empty_like(x), *_fake_reading(x, rest[5])),
        run=run,
        keep=keep,
        backward=backward,
    )


def _rebuild(define: _Definer) -> None:
    def run(
        x: Tensor,
        y: list[Tensor],
        post: list[Tensor],
        res: list[Tensor],
        pre: list[Tensor],
        weight: list[Tensor | None],
        eps: list[float],
    ) -> Any:
        writes = [_dense(*write) for write in zip(y, post, res, strict=True)]
        norms = list(zip(_dense(*weight), eps, strict=True))
        return define.kernels.rebuild(x.contiguous(), writes, _dense(*pre), norms)

    define(
        "rebuild",
        "(Tensor x, Tensor[] y, Tensor[] post, Tensor[] res, Tensor[] pre, Tensor?[] weight, "
        "float[] input_eps) -> (Tensor[], Tensor[])",
        lambda x, y, post, res, pre, weight, input_eps: (
            [torch.empty_like(x) for _ in y],
            [x.new_empty(x.shape[0], x.shape[2]) for _ in pre],
        ),
        run=run,
    )


def _grad_carrier(x: Tensor) -> Tensor:
    return x.new_zeros(()).expand(x.shape)


def _fake_reading(x: Tensor, phi: Tensor) -> tuple[Tensor, ...]:
    N, n, C = x.shape
    return (
        x.new_empty(N, C),
        phi.new_empty(N, n),
        phi.new_empty(N, n),
        phi.new_empty(N, n, n),
        phi.new_empty(N, phi.shape[0]),
        phi.new_empty(N),
        x.new_empty(()).expand(x.shape),
    )
