"""A dense decoder: tokens -> streams -> sublayers -> exit -> logits."""

from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor, nn

from manifold_hc.connection import ConnectionConfig
from manifold_hc.errors import require_at_least_one, require_number
from manifold_hc.models.attention import AttentionConfig, LatentAttention
from manifold_hc.models.feed_forward import GatedFeedForward
from manifold_hc.stack import Stack


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder."""

    vocabulary: int = 256
    """Number V of token ids; 256 for bytes."""
    channels: int = 96
    """Hidden size C."""
    blocks: int = 12
    """Blocks of one attention and one feed-forward sublayer each."""
    feed_forward: int = 256
    """Hidden size of the feed-forward sublayers."""
    norm_eps: float = 1e-20
    """Epsilon of every RMS norm; the paper's."""
    init_std: float = 0.02
    """Standard deviation of the initial weight matrices."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Sizes of the attention sublayers."""

    def __post_init__(self) -> None:
        """Raise ConfigError for sizes that cannot be built."""
        require_at_least_one(self, "vocabulary", "channels", "blocks", "feed_forward")
        require_number(self, "norm_eps", "init_std")

    @property
    def sublayers(self) -> int:
        """Number L of sublayers: attention and feed-forward count as one each."""
        return 2 * self.blocks


class Decoder(nn.Module):
    """A causal language model with any kind of connection between its sublayers."""

    def __init__(self, config: DecoderConfig, connection: ConnectionConfig) -> None:
        """Initialise from torch's current random state; equal seeds give equal branches."""
        super().__init__()
        self.config = config
        C = config.channels
        self.embedding = nn.Embedding(config.vocabulary, C)
        self.branches = nn.ModuleList()
        for _ in range(config.blocks):
            attention = LatentAttention(C, config.attention, config.norm_eps)
            self.branches.append(self._normed(attention))
            self.branches.append(self._normed(GatedFeedForward(C, config.feed_forward)))
        self.norm = nn.RMSNorm(C, eps=config.norm_eps)
        self.head = nn.Linear(C, config.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.init_std)
        self.stack = Stack(C, connection, config.sublayers)

    def _normed(self, sublayer: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.RMSNorm(self.config.channels, eps=self.config.norm_eps), sublayer)

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of every next token."""
        h = self.embedding(tokens)  # B T C
        h = self.stack(h, list(self.branches))  # B T C, over B T n C
        return self.head(self.norm(h))
