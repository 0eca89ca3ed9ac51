"""Train a pretrained residual model on, with and without mHC, side by side.

    python examples/retrofit.py MODEL --text FILE --steps 40 --seeds 3

MODEL is a folder (or a name on the hub) of any decoder that `mhc.convert` knows; without one a tiny
random Llama stands in. Each variant starts from the same weights and sees the same batches:
residual as it is, mhc with all weights trained, and mhc with its connections trained alone.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import manifold_hc as mhc
from manifold_hc.data.python_docs import python_docs

VARIANTS = ("residual", "mhc", "mhc, connections only")


def pretrained(source: str | None) -> torch.nn.Module:
    """The residual model, with the same weights at every call."""
    if source:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
        )
    )


def tokenize(source: str | None, text: str) -> Tensor:
    if source:
        return torch.tensor(AutoTokenizer.from_pretrained(source)(text, verbose=False).input_ids)
    return torch.tensor(list(text.encode()))


def variant(name: str, source: str | None) -> torch.nn.Module:
    model = pretrained(source)
    if name == "residual":
        return model
    return mhc.convert(
        model, kind="mhc", streams=4, trainable="connections" if "only" in name else "all"
    )


def batches(tokens: Tensor, seed: int, batch: int, length: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - length, (batch,), generator=generator)
        yield torch.stack([tokens[start : start + length] for start in starts.tolist()])


@torch.no_grad()
def validate(model: torch.nn.Module, tokens: Tensor, length: int, sequences: int = 16) -> float:
    model.eval()
    rows = tokens[: sequences * length].view(-1, length)
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    model.train()
    return statistics.mean(losses)


def optimizer(model: torch.nn.Module, lr: float, connection_lr: float) -> torch.optim.Optimizer:
    """AdamW with a rate of their own for the connections, which start from constants."""
    groups: dict[bool, list[Tensor]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[".maps." in name].append(parameter)
    rates = {False: lr, True: connection_lr}
    chosen = [{"params": each, "lr": rates[own]} for own, each in groups.items() if each]
    return torch.optim.AdamW(chosen, betas=(0.9, 0.95), weight_decay=0.0)


def train(name: str, seed: int, args: argparse.Namespace, tokens: Tensor) -> list[float]:
    """Validation loss before and after the steps."""
    held_out, rest = tokens[: 16 * args.length], tokens[16 * args.length :]
    model = variant(name, args.model)
    losses = [validate(model, held_out, args.length)]
    steps = optimizer(model, args.lr, args.connection_lr)
    data = batches(rest, seed, args.batch, args.length)
    for step in range(args.steps):
        rows = next(data)
        loss = model(input_ids=rows, labels=rows).loss
        steps.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in steps.param_groups:  # warm-up over a tenth of the steps
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * min(1.0, (step + 1) / max(args.steps / 10, 1))
        steps.step()
    return [*losses, validate(model, held_out, args.length)]


def main(arguments: list[str] | None = None) -> dict[str, list[list[float]]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="folder or name of a pretrained decoder")
    parser.add_argument("--text", type=Path, help="training text; default: Python's documentation")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--connection-lr", type=float, default=1e-3)
    args = parser.parse_args(arguments)
    text = args.text.read_text() if args.text else python_docs()
    tokens = tokenize(args.model, text)
    found: dict[str, list[list[float]]] = {}
    for name in VARIANTS:
        found[name] = [train(name, seed, args, tokens) for seed in range(args.seeds)]
        before = found[name][0][0]
        after = [losses[1] for losses in found[name]]
        print(f"{name:22} {before:.6f} -> {' '.join(f'{loss:.4f}' for loss in after)}", flush=True)
    return found


if __name__ == "__main__":
    main()
