"""Our decoder as a model of transformers."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from manifold_hc.config import block_length
from manifold_hc.errors import ConfigError, ShapeError
from manifold_hc.files import write_atomically
from manifold_hc.interop.huggingface.configuration import CODE, ManifoldConfig
from manifold_hc.maps import LearnedExit, Maps
from manifold_hc.models import Decoder

CODE_SOURCE = '''"""Classes of this model, from: pip install 'manifold-hc[transformers]'."""

from manifold_hc.interop.huggingface import ManifoldConfig, ManifoldForCausalLM

__all__ = ["ManifoldConfig", "ManifoldForCausalLM"]
'''


LOADED = "_is_hf_initialized"
"""Attribute by which transformers marks tensors that need no initialisation."""


class GrowingCache:
    """Latents and rotary keys in a cache of transformers, as keys [B, 1, S, K + R].

    Its values are empty. transformers reorders, crops, repeats and offloads them with the keys.
    """

    def __init__(self, cache: Cache) -> None:
        """Raise ConfigError for a cache of fixed length."""
        if cache.is_compileable:
            raise ConfigError(
                f"past_key_values: must grow with the tokens but is a {type(cache).__name__}; use "
                "DynamicCache, generate's default"
            )
        self._cache = cache

    @property
    def length(self) -> int:
        """Number S of cached tokens per sequence, padding included."""
        return int(self._cache.get_seq_length())

    def append(self, block: int, entries: Float[Tensor, "B T E"]) -> Float[Tensor, "B S E"]:
        """Add new tokens to a block's entries; return all of them."""
        keys = entries.unsqueeze(1)
        found: Tensor = self._cache.update(keys, keys[..., :0], block)[0]
        return found.squeeze(1)


class ManifoldForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Decoder` with transformers' interface: loading, saving, `generate`, Trainer.

    Args:
        config: sizes; `ManifoldConfig(model=..., connection=...)`.

    Example:
        >>> import torch
        >>> from manifold_hc.interop.huggingface import ManifoldConfig, ManifoldForCausalLM
        >>> model = ManifoldForCausalLM(ManifoldConfig(model={"blocks": 2})).eval()
        >>> prompt = torch.tensor([[72, 105]])
        >>> model.generate(prompt, max_new_tokens=3, do_sample=False).shape
        torch.Size([1, 5])
    """

    config_class = ManifoldConfig
    base_model_prefix = "decoder"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["Decoder"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: ManifoldConfig) -> None:
        """Initialise the weights from torch's current random state, as `Decoder` does."""
        super().__init__(config)
        self.gradient_checkpointing = False
        self.decoder = Decoder(config.decoder_config, config.connection_config)
        for tensor in (*self.decoder.parameters(), *self.decoder.buffers()):
            setattr(tensor, LOADED, not tensor.is_meta)
        self.post_init()

    @classmethod
    def of(cls, decoder: Decoder) -> "ManifoldForCausalLM":
        """Wrap a decoder; both share their weights."""
        config = ManifoldConfig(model=decoder.config, connection=decoder.stack.config)
        config.dtype = cast(nn.Linear, decoder.head).weight.dtype
        with torch.device("meta"):
            model = cls(config)
        model.decoder = decoder
        return model.train(decoder.training)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits [B, T, V], the loss if there are labels, and the cache.

        Args:
            input_ids: new tokens [B, T].
            attention_mask: [B, S], 0 for padding, over the cached and the new tokens.
            past_key_values: cache of the tokens before; it is extended.
            labels: [B, T], the tokens themselves, -100 where none counts; they are shifted here.
            use_cache: True to return a cache, a new one if none is given.
            logits_to_keep: number of last tokens, or indices, whose logits are wanted; 0 for all.
            return_dict: False for a tuple.
            num_items_in_batch: number of labels that the sum of losses is divided by.
        """
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ShapeError(
                "ManifoldForCausalLM: attention_mask must be [B, S], 0 for padding, but is "
                f"{list(attention_mask.shape)}; causality is built in"
            )
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        if past_key_values is None and wanted:
            past_key_values = DynamicCache(config=self.config)
        logits = self.decoder(
            input_ids,
            mask=attention_mask,
            cache=None if past_key_values is None else GrowingCache(past_key_values),
            last=logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep else None,
        )
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **options: Any
    ) -> None:
        """Write configuration and weights, and a module for `trust_remote_code=True`."""
        write_atomically(Path(save_directory) / f"{CODE}.py", CODE_SOURCE)
        super().save_pretrained(save_directory, *args, **options)
        for file in Path(save_directory).glob("*.safetensors"):  # safetensors makes them private
            file.chmod(stat.S_IMODE((Path(save_directory) / f"{CODE}.py").stat().st_mode))

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return cast(nn.Module, self.decoder.embedding)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.decoder.embedding = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return cast(nn.Module, self.decoder.head)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.decoder.head = cast(nn.Linear, new_embeddings)

    def resize_token_embeddings(self, *args: Any, **options: Any) -> nn.Embedding:
        """Change the vocabulary size, as `PreTrainedModel.resize_token_embeddings`."""
        embedding: nn.Embedding = super().resize_token_embeddings(*args, **options)
        self.decoder.config = self.config.decoder_config
        return embedding

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Turn the recompute of the streams on or off: `recompute="auto"` of a `Stack`."""
        if every_n_layers != 1:
            raise ConfigError(
                "gradient checkpointing: every_n_layers must be 1, since the stack chooses the "
                f"length of its recompute blocks, but is {every_n_layers}"
            )
        stack = self.decoder.stack
        stack.recompute = "auto" if enable else None
        stack.block_length = block_length(
            stack.recompute, self.decoder.config.sublayers, stack.config.n
        )
        self.gradient_checkpointing = enable

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise tensors that a checkpoint lacks, as `Decoder` does."""
        own = [*module._parameters.values(), *module._buffers.values()]
        if all(t is None or getattr(t, LOADED, False) for t in own):
            return
        loaded = [
            (tensor, tensor.clone())
            for tensor in (*module.parameters(), *module.buffers())
            if getattr(tensor, LOADED, False)
        ]
        cast(nn.Linear, module).reset_parameters()
        if not isinstance(module, Maps | LearnedExit):
            for parameter in module.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(std=self.config.decoder_config.init_std)
        for tensor, values in loaded:
            tensor.copy_(values)
