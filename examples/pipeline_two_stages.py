"""A stack split into two pipeline stages, with torch.distributed.pipelining.

    torchrun --nproc-per-node 2 examples/pipeline_two_stages.py

`Stack.part` gives each process its connections; the stages exchange the n streams of a microbatch,
[B, T, n, C]. Every process also computes loss and gradients of the whole stack, and compares. Runs
on CPUs, with gloo.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import manifold_hc as mhc

CHANNELS, SUBLAYERS, STREAMS, MICROBATCHES = 32, 8, 4, 4


class Model(nn.Module):
    """The whole network, or the sublayers of one stage."""

    def __init__(self, branches: list[nn.Module], stack: mhc.Stack) -> None:
        super().__init__()
        self.branches, self.stack = nn.ModuleList(branches), stack

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(x, list(self.branches))


def build() -> Model:
    """Equal weights in every process."""
    torch.manual_seed(0)
    branches = [
        nn.Sequential(nn.RMSNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS), nn.GELU())
        for _ in range(SUBLAYERS)
    ]
    config = mhc.ConnectionConfig(kind="mhc", streams=STREAMS, phi_std=0.02)
    return Model(branches, mhc.Stack(CHANNELS, config, SUBLAYERS))


def main() -> None:
    dist.init_process_group("gloo")
    rank, stages = dist.get_rank(), 2
    whole, part = build(), build()
    h, target = torch.randn(8, 16, CHANNELS), torch.randn(8, 16, CHANNELS)

    mine = range(rank * SUBLAYERS // stages, (rank + 1) * SUBLAYERS // stages)
    part = Model([part.branches[i] for i in mine], part.stack.part(mine))

    stage = PipelineStage(part, rank, stages, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=nn.functional.mse_loss)
    losses: list[Tensor] = []
    if rank == 0:
        schedule.step(h)
    else:
        schedule.step(target=target, losses=losses)

    loss = nn.functional.mse_loss(whole(h), target)
    loss.backward()
    if rank == 1:
        print(f"loss: {torch.stack(losses).mean():.6f} in two stages, {loss:.6f} in one piece")

    # A part's connections have the names that they have in the whole stack.
    theirs = {name: p.grad for name, p in whole.stack.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in part.stack.named_parameters() if p.grad is not None}
    worst = max((ours[name] - theirs[name]).norm() / theirs[name].norm() for name in ours)
    print(f"stage {rank}: {len(ours)} gradients of connections, off by at most {worst:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
