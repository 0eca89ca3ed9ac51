"""torchtitan's DeepSeek-V3 model with connections around attention and feed-forward.

The first block expands the embedding to streams and the last one collapses them, so the model
around the blocks, its final norm and its head are torchtitan's own.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchtitan.models.deepseek_v3.model import DeepSeekV3Model, DeepSeekV3TransformerBlock
from torchtitan.protocols.module import Module

from manifold_hc.config import ConnectionConfig
from manifold_hc.interop.torchtitan.checks import require_supported
from manifold_hc.interop.torchtitan.parallelize import gather, streams_of
from manifold_hc.stack import Stack


class Streams(Module):
    """Connections of one block: its two sublayers of the whole network's Stack.

    Parameter names are those of the Stack: `stack.connections.4.maps.phi` for the attention of
    block 2.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """Configuration of one block's connections."""

        dim: int
        """Channels C of a stream."""
        connection: ConnectionConfig
        """Kind and sizes of every connection."""
        block: int
        """Index of the block in depth order."""
        blocks: int
        """Number of blocks in the network."""

    def __init__(self, config: Config) -> None:
        """Create the connections of sublayers 2 * block and 2 * block + 1."""
        super().__init__()
        whole = Stack(config.dim, config.connection, 2 * config.blocks)
        self.stack = whole.part([2 * config.block, 2 * config.block + 1])

    def reset_parameters(self) -> None:
        """Set the initial values, with which the network equals the residual one."""
        self.stack.reset_parameters()


class ConnectedBlock(DeepSeekV3TransformerBlock):
    """Transformer block whose two residual additions are connections."""

    @dataclass(kw_only=True, slots=True)
    class Config(DeepSeekV3TransformerBlock.Config):
        """torchtitan's configuration of a block, and that of its connections."""

        streams: Streams.Config
        """Connections of this block."""

    def __init__(self, config: Config) -> None:
        """Create torchtitan's block and its connections."""
        super().__init__(config)
        self.streams = config.streams.build()

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        attention_masks: Any,
        positions: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run attention and feed-forward on the streams.

        Args:
            x: Streams [B, T, n, C]; for the first block the embedding [B, T, C]. With single_pass
                the streams and the pre [B, T, n] of the sublayer before.
            attention_masks: Masks of torchtitan's attention.
            positions: Position of every token in its document [B, T].

        Returns:
            The next streams [B, T, n, C], with single_pass and their pre; for the last block the
            hidden state [B, T, C].
        """
        source, pre = x if isinstance(x, tuple) else (x, None)
        attention = partial(self.attention, attention_masks=attention_masks, positions=positions)
        feed_forward = self.moe if self.moe_enabled else self.feed_forward
        norms = [self.attention_norm, self.ffn_norm]
        out: Tensor | tuple[Tensor, Tensor]
        out = self.streams.stack(source, [attention, feed_forward], norms, pre)
        return out


class ConnectedModel(DeepSeekV3Model):
    """DeepSeek-V3 model made of `ConnectedBlock`s; multi-token prediction stays residual."""

    @dataclass(kw_only=True, slots=True)
    class Config(DeepSeekV3Model.Config):
        """torchtitan's configuration of the model; every layer is a `ConnectedBlock.Config`."""

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Apply the trainer's configuration; raise ConfigError for unsupported parallelism."""
            require_supported(self.layers[0].streams.connection, config.parallelism)
            DeepSeekV3Model.Config.update_from_config(self, config=config, **kwargs)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        attention_masks: Any = None,
    ) -> Any:
        """Run torchtitan's forward with the connections gathered, for it and for its backward.

        Args:
            tokens: Tokens [B, T]; for a later pipeline stage the output of the stage before.
            positions: Position of every token in its document [B, T].
            attention_masks: Masks of torchtitan's attention.

        Returns:
            Logits [B, T, V], or the hidden state [B, T, C] if the loss applies the head; from a
            stage without the last block the streams [B, T, n, C].
        """
        streams = streams_of(self)
        gather(streams)
        out = super().forward(tokens, positions, attention_masks)
        # FSDP reshards at the end of every backward, and another forward's may come before this
        # one's.
        for tensor in tree_leaves(out):
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: gather(streams))
        return out

    def verify_module_protocol(self) -> None:
        """Raise RuntimeError for modules that torchtitan cannot initialise.

        The Stack of a `Streams` is exempt: `Streams.reset_parameters` initialises it.
        """
        stacks = [module.stack for module in self.modules() if isinstance(module, Streams)]
        exempt = {inner for stack in stacks for inner in stack.modules()}
        strange = [
            f"{name} ({type(module).__name__})"
            for name, module in self.named_modules()
            if not isinstance(module, Module) and module not in exempt
        ]
        if strange:
            raise RuntimeError(
                f"ConnectedModel: every module must be a torchtitan Module but {strange[0]} is not"
            )
