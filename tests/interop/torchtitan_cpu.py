"""torchtitan 0.3.0 on a CPU, which it does not support as shipped; import before torchtitan.

Replaced are the choice of the device, FlexAttention (no backward on a CPU), a reduction that gloo
lacks, group time-outs, figures of GPU memory, and the call of a pipeline schedule, which needs a
later PyTorch than 2.13. The rest of torchtitan runs as shipped.
"""

import json
from inspect import signature
from pathlib import Path
from typing import TextIO

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import schedules
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.nn.functional import linear, scaled_dot_product_attention, silu

torch._utils._get_available_device_type = lambda: "cpu"

import torchtitan.train  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from torchtitan.components import metrics  # noqa: E402
from torchtitan.distributed import fsdp, utils  # noqa: E402
from torchtitan.models.common import attention, moe  # noqa: E402


class NoMemoryFigures:
    device_name = "cpu"

    def get_peak_stats(self):
        return metrics.DeviceMemStats(0, 0, 0, 0, 0, 0)

    def reset_peak_stats(self):
        pass


def attend(self, q_BLNH, k_BLNH, v_BLNH, *, attention_masks, scale=None):
    """Attention of torch under the same mask; q, k, v [B, T, heads, size]."""
    batch, length = q_BLNH.shape[:2]
    mask = create_mask(attention_masks.mask_mod, batch, 1, length, length, q_BLNH.device)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BLNH, k_BLNH, v_BLNH))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def sum_gradients(model):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def step(self, *, arg_mbs, kwarg_mbs, target_mbs, losses, loss_kwargs, return_outputs):
    """Run a schedule on microbatches that the caller has split."""
    for stage in getattr(self, "_stages", None) or [self._stage]:
        stage.has_backward = self._has_backward
        stage.clear_runtime_states()
    self._step_microbatches(
        arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, loss_kwargs=loss_kwargs
    )


for kind in (schedules.PipelineScheduleSingle, schedules.PipelineScheduleMulti):
    if "arg_mbs" not in signature(kind.step).parameters:
        kind.step = step
attention.FlexAttention.forward = attend
attention._compiled_create_block_mask = create_block_mask
fsdp.disable_fsdp_gradient_division = sum_gradients
metrics.build_device_memory_monitor = NoMemoryFigures
utils.set_pg_timeouts = lambda timeout, parallel_dims: None


def use_float32_experts() -> None:
    """Compute experts in float32, where torchtitan rounds their inputs to bfloat16.

    A sum in another order then changes a result by float32's rounding, not by bfloat16's.
    """

    def forward(self, x, load):
        weights = (self.w1_EFD, self.w2_EDF, self.w3_EFD)
        weights = [getattr(w, "to_local", lambda w=w: w)() for w in weights]
        outputs = [
            linear(silu(linear(rows, w1)) * linear(rows, w3), w2)
            for rows, w1, w2, w3 in zip(x.split(load.int().tolist()), *weights, strict=True)
        ]
        return torch.cat(outputs)

    moe.GroupedExperts.forward = forward


def record_metrics(file: TextIO) -> None:
    """Write step, loss and gradient norm of every step in full precision."""

    def log(self, step, loss, largest, norm, extra_metrics=None):
        print(json.dumps({"step": step, "loss": float(loss), "norm": norm}), file=file, flush=True)

    metrics.MetricsProcessor.log = log


def shorten_the_end() -> None:
    """Leave out the two seconds that a run of one rank waits for other ranks."""
    torchtitan.trainer.time.sleep = lambda seconds: None


LENGTH = 32
"""Sequence length of the text's documents in tokens."""


def write_assets(folder: Path) -> None:
    """Write a byte tokenizer and texts, one where torchtitan's debug configurations look for it.

    Every document is one sequence. `interleaved` has the documents in the order in which two ranks
    with two sequences each read `c4_test`, whose halves they share.
    """
    tokenizer = folder / "tests/assets/tokenizer"
    tokenizer.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<s>", "</s>"])}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.save(str(tokenizer / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(special))
    # The tokenizer adds two tokens, and the last token is a target only.
    documents = [f"{n} times {n} is {n * n}".ljust(LENGTH - 1, ".") for n in range(400)]
    halves = documents[:200], documents[200:]
    pairs = [half[n : n + 2] for n in range(0, 200, 2) for half in halves]
    _write_text(folder / "tests/assets/c4_test", documents)
    _write_text(folder / "interleaved", [document for pair in pairs for document in pair])


def _write_text(folder: Path, documents: list[str]) -> None:
    folder.mkdir()
    lines = [json.dumps({"text": document}) + "\n" for document in documents]
    (folder / "data.json").write_text("".join(lines))
