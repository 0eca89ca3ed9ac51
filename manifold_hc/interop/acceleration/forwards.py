"""Forward passes that replace those of transformers' modules, by our operators.

Each takes the arguments of the forward that it replaces, returns the same values, and calls the
other submodules of its layer in the same order with the same arguments, which may be of any type.
`mhc_backend`, an attribute of the replacing class, names the backend.
"""

from typing import Any

from torch import Tensor

from manifold_hc.interop.acceleration.sublayers import boundary, read, read_directly, write


def mhc_connection(self: Any, hidden_streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(post, comb, u) of `DeepseekV4HyperConnection`, for callers other than its layer."""
    opened = read_directly(self, hidden_streams, self.mhc_backend)
    return opened.post, opened.res.mT, opened.u


def identity_connection(self: Any, hidden_streams: Tensor) -> tuple[Tensor, Tensor]:
    """(post, u) of `HYV4HyperConnection`, for callers other than its layer."""
    opened = read_directly(self, hidden_streams, self.mhc_backend)
    return opened.post, opened.u


def learned_head(self: Any, x: Tensor) -> Tensor:
    """h of `DeepseekV4HyperHead`: the streams weighted by the learned exit."""
    return read_directly(self, x, self.mhc_backend).u


def deepseek_v4_layer(
    self: Any, hidden_states: Tensor, input_ids: Any = None, **kwargs: Any
) -> Tensor:
    """Streams after one layer of DeepSeek-V4."""
    attention = read(self.attn_hc, hidden_states, self.mhc_backend)
    y, _ = self.self_attn(self.input_layernorm(attention.u), **kwargs)
    ffn = boundary(attention, y, self.ffn_hc)
    return write(ffn, self.mlp(self.post_attention_layernorm(ffn.u), input_ids=input_ids))


def indexed_layer(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    use_cache: Any = False,
    position_embeddings: Any = None,
    prev_topk_indices: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """(streams, indices of the attended tokens) after one layer of GLM-5.3 or hy_v4."""
    indexed = {
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "use_cache": use_cache,
        "position_embeddings": position_embeddings,
        "prev_topk_indices": prev_topk_indices,
    }
    linear = {"cache_params": past_key_values}
    return _indexed(self, hidden_states, indexed, linear, attention_mask=attention_mask, **kwargs)


def cached_layer(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Any = None,
    cache: Any = None,
    use_cache: Any = False,
    position_embeddings: Any = None,
    prev_topk_indices: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """`indexed_layer` with the argument names of transformers 5.24."""
    indexed = {
        "position_ids": position_ids,
        "cache": cache,
        "use_cache": use_cache,
        "position_embeddings": position_embeddings,
        "prev_topk_indices": prev_topk_indices,
    }
    linear = {"cache": cache}
    return _indexed(self, hidden_states, indexed, linear, attention_mask=attention_mask, **kwargs)


def _indexed(
    self: Any,
    hidden_states: Tensor,
    indexed: dict[str, Any],
    linear: dict[str, Any],
    **shared: Any,
) -> tuple[Tensor, Any]:
    """indexed, linear: arguments of each kind of attention; shared: those of both."""
    attention = read(self.attn_hc, hidden_states, self.mhc_backend)
    u, topk_indices = self.input_layernorm(attention.u), None
    if getattr(self, "block_type", None) == "linear_attention":
        y = self.self_attn(hidden_states=u, **linear, **shared)
    else:
        y, _, topk_indices = self.self_attn(hidden_states=u, **indexed, **shared)
    ffn = boundary(attention, y, self.ffn_hc)
    return write(ffn, self.mlp(self.post_attention_layernorm(ffn.u))), topk_indices
