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
from manifold_hc.precision import WideModule, compute_dtype, wide_dtype

ALIGNMENT = 16
"""Row sizes that torch's grouped product takes are multiples of this, in bytes."""


@dataclass(frozen=True)
class ExpertsConfig:
    """Sizes of the mixtures of experts; E = `routed`, K = `active`."""

    routed: int = 0
    """Number of routed experts per mixture; 0 for a dense network."""
    active: int = 2
    """Number of routed experts per token."""
    shared: int = 1
    """Number of experts that process every token."""
    width: int = 64
    """Hidden size of one expert."""
    dense_blocks: int = 1
    """Number of leading blocks with a dense feed-forward layer."""
    balancing: float = 0.001
    """Step size of the load-balancing bias, updated by load without a gradient; 0 turns it off."""

    def __post_init__(self) -> None:
        """Raise ConfigError for invalid sizes."""
        require_at_least_one(self, "active", "width")
        require_number(self, "routed", "shared", "dense_blocks", "balancing")
        if 0 < self.routed < self.active:
            raise ConfigError(
                f"active: must be at most routed={self.routed} but is {self.active}; "
                "a token visits an expert once"
            )


class Router(WideModule):
    """Choose K experts for each token and compute their gates, in float32.

    Gates are sigmoids, normalised over the chosen experts. `bias` enters the choice but not the
    gates: loss-free balancing (arXiv 2408.15664).
    """

    bias: Tensor
    load: Tensor

    _unit = "each router"

    def __init__(self, channels: int, experts: int, active: int) -> None:
        """channels: hidden size C. experts: E. active: K."""
        super().__init__()
        self.active = active
        self.weight = nn.Parameter(torch.empty(experts, channels, dtype=wide_dtype()))
        self.register_buffer("bias", torch.empty(experts, dtype=wide_dtype()))
        self.register_buffer("load", torch.empty(experts, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight [E, C] uniformly within 1/sqrt(C) of 0; set bias and load to 0."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        self.weight.uniform_(-bound, bound)
        self.bias.zero_()
        self.load.zero_()

    def forward(self, tokens: Float[Tensor, "N C"]) -> tuple[Float[Tensor, "N K"], Tensor]:
        """Return gates and indices of the chosen experts, both [N, K]."""
        self._require_wide()
        with torch.autocast(tokens.device.type, enabled=False):
            scores = linear(tokens.to(self.weight.dtype), self.weight).sigmoid()
        # Top K by score plus bias; gates from the scores alone, so that the bias gets no gradient.
        chosen = (scores.detach() + self.bias).topk(self.active, -1).indices
        gates = scores.gather(-1, chosen)
        return gates / (gates.sum(-1, keepdim=True) + 1e-20), chosen

    @torch.no_grad()
    def balance(
        self, step: float, all_reduce: Callable[[Tensor], Tensor] = lambda load: load
    ) -> Int[Tensor, " E"]:
        """Move `bias` by `step` towards even load; return the load [E] since the last call.

        b_e += step * sign(mean load - load_e), once per optimizer step. all_reduce: sums the load
        over the ranks of a distributed run.
        """
        load = all_reduce(self.load.clone())
        self.bias += step * torch.sign(load.to(self.bias.dtype).mean() - load)
        self.load.zero_()
        return load


class RoutedExperts(nn.Module):
    """E gated feed-forward layers, each applied to its own rows."""

    def __init__(self, channels: int, config: ExpertsConfig) -> None:
        """Draw the stacked weights: gate_up [E, channels, 2 width], down [E, width, channels]."""
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
        """Transform rows [R, C] sorted by expert; `load` [E] counts the rows of each."""
        return grouped_feed_forward(rows, self.gate_up, self.down, load)


def grouped_feed_forward(
    rows: Float[Tensor, "R C"],
    gate_up: Float[Tensor, "E C H2"],
    down: Float[Tensor, "E H C"],
    load: Int[Tensor, " E"],
) -> Float[Tensor, "R C"]:
    """Apply the gated feed-forward layer of expert e to its `load[e]` rows, sorted by expert."""
    gate, up = grouped_product(rows, gate_up.to(rows.dtype), load).chunk(2, -1)
    return grouped_product(silu(gate) * up, down.to(rows.dtype), load)


class Experts(nn.Module):
    """Mixture of experts: K of E routed experts plus shared ones per token; drops no token."""

    def __init__(self, channels: int, config: ExpertsConfig) -> None:
        """channels: hidden size C. Raises ConfigError if no experts are routed."""
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
        """Redraw the weights of all experts and of the router; reset the balancing bias."""
        self.routed.reset_parameters()
        self.router.reset_parameters()
        if self.shared is not None:
            self.shared.reset_parameters()

    def forward(self, u: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """Sum the gated outputs of each token's experts: [..., C] -> [..., C]."""
        tokens = u.flatten(0, -2)
        gates, chosen = self.router(tokens)
        slots = chosen.flatten()
        load = torch.zeros_like(self.router.load).scatter_add_(0, slots, torch.ones_like(slots))
        outputs = self._run_chosen(tokens, chosen, load) * gates.unsqueeze(-1)
        out = outputs.unflatten(0, u.shape[:-1]).sum(-2).to(compute_dtype(u))
        if self.training and out.requires_grad:
            self._count_in_backward(out, load)
        return out if self.shared is None else out + self.shared(u)

    @torch.compiler.disable(reason="a graph cannot count in its backward pass")
    def _count_in_backward(self, out: Float[Tensor, "*batch C"], load: Int[Tensor, " E"]) -> None:
        """Count the load of this forward pass when the gradient of its output arrives.

        Activation checkpointing runs forward twice but backpropagates through one pass only. A
        second gradient through the same pass counts nothing: pipeline schedules may compute the
        gradients of inputs and of weights in two backward passes.
        """
        pending = [load]

        def count(grad: Tensor) -> None:
            if pending:
                self.router.load += pending.pop()

        out.register_hook(count)

    def _run_chosen(
        self, tokens: Float[Tensor, "N C"], chosen: Tensor, load: Int[Tensor, " E"]
    ) -> Float[Tensor, "N K C"]:
        """Outputs [N, K, C] of each token's chosen experts, in the order of `chosen`."""
        # Slot s is token s // K with its expert s % K; sorted by expert, each expert's rows adjoin.
        order = chosen.flatten().argsort(stable=True)
        rows = tokens.to(compute_dtype(tokens))[order // self.config.active]
        out = self.routed(rows, load)
        # The inverse permutation, back to slots.
        back = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        return out[back].unflatten(0, chosen.shape)


def grouped_product(
    rows: Float[Tensor, "R I"], weights: Float[Tensor, "E I O"], sizes: Int[Tensor, " E"]
) -> Float[Tensor, "R O"]:
    """Multiply consecutive groups of rows by one matrix each, in one call if torch supports it."""
    if _has_grouped_mm(rows, weights):
        ends = sizes.cumsum(0).to(torch.int32)
        product: Tensor = grouped_mm(rows, weights, offs=ends)
        return product
    groups = rows.split(sizes.tolist())
    return torch.cat([group @ matrix for group, matrix in zip(groups, weights, strict=True)])


def mixtures(model: nn.Module) -> dict[str, Experts]:
    """Return the mixtures of experts of a model by name, in depth order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def balance(
    model: nn.Module, all_reduce: Callable[[Tensor], Tensor] = lambda load: load
) -> list[Int[Tensor, " E"]]:
    """Update the balancing bias of every mixture; return the load per expert, in depth order.

    Call it once after every optimizer step. all_reduce: sums a load [E] over the ranks of a
    distributed run. The load counts token-expert pairs since the last call.
    """
    return [
        mixture.router.balance(mixture.config.balancing, all_reduce)
        for mixture in mixtures(model).values()
    ]


def _has_grouped_mm(rows: Tensor, weights: Tensor) -> bool:
    """True if torch's grouped product supports this device, dtype and alignment."""
    aligned = all(size * rows.element_size() % ALIGNMENT == 0 for size in weights.shape[-2:])
    if rows.device.type == "cpu":
        # torch.compile relies on the shape function, which supports bfloat16 only.
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
