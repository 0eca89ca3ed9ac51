"""Watch the composite gain of HC and of mHC while they train.

    python examples/watch_gain.py

A GainMonitor runs the model on a fixed probe every few steps and multiplies up the mixing matrices
that the pass used. Forward, the gain says how much a signal can grow from a sublayer to the exit;
backward, how much a gradient can. mHC's forward gain is 1 by construction; HC's is free to move.
"""

import torch
from torch import Tensor, nn

import manifold_hc as mhc
from manifold_hc.diagnostics import GainMonitor

CHANNELS, SUBLAYERS, STEPS, EVERY = 32, 8, 30, 10


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        config = mhc.ConnectionConfig(kind=kind, streams=4)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS), nn.GELU())
            for _ in range(SUBLAYERS)
        )
        self.norm = nn.RMSNorm(CHANNELS)
        self.stack = mhc.Stack(CHANNELS, config, SUBLAYERS)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(self.stack(h, list(self.branches)))


def watch(kind: str) -> list[dict[str, float]]:
    """Step, loss and both gains, every EVERY steps."""
    torch.manual_seed(0)
    model, teacher = Model(kind), nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.Tanh())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = GainMonitor(torch.randn(64, CHANNELS))
    found = []
    for step in range(1, STEPS + 1):
        h = torch.randn(128, CHANNELS)
        loss = nn.functional.mse_loss(model(h), teacher(h).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0 or step == 1:
            gains = monitor(model)  # leaves mode, gradients and random state as they were
            found.append(
                {
                    "step": step,
                    "loss": loss.item(),
                    "forward": gains["gain_forward"],
                    "backward": gains["gain_backward"],
                }
            )
    return found


if __name__ == "__main__":
    for kind in ("hc", "mhc"):
        for row in watch(kind):
            print(
                f"{kind:<4} step {row['step']:>3}   loss {row['loss']:.4f}   "
                f"composite gain: forward {row['forward']:.4f}, backward {row['backward']:.4f}"
            )
