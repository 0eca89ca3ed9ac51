"""Mixture of experts without drops (DeepSeekMoE, arXiv 2401.06066; routing of arXiv 2412.19437)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear, silu

from manifold_hc.errors import (
    ConfigError,
    require_at_least_one,
    require_integer,
    require_number,
)
from manifold_hc.models.feed_forward import GatedFeedForward
from manifold_hc.models.linear import here
from manifold_hc.precision import WideModule, compute_dtype, wide_dtype

ALIGNMENT = 16
"""Bytes that torch's grouped product wants every row to be a multiple of."""


@dataclass(frozen=True)
class ExpertsConfig:
    """Sizes of the mixtures of experts; E = `routed`, K = `active`."""

    routed: int = 0
    """Routed experts of a mixture; 0 for a dense network."""
    active: int = 2
    """Routed experts that each token visits."""
    shared: int = 1
    """Experts that every token visits."""
    width: int = 64
    """Hidden size of one expert."""
    dense_blocks: int = 1
    """Leading blocks whose feed-forward is dense."""
    balancing: float = 0.001
    """Step of the balancing bias, moved by load and not by the loss; 0 leaves it at 0."""

    def __post_init__(self) -> None:
        """Raise ConfigError for sizes that cannot be built."""
        require_at_least_one(self, "active", "width")
        require_number(self, "routed", "shared", "dense_blocks", "balancing")
        if 0 < self.routed < self.active:
            raise ConfigError(
                f"active: must be at most routed={self.routed} but is {self.active}; "
                "a token visits an expert once"
            )


class Router(WideModule):
    """Which experts a token visits, and how much it takes of each; all in float32.

    Gates are sigmoids, normalised over the chosen experts. The choice adds `bias`, the gates do
    not: loss-free balancing (arXiv 2408.15664).
    """

    bias: Tensor
    load: Tensor

    _unit = "each router"

    def __init__(self, channels: int, experts: int, active: int) -> None:
        """channels: C; experts: E; active: K."""
        super().__init__()
        self.active = active
        self.weight = nn.Parameter(torch.empty(experts, channels, dtype=wide_dtype()))
        self.register_buffer("bias", torch.empty(experts, dtype=wide_dtype()))
        self.register_buffer("load", torch.empty(experts, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight [E, C] uniformly within 1/sqrt(C) of 0; bias and load become 0."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        self.weight.uniform_(-bound, bound)
        self.bias.zero_()
        self.load.zero_()

    def forward(self, tokens: Float[Tensor, "N C"]) -> tuple[Float[Tensor, "N K"], Tensor]:
        """Gates and indices [N, K] of the chosen experts."""
        self._require_wide()
        with torch.autocast(tokens.device.type, enabled=False):
            scores = linear(tokens.to(self.weight.dtype), self.weight).sigmoid()
        chosen = (scores.detach() + self.bias).topk(self.active, -1).indices
        gates = scores.gather(-1, chosen)
        return gates / (gates.sum(-1, keepdim=True) + 1e-20), chosen

    @torch.no_grad()
    def balance(
        self, step: float, total: Callable[[Tensor], Tensor] = lambda load: load
    ) -> Int[Tensor, " E"]:
        """Move `bias` by `step` towards even load; returns the load since the last call.

        b_e += step * sign(mean load - load_e), once for every optimizer step.
        """
        load = total(self.load.clone())
        self.bias += step * torch.sign(load.to(self.bias.dtype).mean() - load)
        self.load.zero_()
        return load


class RoutedExperts(nn.Module):
    """E gated feed-forward layers, each for its own rows."""

    def __init__(self, channels: int, config: ExpertsConfig) -> None:
        """channels: C; weights are stacked: gate_up [E, C, 2 width], down [E, width, C]."""
        super().__init__()
        E, width = config.routed, config.width
        self.gate_up = nn.Parameter(torch.empty(E, channels, 2 * width))
        self.down = nn.Parameter(torch.empty(E, width, channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every weight W [E, in, out] uniformly within 1/sqrt(in) of 0."""
        for weight in (self.gate_up, self.down):
            bound = 1 / math.sqrt(weight.shape[-2])
            weight.uniform_(-bound, bound)

    def forward(self, rows: Float[Tensor, "R C"], load: Int[Tensor, " E"]) -> Float[Tensor, "R C"]:
        """Rows in the order of experts, `load` of them for each."""
        gate, up = grouped_product(rows, here(self.gate_up).to(rows.dtype), load).chunk(2, -1)
        return grouped_product(silu(gate) * up, here(self.down).to(rows.dtype), load)


class Experts(nn.Module):
    """K of E routed experts, and shared ones, for every token; no token is ever dropped."""

    def __init__(self, channels: int, config: ExpertsConfig) -> None:
        """channels: C. Raises ConfigError for a configuration without routed experts."""
        super().__init__()
        require_integer("Experts", "channels", channels, 1)
        if not config.routed:
            raise ConfigError(
                "Experts: routed must be at least 1 but is 0, which stands for a dense network; "
                "use GatedFeedForward"
            )
        self.config = config
        self.routed = RoutedExperts(channels, config)
        self.router = Router(channels, config.routed, config.active)
        shared = config.shared * config.width
        self.shared = GatedFeedForward(channels, shared) if shared else None

    def reset_parameters(self) -> None:
        """Draw the weights of all experts and of the router anew; balancing begins anew."""
        self.routed.reset_parameters()
        self.router.reset_parameters()
        if self.shared is not None:
            self.shared.reset_parameters()

    def forward(self, u: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """[..., C] -> [..., C]."""
        tokens = u.flatten(0, -2)
        gates, chosen = self.router(tokens)
        slots = chosen.flatten()
        load = torch.zeros_like(self.router.load).scatter_add_(0, slots, torch.ones_like(slots))
        visits = self._visit(tokens, chosen, load) * gates.unsqueeze(-1)
        out = visits.unflatten(0, u.shape[:-1]).sum(-2).to(compute_dtype(u))
        if self.training and out.requires_grad:
            self._count_in_backward(out, load)
        return out if self.shared is None else out + self.shared(u)

    @torch.compiler.disable(reason="a graph cannot count in its backward pass")
    def _count_in_backward(self, out: Float[Tensor, "*batch C"], load: Int[Tensor, " E"]) -> None:
        """Add the load of this pass when the gradient of its output arrives.

        A checkpoint, reentrant or not, runs forward twice but backpropagates through one of the two
        passes only. A second gradient through the same pass adds nothing: schedules of pipelines
        compute those of inputs and of weights apart.
        """
        uncounted = [load]

        def count(grad: Tensor) -> None:
            if uncounted:
                self.router.load += uncounted.pop()

        out.register_hook(count)

    def _visit(
        self, tokens: Float[Tensor, "N C"], chosen: Tensor, load: Int[Tensor, " E"]
    ) -> Float[Tensor, "N K C"]:
        """What each chosen expert makes of its tokens, in the order of `chosen`."""
        order = chosen.flatten().argsort(stable=True)
        rows = tokens.to(compute_dtype(tokens))[order // self.config.active]
        out = self.routed(rows, load)
        back = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        return out[back].unflatten(0, chosen.shape)


def grouped_product(
    rows: Float[Tensor, "R I"], weights: Float[Tensor, "E I O"], sizes: Int[Tensor, " E"]
) -> Float[Tensor, "R O"]:
    """Rows in consecutive groups, each times its own matrix: one call where torch has it."""
    if _torch_can(rows, weights):
        ends = sizes.cumsum(0).to(torch.int32)
        product: Tensor = grouped_mm(rows, weights, offs=ends)
        return product
    groups = rows.split(sizes.tolist())
    return torch.cat([group @ matrix for group, matrix in zip(groups, weights, strict=True)])


def mixtures(model: nn.Module) -> dict[str, Experts]:
    """The mixtures of experts of a model by name, in depth order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def balance(
    model: nn.Module, total: Callable[[Tensor], Tensor] = lambda load: load
) -> list[Int[Tensor, " E"]]:
    """Balance every mixture of `model`; returns tokens by expert since the last call, by depth.

    To be called once after every optimizer step. total: makes of the load that this process has
    seen that of all.
    """
    found = mixtures(model).values()
    return [each.router.balance(each.config.balancing, total) for each in found]


def _torch_can(rows: Tensor, weights: Tensor) -> bool:
    """Whether torch's grouped product serves these: by device, dtype and alignment."""
    aligned = all(size * rows.element_size() % ALIGNMENT == 0 for size in weights.shape[-2:])
    if rows.device.type == "cpu":
        # torch.compile believes torch's shape function, which takes bfloat16 alone.
        compiling = torch.compiler.is_compiling()
        known = rows.dtype == torch.bfloat16 or (
            rows.dtype in (torch.float32, torch.float16) and not compiling
        )
    else:
        known = (
            rows.is_cuda
            and rows.dtype == torch.bfloat16
            and torch.cuda.get_device_capability(rows.device) >= (8, 0)
        )
    return known and aligned and len(rows) > 0
