"""Ranks of a run and their collectives; a run of one process needs no communication."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from signal import Signals
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from manifold_hc.parallel.config import ParallelConfig
from manifold_hc.parallel.watchdog import Watchdog

Result = TypeVar("Result")


class Processes:
    """Ranks of one process, and the collectives of its run.

    All ranks must call the collective methods, in the same order.
    """

    def __init__(
        self,
        config: ParallelConfig | None = None,
        mesh: DeviceMesh | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """mesh: one-dimensional, over all ranks; None for a run of one process."""
        self.config = config or ParallelConfig()
        self.mesh = mesh
        self._watchdog = watchdog
        self._phases: list[str] = []
        self.background_group = None if mesh is None else dist.new_group(backend="gloo")
        """All ranks once more, for collectives of a thread besides the main thread."""
        self.pp_group: dist.ProcessGroup | None = None
        """Ranks that hold other layers for the same tokens, in pipeline order."""
        self._data_group: dist.ProcessGroup | None = None
        """Ranks that hold the same layers for other tokens; None if these are all ranks."""
        if mesh is not None and self.config.pipeline > 1:
            sizes = (self.config.pipeline, self.config.stage_ranks)
            grid = mesh._unflatten(0, sizes, ("pipeline", "data"))
            self.pp_group, self._data_group = grid.get_group("pipeline"), grid.get_group("data")

    @property
    def is_rank0(self) -> bool:
        """True in the process that writes files and prints."""
        return self.rank == 0

    @property
    def rank(self) -> int:
        """Global rank."""
        return 0 if self.mesh is None else dist.get_rank()

    @property
    def size(self) -> int:
        """Number of processes (world size)."""
        return 1 if self.mesh is None else dist.get_world_size()

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank: selects this process's slice of every batch."""
        return self.rank % self.config.stage_ranks // self.config.tensor

    @property
    def dp_size(self) -> int:
        """Data-parallel size: number of slices of a batch that are computed at once."""
        return self.config.dp_size

    @property
    def tp_rank(self) -> int:
        """Tensor-parallel rank: selects this process's tokens of every sequence."""
        return self.rank % self.config.tensor

    @property
    def tp_size(self) -> int:
        """Tensor-parallel size: number of slices of every sequence."""
        return self.config.tensor

    @property
    def pp_rank(self) -> int:
        """Pipeline rank: selects this process's stages."""
        return self.rank // self.config.stage_ranks

    @property
    def is_stage_rank0(self) -> bool:
        """True in the first of the processes that hold the same layers."""
        return self.rank % self.config.stage_ranks == 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Report the operations inside to the watchdog under `name`; phases nest.

        with processes.phase("step 3"), processes.phase("update"):      "step 3, update"
        """
        self._phases.append(name)
        try:
            self._report()
            yield
        finally:
            self._phases.pop()

    def report(self, operation: str) -> None:
        """Report an operation within the current phase to the watchdog, as progress."""
        self._report(operation)

    def _report(self, *operation: str) -> None:
        if self._watchdog is not None:
            self._watchdog.begin(", ".join([*self._phases, *operation]))

    def mark_waiting(self) -> None:
        """Report that this rank waits for others, until `mark_busy` or the next operation."""
        if self._watchdog is not None:
            self._watchdog.mark_waiting()

    def mark_busy(self) -> None:
        """Report that this rank has received the results it waited for."""
        if self._watchdog is not None:
            self._watchdog.mark_busy()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Report this rank as waiting for others during a collective or a receive."""
        self.mark_waiting()
        # No finally: after a failed collective the rank is still reported as waiting.
        yield
        self.mark_busy()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks, in a new tensor."""
        return self._all_reduce(tensor, None)

    def all_reduce_data(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks with the same layers: over all tokens of a batch."""
        return self._all_reduce(tensor, self._data_group)

    def _all_reduce(self, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        if self.mesh is None:
            return tensor
        # torch reduces in place; the caller keeps its local value.
        total = tensor.clone()
        with self.waiting():
            dist.all_reduce(total, group=group)
        return total

    def all_gather(self, value: Result) -> list[Result]:
        """Return the values of all ranks, by rank."""
        return [value] if self.mesh is None else self._all_gather(value, None)

    def all_gather_pp(self, value: Result) -> list[Result]:
        """Return the values of the ranks of this rank's pipeline, in pipeline order."""
        return [value] if self.pp_group is None else self._all_gather(value, self.pp_group)

    def _all_gather(self, value: Result, group: dist.ProcessGroup | None) -> list[Result]:
        values: list[Any] = [None] * dist.get_world_size(group)
        with self.waiting():
            dist.all_gather_object(values, value, group=group)
        return values

    def gather_tensors_pp(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gather the tensors of all pipeline ranks on the host of pipeline rank 0.

        Other ranks get their own tensors back. Only ranks with `is_stage_rank0` may pass tensors.
        """
        known = self.all_gather_pp({n: (t.shape, t.dtype) for n, t in tensors.items()})
        if self.pp_group is None or not self.is_stage_rank0:
            return tensors
        # Both sides walk through the same list in the same order, one tensor at a time: no send
        # waits for a receive that comes later, and rank 0 holds one tensor in transit.
        for sender, names in enumerate(known[1:], start=1):
            for name, (shape, dtype) in names.items():
                if self.pp_rank == sender:
                    dist.send(tensors[name].cpu().contiguous(), group=self.pp_group, group_dst=0)
                elif self.pp_rank == 0:
                    tensors[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(tensors[name], group=self.pp_group, group_src=sender)
        return tensors

    def agree_on_signal(self, received: Signals | None) -> Signals | None:
        """Return a signal that any rank has received, the same one on all ranks."""
        # A signal reaches ranks at different steps: without agreement some would stop and the
        # others wait for them in the next collective.
        number = max(self.all_gather(received or 0))
        return Signals(number) if number else None

    def on_rank0(self, run: Callable[[], Result]) -> Result:
        """Call `run` on rank 0; return its result, or raise its error, on all ranks."""
        return self.on_every_rank(lambda: run() if self.is_rank0 else cast(Result, None))[0]

    def on_every_rank(self, run: Callable[[], Result]) -> list[Result]:
        """Call `run` on every rank; return all results, or raise the first error, on all ranks."""
        if self.mesh is None:
            return [run()]
        result, failed = None, None
        try:
            result = run()
        except Exception as error:
            failed = error
        # Errors are exchanged too: a rank that raised alone would leave the others waiting for it.
        outcomes = self.all_gather((result, failed))
        for _, reason in outcomes:
            if reason is not None:
                raise reason
        return [cast(Result, result) for result, _ in outcomes]
