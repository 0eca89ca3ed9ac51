"""The processes of a run and what they tell each other; a run of one process has no one to ask."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from signal import Signals
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from manifold_hc.errors import ConfigError, LostProcessError
from manifold_hc.parallel.config import ParallelConfig, require_started
from manifold_hc.parallel.rendezvous import agree_on_prefix
from manifold_hc.parallel.watchdog import Watchdog

Result = TypeVar("Result")

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""What carries tensors between processes, by the device of the model."""

GRACE = 30.0
"""Seconds by which the watchdog speaks before a collective operation gives up."""


class Processes:
    """One process among the others of its run.

    Methods that ask the others must be called by all of them, in the same order.
    """

    def __init__(
        self,
        config: ParallelConfig | None = None,
        mesh: DeviceMesh | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """mesh: all of them in a row; None for a process on its own."""
        self.config = config or ParallelConfig()
        self.mesh = mesh
        self._watchdog = watchdog
        self.background = None if mesh is None else dist.new_group(backend="gloo")
        """The same processes, for a thread that asks while the main one does."""
        self.pp_group: dist.ProcessGroup | None = None
        """Those that have this one's tokens and other layers, in the order of the pipeline."""
        self._copies: dist.ProcessGroup | None = None
        """Those that have this one's layers and other tokens; None where that is all."""
        if mesh is not None and self.config.pipeline > 1:
            sizes = (self.config.pipeline, self.config.copies)
            grid = mesh._unflatten(0, sizes, ("pipeline", "copies"))
            self.pp_group, self._copies = grid.get_group("pipeline"), grid.get_group("copies")

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    @property
    def rank(self) -> int:
        """Number of this one among all."""
        return 0 if self.mesh is None else dist.get_rank()

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.mesh is None else dist.get_world_size()

    @property
    def dp_rank(self) -> int:
        """Which part of every batch is this one's."""
        return self.rank % self.config.copies // self.config.tensor

    @property
    def dp_size(self) -> int:
        """In how many parts a batch is computed at once."""
        return self.config.dp_size

    @property
    def tp_rank(self) -> int:
        """Which part of every sequence is this one's."""
        return self.rank % self.config.tensor

    @property
    def tp_size(self) -> int:
        """In how many parts a sequence is computed at once."""
        return self.config.tensor

    @property
    def pp_rank(self) -> int:
        """Which process of its pipeline this one is."""
        return self.rank // self.config.copies

    @property
    def is_first_copy(self) -> bool:
        """Whether this is the first one of those that have its layers."""
        return self.rank % self.config.copies == 0

    def at(self, operation: str) -> None:
        """Tell the watchdog what comes next."""
        if self._watchdog is not None:
            self._watchdog.at(operation)

    def waits(self) -> None:
        """Tell the watchdog that it is the others' turn, until `goes_on` or the next operation."""
        if self._watchdog is not None:
            self._watchdog.waits()

    def goes_on(self) -> None:
        """Tell the watchdog that it is this one's turn again."""
        if self._watchdog is not None:
            self._watchdog.goes_on()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the time of what needs the others."""
        self.waits()
        yield
        self.goes_on()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on every process."""
        return self._all_reduce(tensor, None)

    def all_reduce_data(self, tensor: Tensor) -> Tensor:
        """The sum over those that have this one's layers: over all tokens of a batch."""
        return self._all_reduce(tensor, self._copies)

    def _all_reduce(self, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        if self.mesh is None:
            return tensor
        total = tensor.clone()
        with self.waiting():
            dist.all_reduce(total, group=group)
        return total

    def all_gather_pp(self, value: Result) -> list[Result]:
        """The values of those that have other layers for this one's tokens, in their order."""
        return [value] if self.pp_group is None else self._all_gather(value, self.pp_group)

    def collected(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all processes of a pipeline, on the first one's host; its own elsewhere.

        Only the processes that are the `is_first_copy` of their layers have any to give.
        """
        known = self.all_gather_pp({n: (t.shape, t.dtype) for n, t in tensors.items()})
        if self.pp_group is None or not self.is_first_copy:
            return tensors
        for position, names in enumerate(known[1:], start=1):
            for name, (shape, dtype) in names.items():
                if self.pp_rank == position:
                    dist.send(tensors[name].cpu().contiguous(), group=self.pp_group, group_dst=0)
                elif self.pp_rank == 0:
                    tensors[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(tensors[name], group=self.pp_group, group_src=position)
        return tensors

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        return max(self.all_gather(number))

    def asked(self, seen: Signals | None) -> Signals | None:
        """The signal that some process has seen, the same for all."""
        number = self.largest(seen or 0)
        return Signals(number) if number else None

    def all_gather(self, value: Result) -> list[Result]:
        """The values of all processes, by rank."""
        return [value] if self.mesh is None else self._all_gather(value, None)

    def _all_gather(self, value: Result, group: dist.ProcessGroup | None) -> list[Result]:
        values: list[Any] = [None] * dist.get_world_size(group)
        with self.waiting():
            dist.all_gather_object(values, value, group=group)
        return values

    def on_rank0(self, run: Callable[[], Result]) -> Result:
        """What `run` returns in the first process, or the error that it raises there, in all."""
        return self.each(lambda: run() if self.is_first else cast(Result, None))[0]

    def each(self, run: Callable[[], Result]) -> list[Result]:
        """What `run` returns in every process, or the first error that it raises in one, in all."""
        if self.mesh is None:
            return [run()]
        result, failed = None, None
        try:
            result = run()
        except Exception as error:
            failed = error
        outcomes = self.all_gather((result, failed))
        for _, reason in outcomes:
            if reason is not None:
                raise reason
        return [cast(Result, result) for result, _ in outcomes]


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def by_mesh(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters by the processes that share them: torch takes those of one mesh at once."""
    meshes: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        meshes.setdefault(mesh, []).append(parameter)
    return list(meshes.values())


@contextmanager
def joined(config: ParallelConfig, device: torch.device) -> Iterator[Processes]:
    """Meet the other processes that torchrun has started; alone where there are none.

    Raises ConfigError where other than `config.size` processes were started, and LostProcessError
    when one of them goes away.
    """
    require_started(config)
    if config.size == 1:
        yield Processes()
        return
    if device.type not in BACKENDS:
        raise ConfigError(
            f"training.device: several processes run on cpu or cuda, not on {device.type}"
        )
    if device.type == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    patience = timedelta(seconds=config.timeout + GRACE)
    known, rank, size = next(rendezvous("env://", timeout=patience))
    store = PrefixStore(agree_on_prefix(known, rank, size, config.timeout), known)
    watchdog = Watchdog(store, rank, size, config.timeout)
    try:
        dist.init_process_group(
            BACKENDS[device.type],
            store=store,
            rank=rank,
            world_size=size,
            timeout=patience,
        )
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("all",))
        yield Processes(config, mesh, watchdog)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            reason = str(error).partition("] ")[2].partition(". This is typically")[0]
            raise LostProcessError(
                f"parallel: another process is gone: {reason or error}"
            ) from error
        raise
    finally:
        watchdog.end()
        if dist.is_initialized():
            dist.destroy_process_group()
