"""Pipeline schedules: those of torch.distributed.pipelining, with progress reports."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from manifold_hc.errors import ConfigError
from manifold_hc.parallel.processes import Processes


def build_schedule(
    stages: Mapping[int, nn.Module],
    boundaries: Sequence[Tensor | tuple[Tensor, ...]],
    processes: Processes,
    microbatches: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """Return torch's schedule over this rank's stages, given by number.

    boundaries: meta tensors of a microbatch; stage i maps boundaries[i] to boundaries[i + 1].
    loss: a microbatch's summand of the loss.
    """
    watched = [
        _WatchedStage(
            stage,
            number,
            len(boundaries) - 1,
            next(stage.parameters()).device,
            input_args=boundaries[number],
            output_args=boundaries[number + 1],
            group=processes.pp_group,
        )
        for number, stage in stages.items()
    ]
    for stage in watched:
        stage.processes = processes
    kind: Any = get_schedule_class(processes.config.schedule)
    given = watched[0] if issubclass(kind, PipelineScheduleSingle) else watched
    # The loss of a microbatch is divided by the targets of the whole batch: torch must not divide
    # the gradients by the number of microbatches as well.
    return kind(given, microbatches, loss_fn=loss, scale_grads=False)


def require_schedule(name: str) -> None:
    """Raise ConfigError if the installed torch does not know the schedule."""
    try:
        get_schedule_class(name)
    except ValueError:
        raise ConfigError(
            f"parallel.schedule: torch {torch.__version__} does not know {name}; "
            "take another one, or another torch"
        ) from None


class _WatchedStage(PipelineStage):
    """Pipeline stage that reports progress, and frees receive buffers after use.

    torch allocates receive buffers for the streams and gradients of all microbatches once, and
    keeps them until the end of the run.
    """

    processes: Processes

    def _prepare_forward_infra(self, *rest: Any, **named: Any) -> Any:
        prepared = super()._prepare_forward_infra(*rest, **named)
        for received in self.args_recv_info.values():
            _free(received)
        return prepared

    def _prepare_backward_infra(self, *rest: Any, **named: Any) -> Any:
        prepared = super()._prepare_backward_infra(*rest, **named)
        for received in self.grad_recv_info.values():
            _free(received)
        return prepared

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        _allocate(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        _allocate(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *rest: Any, **named: Any) -> Any:
        with self.processes.phase(self._operation(fwd_chunk_id, "forward")):
            out = super().forward_one_chunk(fwd_chunk_id, *rest, **named)
            _free(self.args_recv_info[fwd_chunk_id])
        # Between two operations the schedule waits for a neighbour. Stages are never equally far,
        # so the watchdog must not take a waiting rank for the one that hangs.
        self.processes.mark_waiting()
        return out

    def backward_one_chunk(self, bwd_chunk_id: int, *rest: Any, **named: Any) -> Any:
        with self.processes.phase(self._operation(bwd_chunk_id, "backward")):
            out = super().backward_one_chunk(bwd_chunk_id, *rest, **named)
            _free(self.grad_recv_info[bwd_chunk_id])
        self.processes.mark_waiting()
        return out

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *rest: Any, **named: Any) -> Any:
        with self.processes.phase(self._operation(bwd_chunk_id, "backward of weights")):
            super().backward_weight_one_chunk(bwd_chunk_id, *rest, **named)
        self.processes.mark_waiting()

    def _operation(self, microbatch: int, name: str) -> str:
        return f"stage {self.stage_index}, microbatch {microbatch}, {name}"


def _allocate(received: Sequence[Any], device: torch.device) -> None:
    """Allocate the buffers of a microbatch just before its receives are posted."""
    for info in received:
        if not info.is_root_arg and info.tensor_meta is not None:
            meta = info.tensor_meta
            info.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=device)


def _free(received: Sequence[Any]) -> None:
    for info in received:
        info.buffer = None
