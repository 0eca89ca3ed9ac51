"""A small GPT in nanoGPT's style, with mHC through each of the three interfaces.

    python examples/nanogpt.py                          # one mhc.Connection for each sublayer
    python examples/nanogpt.py --way stack              # one mhc.Stack for all sublayers
    python examples/nanogpt.py --way functions          # the functions, with your own parameters
    python examples/nanogpt.py --way residual           # the plain GPT
    python examples/nanogpt.py --text book.txt --steps 200

Trains on the bytes of a text, or of random sums such as "23+58=81". All four start with the
same loss, because a new mHC network computes the same function as the residual network.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from torch import Tensor, nn

import manifold_hc as mhc

CHANNELS, HEADS, LAYERS, CONTEXT, STREAMS = 64, 4, 4, 64, 4


class CausalSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(CHANNELS, 3 * CHANNELS, bias=False)
        self.c_proj = nn.Linear(CHANNELS, CHANNELS, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # B T C -> B T C
        q, k, v = (
            projection.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for projection in self.c_attn(x).split(CHANNELS, dim=-1)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Sequential):
    def __init__(self) -> None:
        inner = 4 * CHANNELS
        super().__init__(nn.Linear(CHANNELS, inner), nn.GELU(), nn.Linear(inner, CHANNELS))


class Block(nn.Module):
    """The plain residual block; the other interfaces replace its two additions."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.RMSNorm(CHANNELS), CausalSelfAttention()
        self.ln_2, self.mlp = nn.RMSNorm(CHANNELS), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ConnectedBlock(Block):
    """Way 1: a Connection for every sublayer. x: [B, T, n, C]."""

    def __init__(self, layer: int) -> None:
        super().__init__(layer)
        config = mhc.ConnectionConfig(kind="mhc", streams=STREAMS)
        # The streams that the first sublayer reads are copies of one another: see docs.
        first = layer == 0
        self.hc_1 = mhc.Connection(CHANNELS, config, sublayer=2 * layer, equal_streams=first)
        self.hc_2 = mhc.Connection(CHANNELS, config, sublayer=2 * layer + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hc_1(x, lambda u: self.attn(self.ln_1(u)))
        return self.hc_2(x, lambda u: self.mlp(self.ln_2(u)))


class FunctionsBlock(Block):
    """Way 3: the functions, with parameters of the block's own. x: [B, T, n, C]."""

    def __init__(self, layer: int) -> None:
        super().__init__(layer)
        n = STREAMS
        pre = torch.full((n,), -math.log(n - 1))  # each stream is read with sigmoid(pre) = 1/n
        post = 0.2 * torch.linspace(-1, 1, n)  # different write weights, with a mean of 1
        res = -5 * (1 - torch.eye(n))  # near the identity
        rows, bias = 2 * n + n * n, torch.cat([pre, post, res.flatten()])
        self.bias = nn.ParameterList(bias.clone() for _ in range(2))
        self.phi = nn.ParameterList(torch.zeros(rows, n * CHANNELS) for _ in range(2))
        self.alpha = nn.ParameterList(torch.full((3,), 0.01) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        branches = (lambda u: self.attn(self.ln_1(u))), (lambda u: self.mlp(self.ln_2(u)))
        for branch, phi, alpha, bias in zip(branches, self.phi, self.alpha, self.bias, strict=True):
            pre, post, res = mhc.functional.coefficients(x, phi, alpha, bias)
            y = branch(mhc.functional.read(x, pre))
            x = mhc.functional.write(x, y, post, res)
        return x


BLOCKS = {
    "residual": Block,
    "connection": ConnectedBlock,
    "stack": Block,
    "functions": FunctionsBlock,
}


class GPT(nn.Module):
    def __init__(self, way: str = "connection", vocabulary: int = 256) -> None:
        super().__init__()
        self.way = way
        self.wte, self.wpe = nn.Embedding(vocabulary, CHANNELS), nn.Embedding(CONTEXT, CHANNELS)
        self.h = nn.ModuleList(BLOCKS[way](layer) for layer in range(LAYERS))
        self.ln_f = nn.RMSNorm(CHANNELS)
        self.lm_head = nn.Linear(CHANNELS, vocabulary, bias=False)
        if way == "stack":
            config = mhc.ConnectionConfig(kind="mhc", streams=STREAMS)
            self.stack = mhc.Stack(CHANNELS, config, sublayers=2 * LAYERS)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:  # B T, B T -> the loss
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        if self.way == "stack":  # way 2: the stack expands, runs all sublayers, and collapses
            branches = [branch for block in self.h for branch in (block.attn, block.mlp)]
            norms = [norm for block in self.h for norm in (block.ln_1, block.ln_2)]
            x = self.stack(x, branches, norms)
        elif self.way == "residual":
            for block in self.h:
                x = block(x)
        else:
            x = mhc.functional.expand(x, STREAMS)
            for block in self.h:
                x = block(x)
            x = mhc.functional.collapse(x)
        logits = self.lm_head(self.ln_f(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def text_or_sums(file: Path | None) -> Tensor:
    """The bytes of a file, or of random sums."""
    draw = random.Random(0)
    pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(5000)]
    text = file.read_bytes() if file else "".join(f"{a}+{b}={a + b}\n" for a, b in pairs).encode()
    return torch.tensor(list(text))


def train(model: GPT, data: Tensor, steps: int, rate: float = 3e-3, batch: int = 16) -> list[float]:
    """Train, and return the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (batch, 1))
        window = data[starts + torch.arange(CONTEXT + 1)]
        loss = model(window[:, :-1], window[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=BLOCKS, default="connection")
    parser.add_argument("--text", type=Path, help="a file of at least 65 bytes")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = GPT(arguments.way)
    torch.manual_seed(1)  # the same batches for every model
    losses = train(model, text_or_sums(arguments.text), arguments.steps)
    print(f"{arguments.way}: loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")
