"""Configurations for torchtitan's `--config`: a debug model, and the models of the mHC paper.

The debug model is torchtitan's own. `--connection.kind` and the other fields of `ConnectionConfig`
change the connections of each of them.

torchtitan takes every function that is visible here for a configuration. Other functions are
therefore called through their modules.
"""

import dataclasses
from typing import Any

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.deepseek_v3 import config_registry as deepseek_v3

from manifold_hc.config import ConnectionConfig, Kind
from manifold_hc.interop.torchtitan import sizes
from manifold_hc.interop.torchtitan.schedule import StepSchedule
from manifold_hc.interop.torchtitan.trainer import ConnectedTrainer

VECTORS = r"(norm\.weight|\.alpha|\.bias)$"
"""Parameters without weight decay: norms, and gates and static coefficients of the connections."""


def deepseek_v3_residual_debug() -> ConnectedTrainer.Config:
    """torchtitan's debug model as it is: residual connections."""
    return _debug("residual")


def deepseek_v3_hc_debug() -> ConnectedTrainer.Config:
    """torchtitan's debug model with hyper-connections (arXiv 2409.19606), four streams."""
    return _debug("hc")


def deepseek_v3_mhc_debug() -> ConnectedTrainer.Config:
    """torchtitan's debug model with the paper's mHC, four streams."""
    return _debug("mhc")


def residual_3b() -> ConnectedTrainer.Config:
    """The paper's baseline with 2.97 billion parameters."""
    return _paper("3b", "residual")


def hc_3b() -> ConnectedTrainer.Config:
    """The paper's model with 2.97 billion parameters and hyper-connections."""
    return _paper("3b", "hc")


def mhc_3b() -> ConnectedTrainer.Config:
    """The paper's model with 2.97 billion parameters and mHC."""
    return _paper("3b", "mhc")


def residual_9b() -> ConnectedTrainer.Config:
    """The paper's baseline with 9.18 billion parameters."""
    return _paper("9b", "residual")


def hc_9b() -> ConnectedTrainer.Config:
    """The paper's model with 9.18 billion parameters and hyper-connections."""
    return _paper("9b", "hc")


def mhc_9b() -> ConnectedTrainer.Config:
    """The paper's model with 9.18 billion parameters and mHC."""
    return _paper("9b", "mhc")


def residual_27b() -> ConnectedTrainer.Config:
    """The paper's baseline with 27.0 billion parameters."""
    return _paper("27b", "residual")


def hc_27b() -> ConnectedTrainer.Config:
    """The paper's model with 27.0 billion parameters and hyper-connections."""
    return _paper("27b", "hc")


def mhc_27b() -> ConnectedTrainer.Config:
    """The paper's model with 27.0 billion parameters and mHC."""
    return _paper("27b", "mhc")


def _debug(kind: Kind) -> ConnectedTrainer.Config:
    base = deepseek_v3.deepseek_v3_debugmodel()
    base.parallelism.spmd_backend = "partial_dtensor"
    base.optimizer = _adamw(lr=8e-4, eps=1e-8)
    values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    return ConnectedTrainer.Config(**values, connection=ConnectionConfig(kind=kind))


def _paper(name: str, kind: Kind) -> ConnectedTrainer.Config:
    """Configuration of one of the paper's models with its recipe, in torchtitan's terms."""
    from manifold_hc.training.presets import preset

    recipe = preset(name)
    optimizer, batch = recipe.optimizer, recipe.training.batch
    return ConnectedTrainer.Config(
        connection=ConnectionConfig(kind=kind),
        model_spec=sizes.paper_spec(name, recipe.model, recipe.data.sequence),
        loss=ChunkedLossWrapper.Config(
            loss_fn=CrossEntropyLoss.Config(global_vocab_size=recipe.model.vocabulary)
        ),
        hf_assets_path="./assets/hf/DeepSeek-V3.1-Base",
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4"),
        optimizer=_adamw(
            lr=optimizer.lr,
            eps=optimizer.eps,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
        ),
        lr_scheduler=StepSchedule.Config(warmup_steps=optimizer.warmup),
        training=TrainingConfig(
            local_batch_size=4,
            global_batch_size=batch,
            seq_len=recipe.data.sequence,
            steps=recipe.training.steps,
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(
            spmd_backend="partial_dtensor", pipeline_parallel_schedule="Interleaved1F1B"
        ),
        checkpoint=CheckpointManager.Config(interval=recipe.checkpoint.every),
        activation_checkpoint=SelectiveAC.Config(),
    )


def _adamw(
    *,
    lr: float,
    eps: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
) -> OptimizersContainer.Config:
    """AdamW whose decay leaves out vectors, as in `manifold_hc.training.optimizer.build`."""

    def group(pattern: str, decay: float) -> ParamGroupConfig:
        settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay}
        return ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=settings)

    return OptimizersContainer.Config(param_groups=[group(VECTORS, 0.0), group(".*", weight_decay)])
