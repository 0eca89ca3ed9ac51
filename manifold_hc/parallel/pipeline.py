"""Pipeline parallelism: consecutive blocks of a decoder as stages, batches as microbatches.

A stage sends the streams [B, T, n, C] of a microbatch to the next one after the last write, and
receives their gradient in backward; with single_pass the last `pre` [B, T, n] goes along. Recompute
blocks end with their stage.
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

Figure = TypeVar("Figure")

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits [B, T, V] and targets [B, T] of a microbatch -> its summand of the loss."""


class Stage(nn.Module):
    """Consecutive blocks of a decoder."""

    def __init__(self, decoder: Decoder, precision: torch.dtype) -> None:
        """decoder: a `Decoder.part`. precision: dtype of products and streams in training."""
        super().__init__()
        self.decoder = decoder
        self.precision = precision

    def forward(
        self, *received: Tensor, documents: Int[Tensor, "B T"] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens, or outputs of the previous stage -> logits, or inputs of the next stage."""
        source, *pre = received
        autocast: AbstractContextManager[object] = nullcontext()
        # In training a schedule calls forward and backward, and backward must run outside of
        # autocast. Without gradients the caller's autocast applies.
        if torch.is_grad_enabled():
            enabled = self.precision != torch.float32
            autocast = torch.autocast(source.device.type, dtype=torch.bfloat16, enabled=enabled)
        with autocast:
            sent: Tensor | tuple[Tensor, Tensor] = self.decoder(source, documents, *pre)
        return sent


class Pipeline(nn.Module):
    """Stages of a decoder on one rank, with the parameter names of the whole decoder."""

    def __init__(self, stages: dict[int, Stage], processes: Processes, microbatches: int) -> None:
        """stages: by number, in depth order. microbatches: per call of `backward`."""
        super().__init__()
        for stage in stages.values():
            _merge_modules(self, stage.decoder)
        # A plain dict: as submodules the stages would register every parameter a second time.
        self.stages = stages
        decoder = next(iter(stages.values())).decoder
        self.config, self.connection = decoder.config, decoder.stack.config
        self.processes = processes
        self.microbatches = microbatches
        self.running = next(iter(stages))
        """Number of the stage that `forward` runs."""
        self._last = processes.config.num_stages - 1
        self._schedule: Any = None
        self._loss: Loss | None = None

    def forward(
        self, tokens: Int[Tensor, "B T"], documents: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T V"] | None:
        """Return the logits on the rank with the last stage, None on the others; for evaluation.

        All ranks of the pipeline must call it.
        """
        sent: tuple[Tensor, ...] = (tokens,)
        # In depth order on every rank: each receive waits for a stage that runs before it, so
        # blocking sends and receives cannot deadlock, also where a rank holds several stages.
        for number, stage in self.stages.items():
            if number and number - 1 not in self.stages:
                sent = self._empty_inputs(
                    tokens, compute_dtype(torch.empty((), device=tokens.device))
                )
                with self.processes.waiting():
                    for tensor in sent:
                        source = self._pp_rank_of(number - 1)
                        dist.recv(tensor, group=self.processes.pp_group, group_src=source)
            self.running = number
            out = stage(*sent, documents=documents)
            sent = out if isinstance(out, tuple) else (out,)
            if number < self._last and number + 1 not in self.stages:
                with self.processes.waiting():
                    for tensor in sent:
                        target = self._pp_rank_of(number + 1)
                        dist.send(
                            tensor.contiguous(), group=self.processes.pp_group, group_dst=target
                        )
        return sent[0] if self._last in self.stages else None

    def backward(
        self, tokens: Tensor, targets: Tensor, documents: Tensor | None, loss: Loss
    ) -> Tensor:
        """Run one batch forward and backward in microbatches; gradients are summed.

        Returns the sum of `loss` over microbatches on the rank with the last stage, 0 on the
        others.
        """
        self._loss = loss
        if self._schedule is None:
            self._schedule = self._build_schedule(tokens[: len(tokens) // self.microbatches])
        keywords = {} if documents is None else {"documents": documents}
        losses: list[Tensor] = []
        try:
            with quiet("torch.distributed.pipelining.schedules"):  # it logs its whole plan
                self._schedule.step(
                    tokens, target=targets, losses=losses, return_outputs=False, **keywords
                )
        except RuntimeError as error:
            # torch wraps every error of a stage in a RuntimeError.
            raise error.__cause__ or error from None
        self.processes.mark_busy()
        self._loss = None
        return sum((loss.detach() for loss in losses), torch.zeros((), device=tokens.device))

    def in_depth_order(self, local: list[tuple[int, Figure]]) -> list[Figure]:
        """Gather (sublayer, figure) pairs of all stages; return the figures by sublayer."""
        pairs = [pair for figures in self.processes.all_gather_pp(local) for pair in figures]
        return [figure for _, figure in sorted(pairs, key=lambda pair: pair[0])]

    def _build_schedule(self, tokens: Int[Tensor, "B T"]) -> Any:
        """Build the schedule for microbatches of this shape."""
        from manifold_hc.parallel.schedule import build_schedule  # torch.export: most of a second

        precision = next(iter(self.stages.values())).precision
        streams = tuple(
            t.requires_grad_() for t in self._empty_inputs(tokens.to("meta"), precision)
        )
        logits = torch.empty(*tokens.shape, self.config.vocabulary, device="meta")
        between: list[Tensor | tuple[Tensor, ...]] = [streams] * self._last
        boundaries = [tokens.to("meta"), *between, logits.requires_grad_()]
        return build_schedule(
            self.stages, boundaries, self.processes, self.microbatches, self._microbatch_loss
        )

    def _microbatch_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        assert self._loss is not None
        return self._loss(logits, targets)

    def _empty_inputs(self, tokens: Int[Tensor, "B T"], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Allocate the inputs of an inner stage: streams in `dtype`, with single_pass `pre` too."""
        shape, device = (*tokens.shape, self.connection.n), tokens.device
        x = torch.empty(*shape, self.config.channels, dtype=dtype, device=device)
        return (x, torch.empty(shape, device=device)) if self.connection.is_single_pass else (x,)

    def _pp_rank_of(self, stage: int) -> int:
        """Pipeline rank that holds a stage."""
        config = self.processes.config
        return next(p for p in range(config.pipeline) if stage in config.stages_of(p))


def split_into_stages(
    decoder: Decoder, processes: Processes, precision: torch.dtype
) -> dict[int, Stage]:
    """Return this rank's stages of a decoder by number; `RunConfig` has checked that they divide.

    Raises ConfigError if the installed torch does not know the schedule.
    """
    from manifold_hc.parallel.schedule import require_schedule

    config, sublayers = processes.config, decoder.config.sublayers
    require_schedule(config.schedule)
    length = sublayers // config.num_stages
    return {
        number: Stage(decoder.part(range(number * length, (number + 1) * length)), precision)
        for number in config.stages_of(processes.pp_rank)
    }


def in_depth_order(model: nn.Module, local: list[tuple[int, Figure]]) -> list[Figure]:
    """Return the figures of all sublayers in depth order, from this rank's (sublayer, figure)s.

    With a pipeline it is a collective of the pipeline's ranks.
    """
    if isinstance(model, Pipeline):
        return model.in_depth_order(local)
    return [figure for _, figure in local]


def _merge_modules(parent: nn.Module, child: nn.Module) -> None:
    """Register the submodules of `child` under their names; containers are created anew."""
    for name, module in child.named_children():
        if not isinstance(module, (nn.ModuleList, Stack)):
            parent.add_module(name, module)
            continue
        if not hasattr(parent, name):
            parent.add_module(name, nn.Module())
        _merge_modules(parent.get_submodule(name), module)
