"""Multi-head latent attention with rotary position embedding (DeepSeek-V2, arXiv 2405.04434)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from manifold_hc.errors import ConfigError, require_at_least_one, require_number
from manifold_hc.models.cache import Context
from manifold_hc.models.documents import Documents
from manifold_hc.models.linear import Linear
from manifold_hc.models.norm import RMSNorm


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes of latent attention; D = `head_size`, R = `rotary_size`."""

    heads: int = 4
    """Number of attention heads."""
    head_size: int = 16
    """Size of a head's value and of the position-free part of its query and key."""
    rotary_size: int = 8
    """Size of the rotary part of query and key; all heads share one rotary key."""
    latent_size: int = 48
    """Size of the latent vector from which keys and values are computed."""
    theta: float = 10000.0
    """Base of the rotary frequencies."""

    def __post_init__(self) -> None:
        """Raise ConfigError for invalid sizes."""
        require_at_least_one(self, "heads", "head_size", "rotary_size", "latent_size")
        require_number(self, "theta", positive=True)
        if self.rotary_size % 2:
            raise ConfigError(f"rotary_size: must be even but is {self.rotary_size}")


class LatentAttention(nn.Module):
    """Causal attention whose keys and values come from one small latent vector per token."""

    def __init__(self, channels: int, config: AttentionConfig, norm_eps: float) -> None:
        """channels: hidden size C. norm_eps: epsilon of the norm on the latent vector."""
        super().__init__()
        self.config = config
        heads, size, rotary = config.heads, config.head_size, config.rotary_size
        self.query = Linear(channels, heads * (size + rotary))
        self.compress = Linear(channels, config.latent_size + rotary)
        self.latent_norm = RMSNorm(config.latent_size, eps=norm_eps)
        self.decompress = Linear(config.latent_size, heads * 2 * size)
        self.output = Linear(heads * size, channels)

    def reset_parameters(self) -> None:
        """Redraw every matrix as `nn.Linear` does; set the norm's weight to 1."""
        self.query.reset_parameters()
        self.compress.reset_parameters()
        self.latent_norm.reset_parameters()
        self.decompress.reset_parameters()
        self.output.reset_parameters()

    def forward(
        self,
        u: Float[Tensor, "B T C"],
        documents: Documents | None = None,
        context: Context | None = None,
    ) -> Float[Tensor, "B T C"]:
        """Attend to all earlier tokens of the sequence, or of the token's document if given.

        context: positions and cached tokens; None for the whole sequence, without a cache.
        """
        config = self.config
        T = u.shape[1]
        positions = torch.arange(T, device=u.device) if context is None else context.positions
        rotation = _rotation(positions, config.rotary_size, config.theta)

        # H is the number of heads in `query`: with tensor parallelism this rank's heads.
        both = config.head_size + config.rotary_size
        query = self.query(u).unflatten(-1, (-1, both)).transpose(1, 2)  # B H T D+R
        query, query_rotary = query.split([config.head_size, config.rotary_size], -1)

        # Keys and values of all heads come from one latent vector; the rotary key is shared.
        latent, key_rotary = self.compress(u).split([config.latent_size, config.rotary_size], -1)
        latent, key_rotary = self.latent_norm(latent), _rotate(key_rotary.unsqueeze(1), rotation)
        query_rotary = _rotate(query_rotary, rotation)
        if context is not None and context.cache is not None:
            new = torch.cat([latent, key_rotary.squeeze(1)], -1)
            entries = context.cache.append(context.block, new)  # B S K+R
            if entries.shape[1] > T:
                attended = self._attend_cached(query, query_rotary, entries, context.visible)
                return self.output(attended.transpose(1, 2).flatten(-2))

        key_value = self.decompress(latent)
        key_value = key_value.unflatten(-1, (-1, 2 * config.head_size)).transpose(1, 2)
        key, value = key_value.chunk(2, -1)
        query = torch.cat([query, query_rotary], -1)
        key = torch.cat([key, key_rotary.expand(-1, query.shape[1], -1, -1)], -1)
        if documents is None:
            attended = _attend(query, key, value)
        else:
            attended = _attend_within(documents, query, key, value)
        return self.output(attended.transpose(1, 2).flatten(-2))

    def _attend_cached(
        self,
        query: Float[Tensor, "B H T D"],
        query_rotary: Float[Tensor, "B H T R"],
        entries: Float[Tensor, "B S E"],
        visible: Bool[Tensor, "rows 1 T S"] | None,
    ) -> Float[Tensor, "B H T D"]:
        """Attend to latents without decompressing them, at the cost of one key for all heads.

        `decompress` is linear: its key half is applied to the query and its value half to the
        result instead, `q (W_k c) = (q W_k) c` (DeepSeek-V2, section 2.1.2).
        """
        D, K = self.config.head_size, self.config.latent_size
        to_key, to_value = self.decompress.weight.unflatten(0, (-1, 2 * D)).split(D, 1)  # H D K
        query = torch.cat([query @ to_key, query_rotary], -1)  # B H T K+R
        latents = entries.unsqueeze(1).expand(-1, query.shape[1], -1, -1)
        scale = (D + self.config.rotary_size) ** -0.5
        attended = scaled_dot_product_attention(query, latents, latents, visible, scale=scale)
        return attended[..., :K] @ to_value.transpose(-1, -2)


def _attend(
    query: Float[Tensor, "B H T E"], key: Float[Tensor, "B H T E"], value: Float[Tensor, "B H T D"]
) -> Float[Tensor, "B H T D"]:
    """Causal attention by torch's fused kernels, which hold no T x T scores.

    The kernels need values as wide as the keys: values are padded with zeros, the result is cut.
    """
    size = value.shape[-1]
    padded = pad(value, (0, key.shape[-1] - size))
    return scaled_dot_product_attention(query, key, padded, is_causal=True)[..., :size]


@torch.compiler.disable(reason="every batch has other documents, and each would be another graph")
def _attend_within(
    documents: Documents,
    query: Float[Tensor, "B H T E"],
    key: Float[Tensor, "B H T E"],
    value: Float[Tensor, "B H T D"],
) -> Float[Tensor, "B H T D"]:
    """Causal attention within each document, with each group of documents as one batch.

    Padding comes last, so causal queries of real tokens never see it, and its results are dropped.
    """
    tokens = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # B*T H E
    attended = [
        _attend(*(x[group].transpose(1, 2) for x in tokens)).transpose(1, 2).flatten(0, 1)
        for group in documents.groups
    ]
    empty = value.new_empty(0, *tokens[2].shape[1:])  # for a batch without tokens
    gathered = torch.cat([empty, *attended])[documents.slots]
    batch, length = query.shape[0], query.shape[2]
    return gathered.unflatten(0, (batch, length)).transpose(1, 2)


def _rotation(
    positions: Int[Tensor, "*rows T"], size: int, theta: float
) -> tuple[Float[Tensor, "*batch T half"], Float[Tensor, "*batch T half"]]:
    """Cosine and sine of every position's angles; float32, since bfloat16 positions collide."""
    device = positions.device
    frequency = theta ** -(torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    angle = positions.to(torch.float32).unsqueeze(-1) * frequency
    angle = angle if positions.dim() == 1 else angle.unsqueeze(1)  # rows: B 1 T half, for all heads
    return angle.cos(), angle.sin()


def _rotate(
    x: Float[Tensor, "B H T R"],
    rotation: tuple[Float[Tensor, "*batch T half"], Float[Tensor, "*batch T half"]],
) -> Float[Tensor, "B H T R"]:
    """Rotate the two halves of the last dimension into each other (RoPE, arXiv 2104.09864)."""
    cosine, sine = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1).to(x.dtype)
