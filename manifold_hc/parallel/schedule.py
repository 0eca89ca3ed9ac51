"""The order in which microbatches go through stages: torch.distributed.pipelining's schedules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from manifold_hc.errors import ConfigError
from manifold_hc.parallel.processes import Processes


def planned(
    stages: Mapping[int, nn.Module],
    sizes: Sequence[Tensor | tuple[Tensor, ...]],
    processes: Processes,
    microbatches: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """torch's schedule over the stages of this process, given by their number.

    sizes: what goes into every stage of the pipeline, and out of the last one, on the meta device.
    loss: its microbatches' shares are summed, and so are gradients.
    """
    watched = [
        _Watched(
            stage,
            number,
            len(sizes) - 1,
            next(stage.parameters()).device,
            input_args=sizes[number],
            output_args=sizes[number + 1],
            group=processes.line,
        )
        for number, stage in stages.items()
    ]
    for stage in watched:
        stage.processes = processes
    kind: Any = get_schedule_class(processes.config.schedule)
    given = watched[0] if issubclass(kind, PipelineScheduleSingle) else watched
    return kind(given, microbatches, loss_fn=loss, scale_grads=False)


def require_schedule(name: str) -> None:
    """Raise ConfigError where the installed torch does not know the schedule."""
    try:
        get_schedule_class(name)
    except ValueError:
        raise ConfigError(
            f"parallel.schedule: torch {torch.__version__} does not know {name}; "
            "take another one, or another torch"
        ) from None


class _Watched(PipelineStage):
    """Tells the watchdog what it does, and when it is other stages' turn."""

    processes: Processes

    def forward_one_chunk(self, fwd_chunk_id: int, *rest: Any, **named: Any) -> Any:
        return self._told("forward", super().forward_one_chunk, fwd_chunk_id, *rest, **named)

    def backward_one_chunk(self, bwd_chunk_id: int, *rest: Any, **named: Any) -> Any:
        return self._told("backward", super().backward_one_chunk, bwd_chunk_id, *rest, **named)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *rest: Any, **named: Any) -> Any:
        run = super().backward_weight_one_chunk
        return self._told("backward of weights", run, bwd_chunk_id, *rest, **named)

    def _told(
        self, what: str, run: Callable[..., Any], microbatch: int, *rest: Any, **named: Any
    ) -> Any:
        self.processes.at(f"stage {self.stage_index}, microbatch {microbatch}, {what}")
        done = run(microbatch, *rest, **named)
        self.processes.waits()
        return done
