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
            group=processes.pp_group,
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
    """Tells the watchdog what it does, and has room for streams only while they are needed.

    torch would keep room for those of all microbatches, and their gradients, as long as the run.
    """

    processes: Processes

    def _prepare_forward_infra(self, *rest: Any, **named: Any) -> Any:
        made = super()._prepare_forward_infra(*rest, **named)
        for received in self.args_recv_info.values():
            _release(received)
        return made

    def _prepare_backward_infra(self, *rest: Any, **named: Any) -> Any:
        made = super()._prepare_backward_infra(*rest, **named)
        for received in self.grad_recv_info.values():
            _release(received)
        return made

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        _make_room(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        _make_room(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *rest: Any, **named: Any) -> Any:
        self._begins(fwd_chunk_id, "forward")
        made = super().forward_one_chunk(fwd_chunk_id, *rest, **named)
        _release(self.args_recv_info[fwd_chunk_id])
        self.processes.waits()
        return made

    def backward_one_chunk(self, bwd_chunk_id: int, *rest: Any, **named: Any) -> Any:
        self._begins(bwd_chunk_id, "backward")
        made = super().backward_one_chunk(bwd_chunk_id, *rest, **named)
        _release(self.grad_recv_info[bwd_chunk_id])
        self.processes.waits()
        return made

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *rest: Any, **named: Any) -> Any:
        self._begins(bwd_chunk_id, "backward of weights")
        super().backward_weight_one_chunk(bwd_chunk_id, *rest, **named)
        self.processes.waits()

    def _begins(self, microbatch: int, what: str) -> None:
        self.processes.at(f"stage {self.stage_index}, microbatch {microbatch}, {what}")


def _make_room(received: Sequence[Any], device: torch.device) -> None:
    for info in received:
        if not info.is_root_arg and info.tensor_meta is not None:
            meta = info.tensor_meta
            info.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=device)


def _release(received: Sequence[Any]) -> None:
    for info in received:
        info.buffer = None
