"""`mhc bench transformers`: connections of its DeepSeek-V4, by its own code and by `accelerate`."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_hc.bench.correctness import TOLERANCE, Comparison, compare
from manifold_hc.bench.measure.timing import Timing, measure, thread_counts, timed
from manifold_hc.bench.output.sheet import TIMES, Sheet, quartiles, samples
from manifold_hc.bench.problem import Problem
from manifold_hc.bench.task import Task, leaf, quiet
from manifold_hc.extras import require
from manifold_hc.interop import accelerate

LEGEND = (
    "Forward and backward of all layers' attn_hc and ffn_hc, their writes, and hc_head; branches "
    "and norms return their input. times as fast: than transformers' own code."
)


@dataclass
class ModelRow(Timing):
    """All connections of the model by one implementation; seconds are those of the whole pass."""

    implementation: str
    error: float
    """Largest relative error against transformers' own code on float64 streams."""
    tolerance: float
    worst: str
    """Tensor with that error."""

    @property
    def ok(self) -> bool:
        """True if the results are right."""
        return self.error <= self.tolerance


@dataclass
class ModelResult:
    """Figures of one size and dtype."""

    problem: Problem
    layers: int
    rows: list[ModelRow]
    """transformers' own code, then ours; without times if one is wrong."""
    replaced: int
    """Number of modules that `accelerate` replaced."""

    @property
    def wrong(self) -> list[str]:
        """Implementations with wrong results."""
        return [row.implementation for row in self.rows if not row.ok]

    def add_ratios(self, content: dict[str, Any]) -> None:
        """Add medians and ratios to the JSON content of this result."""
        if self.wrong:
            return
        for row, entry in zip(self.rows, content["rows"], strict=True):
            entry["median_seconds"] = row.total
            entry["times_as_fast"] = self.rows[0].total / row.total

    def sheets(self) -> list[Sheet]:
        """Return the one sheet."""
        p = self.problem
        columns: dict[str, Callable[[ModelRow], str]] = {
            "implementation": lambda row: row.implementation,
            **TIMES,
            "quartiles": quartiles,
            "threads": lambda row: str(row.threads),
            "times as fast": lambda row: f"{self.rows[0].total / row.total:.1f}",
        }
        failures = [
            f"wrong: {row.implementation}: {row.worst} is off by {row.error:.1e}, "
            f"{row.tolerance:.1e} is allowed"
            for row in self.rows
            if not row.ok
        ]
        notes = [
            f"{self.replaced} modules replaced",
            *(f"{row.implementation}: largest error {row.error:.1e}" for row in self.rows),
        ]
        title = f"{p.dtype}, {self.layers} layers, {p.size}, {samples(self.rows)}"
        rows = [] if failures else [[cell(row) for cell in columns.values()] for row in self.rows]
        return [Sheet(title, list(columns), rows, notes, LEGEND, failures)]


def bench_accelerated(
    problem: Problem, layers: int, rounds: int, progress: Callable[[str], None]
) -> ModelResult:
    """Check and time the connections of a model of `layers` layers; both forms take turns.

    Raises MissingExtraError without transformers.
    """
    require("mhc bench transformers", "transformers")
    progress(f"{problem.dtype}: results")
    with quiet():
        plain = _network(problem, layers)
    ours = deepcopy(plain)
    handle = accelerate(ours)
    exact = _tensors(deepcopy(plain).double(), problem)
    turns, rows = [], []
    for name, network in (("transformers, eager", plain), ("accelerated", ours)):
        found = _compare(_tensors(network, problem), exact, problem, layers)
        rows.append(ModelRow(name, found.error, found.tolerance, found.worst))
        turns.append((rows[-1], timed(_task(network, problem))))
    result = ModelResult(problem, layers, rows, len(handle))
    if not result.wrong:
        progress(f"{problem.dtype}: {rounds} rounds of both")
        measure(turns, rounds, [thread_counts(problem.device)] * len(turns), warm_up=1)
    return result


class Branch(nn.Module):
    """Attention that returns its input, in the form that a layer takes it."""

    def forward(self, u: Tensor) -> tuple[Tensor, None]:
        """Return u and no attention weights."""
        return u, None


class FeedForward(nn.Module):
    """Feed-forward that returns its input."""

    def forward(self, u: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """Return u."""
        return u


class Network(nn.Module):
    """Layers and head of a DeepSeek-V4 model, from streams [B, T, n, C] to [B, T, C]."""

    def __init__(self, layers: nn.ModuleList, head: nn.Module) -> None:
        super().__init__()
        self.layers, self.hc_head = layers, head

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers and reduce the streams."""
        for layer in self.layers:
            x = layer(x)
        h: Tensor = self.hc_head(x)
        return h


def _network(problem: Problem, layers: int) -> Network:
    """Build layers of transformers whose branches cost nothing, with asymmetric random maps."""
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
        DeepseekV4DecoderLayer,
        DeepseekV4HyperHead,
    )

    config = DeepseekV4Config(
        hc_mult=problem.streams,
        hidden_size=problem.channels,
        num_hidden_layers=layers,
        # The branches are replaced: the smallest sizes that build.
        num_attention_heads=1,
        head_dim=8,
        q_lora_rank=8,
        o_groups=1,
        o_lora_rank=8,
        n_routed_experts=1,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        mlp_layer_types=["moe"] * layers,
        layer_types=["sliding_attention"] * layers,
    )
    built = nn.ModuleList(DeepseekV4DecoderLayer(config, index) for index in range(layers))
    for layer in built:
        layer.self_attn, layer.mlp = Branch(), FeedForward()
        layer.input_layernorm, layer.post_attention_layernorm = nn.Identity(), nn.Identity()
    network = Network(built, DeepseekV4HyperHead(config))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        # Logits with a standard deviation near 1, as in `Problem.inputs`.
        std = 1.0 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
        parameter.data = std * torch.randn(parameter.shape, generator=generator)
    return network.to(problem.device)


def _task(network: Network, problem: Problem) -> Task:
    """Return a pass over random streams in the network's dtype, or the problem's if narrower."""
    inputs = problem.inputs()
    x, cotangent = inputs.x, inputs.grad_u
    if network.hc_head.hc_fn.dtype == torch.float64:
        x, cotangent = x.double(), cotangent.double()
    x = leaf(x)
    return Task(lambda: (network(x),), (x, *network.parameters()), (cotangent,))


def _tensors(network: Network, problem: Problem) -> dict[str, Tensor]:
    """Output and gradients by name; those of all scales and bases as one vector each.

    A gate's gradient sums over all tokens and can cancel to nearly zero, so that its error is
    relative to the largest entry of all of them.
    """
    output, grad_x, *gradients = _task(network, problem).tensors()
    found = {"h": output, "x.grad": grad_x}
    joined: dict[str, list[Tensor]] = {"scale": [], "base": []}
    for (name, _), gradient in zip(network.named_parameters(), gradients, strict=True):
        last = name.rpartition(".")[2].removeprefix("hc_")
        if last in joined:
            joined[last].append(gradient)
        else:
            found[f"{name}.grad"] = gradient
    return found | {f"{name} gradients": torch.cat(own) for name, own in joined.items()}


def _compare(
    found: dict[str, Tensor], exact: dict[str, Tensor], problem: Problem, layers: int
) -> Comparison:
    """Compare all tensors; errors add up over the sublayers and the head."""
    tolerance = (2 * layers + 1) * TOLERANCE[problem.torch_dtype]
    return compare(
        list(found.values()), list(exact.values()), list(exact), lambda tensor: tolerance
    )
