"""Pipeline parallelism: blocks in stages, and microbatches through them.

What travels between two stages are the streams of a microbatch, [B, T, n, C], written, and back
their gradient; with single_pass the last pre, [B, T, n], too. A block of recompute ends with its
stage.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from manifold_hc.logs import quiet
from manifold_hc.models import Decoder
from manifold_hc.parallel.processes import Processes
from manifold_hc.precision import compute_dtype
from manifold_hc.stack import Stack

Found = TypeVar("Found")

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits [B, T, V] and targets [B, T] of a microbatch -> its share of the loss."""


class Stage(nn.Module):
    """Some consecutive blocks of a decoder, run on their own."""

    def __init__(self, decoder: Decoder, precision: torch.dtype) -> None:
        """decoder: a part of one. precision: of products and streams in training."""
        super().__init__()
        self.decoder = decoder
        self.precision = precision

    def forward(
        self, *received: Tensor, documents: Int[Tensor, "B T"] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens, or what the stage before has returned -> logits, or what the next one takes."""
        source, *pre = received
        narrow: AbstractContextManager[object] = nullcontext()
        if torch.is_grad_enabled():  # by a schedule, whose backward must not run under autocast
            enabled = self.precision != torch.float32
            narrow = torch.autocast(source.device.type, dtype=torch.bfloat16, enabled=enabled)
        with narrow:
            sent: Tensor | tuple[Tensor, Tensor] = self.decoder(source, documents, *pre)
        return sent


class Pipeline(nn.Module):
    """The stages of a decoder that this process has, its layers named as in the whole."""

    def __init__(self, stages: dict[int, Stage], processes: Processes, microbatches: int) -> None:
        """stages: by their number, in depth order. microbatches: that a batch is cut into."""
        super().__init__()
        for stage in stages.values():
            _adopt(self, stage.decoder)
        self.stages = stages  # no submodules: their layers are this module's own
        decoder = next(iter(stages.values())).decoder
        self.config, self.connection = decoder.config, decoder.stack.config
        self.processes = processes
        self.microbatches = microbatches
        self.running = next(iter(stages))
        """The stage that `forward` is in."""
        self._last = processes.config.all_stages - 1
        self._schedule: Any = None
        self._loss: Loss | None = None

    def forward(
        self, tokens: Int[Tensor, "B T"], documents: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T V"] | None:
        """Logits in the process that has the last stage, None in the others; not for training.

        All processes of a pipeline must call it.
        """
        sent: tuple[Tensor, ...] = (tokens,)
        for number, stage in self.stages.items():
            if number and number - 1 not in self.stages:
                sent = self._like(tokens, compute_dtype(torch.empty((), device=tokens.device)))
                with self.processes.waiting():
                    for tensor in sent:
                        there = self._owner(number - 1)
                        dist.recv(tensor, group=self.processes.pp_group, group_src=there)
            self.running = number
            out = stage(*sent, documents=documents)
            sent = out if isinstance(out, tuple) else (out,)
            if number < self._last and number + 1 not in self.stages:
                with self.processes.waiting():
                    for tensor in sent:
                        there = self._owner(number + 1)
                        dist.send(
                            tensor.contiguous(), group=self.processes.pp_group, group_dst=there
                        )
        return sent[0] if self._last in self.stages else None

    def backward(
        self, tokens: Tensor, targets: Tensor, documents: Tensor | None, loss: Loss
    ) -> Tensor:
        """One batch forward and backward in microbatches, by the schedule; gradients are summed.

        Returns the sum of `loss` over microbatches in the process that has the last stage, and 0 in
        the others.
        """
        self._loss = loss
        if self._schedule is None:
            self._schedule = self._planned(tokens[: len(tokens) // self.microbatches])
        others = {} if documents is None else {"documents": documents}
        losses: list[Tensor] = []
        try:
            with quiet("torch.distributed.pipelining.schedules"):  # which prints its whole plan
                self._schedule.step(
                    tokens, target=targets, losses=losses, return_outputs=False, **others
                )
        except RuntimeError as error:
            # torch wraps what fails in a stage, whatever it is.
            raise error.__cause__ or error from None
        self.processes.goes_on()
        self._loss = None
        return sum((part.detach() for part in losses), torch.zeros((), device=tokens.device))

    def in_depth_order(self, found: list[tuple[int, Found]]) -> list[Found]:
        """What all processes of the pipeline have found, each in its own sublayers, by sublayer."""
        everywhere = [one for part in self.processes.all_gather_pp(found) for one in part]
        return [what for _, what in sorted(everywhere, key=lambda one: one[0])]

    def _planned(self, tokens: Int[Tensor, "B T"]) -> Any:
        """The schedule for microbatches of this size."""
        from manifold_hc.parallel.schedule import planned  # imports torch.export, most of a second

        precision = next(iter(self.stages.values())).precision
        streams = tuple(t.requires_grad_() for t in self._like(tokens.to("meta"), precision))
        logits = torch.empty(*tokens.shape, self.config.vocabulary, device="meta")
        between: list[Tensor | tuple[Tensor, ...]] = [streams] * self._last
        sizes = [tokens.to("meta"), *between, logits.requires_grad_()]
        return planned(self.stages, sizes, self.processes, self.microbatches, self._share)

    def _share(self, logits: Tensor, targets: Tensor) -> Tensor:
        assert self._loss is not None
        return self._loss(logits, targets)

    def _like(self, tokens: Int[Tensor, "B T"], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Room for what a stage sends on for these tokens, with streams in this dtype."""
        shape, device = (*tokens.shape, self.connection.n), tokens.device
        x = torch.empty(*shape, self.config.channels, dtype=dtype, device=device)
        return (x, torch.empty(shape, device=device)) if self.connection.single_pass else (x,)

    def _owner(self, stage: int) -> int:
        """Position in the pipeline of the process that has it."""
        config = self.processes.config
        return next(p for p in range(config.pipeline) if stage in config.stages_of(p))


def cut(decoder: Decoder, processes: Processes, precision: torch.dtype) -> dict[int, Stage]:
    """The stages of this process by their number, from a whole decoder whose blocks divide.

    Raises ConfigError where torch does not know the schedule.
    """
    from manifold_hc.parallel.schedule import require_schedule

    config, sublayers = processes.config, decoder.config.sublayers
    require_schedule(config.schedule)
    length = sublayers // config.all_stages
    return {
        number: Stage(decoder.part(range(number * length, (number + 1) * length)), precision)
        for number in config.stages_of(processes.pp_rank)
    }


def in_depth_order(model: nn.Module, found: list[tuple[int, Found]]) -> list[Found]:
    """What was found in each sublayer: of all stages, sorted; without a pipeline as it is."""
    if isinstance(model, Pipeline):
        return model.in_depth_order(found)
    return [what for _, what in found]


def _adopt(parent: nn.Module, child: nn.Module) -> None:
    """Take over all modules inside, under their names; containers are made anew."""
    for name, module in child.named_children():
        if not isinstance(module, (nn.ModuleList, Stack)):
            parent.add_module(name, module)
            continue
        if not hasattr(parent, name):
            parent.add_module(name, nn.Module())
        _adopt(parent.get_submodule(name), module)
