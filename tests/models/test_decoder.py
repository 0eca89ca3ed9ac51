import math

import pytest
import torch
from torch import nn

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError
from manifold_hc.models import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    ExpertsConfig,
    LatentAttention,
)

SMALL = DecoderConfig(
    vocabulary=50,
    channels=24,
    blocks=2,
    feed_forward=40,
    attention=AttentionConfig(heads=3, head_size=8, rotary_size=4, latent_size=10),
)


@pytest.mark.parametrize("kind", ["residual", "hc", "mhc"])
def test_no_token_sees_a_later_one(kind):
    model = Decoder(SMALL, ConnectionConfig(kind=kind, phi_std=0.5))
    tokens = torch.randint(0, 50, (2, 9))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax((0, 2)).min() > 0


@pytest.mark.parametrize("kind", ["hc", "mhc"])
def test_logits_at_step_0_are_the_residual_networks(kind):
    """24 sublayers, float64, the model's own norm epsilon set to 0."""
    config = DecoderConfig(channels=32, blocks=12, feed_forward=48, norm_eps=0.0)
    tokens = torch.randint(0, 256, (2, 11))

    def logits(kind):
        torch.manual_seed(3)
        return Decoder(config, ConnectionConfig(kind=kind)).double()(tokens)

    wanted = logits("residual")
    assert (logits(kind) - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_equal_seeds_give_equal_branches():
    def branches(kind):
        torch.manual_seed(0)
        model = Decoder(SMALL, ConnectionConfig(kind=kind))
        return [
            *model.branches.parameters(),
            *model.embedding.parameters(),
            *model.head.parameters(),
        ]

    for a, b, c in zip(branches("residual"), branches("hc"), branches("mhc"), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_latent_attention_is_attention_over_decompressed_keys_and_values():
    """Written out for one head: softmax(q k / sqrt(d)) v, positions rotating a part of q and k."""
    C, D, R, K, T = 6, 4, 2, 3, 5
    config = AttentionConfig(heads=1, head_size=D, rotary_size=R, latent_size=K, theta=100.0)
    attention = LatentAttention(C, config, norm_eps=1e-20).double()
    nn.init.normal_(attention.latent_norm.weight)
    u = torch.randn(1, T, C, dtype=torch.float64)

    def turned(pair, position):
        angle = torch.tensor(position * 1.0, dtype=torch.float64)
        a, b = pair
        return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    wanted = []
    for t in range(T):
        query = attention.query.weight @ u[0, t]
        query = torch.cat([query[:D], turned(query[D:], t)])
        scores, values = [], []
        for s in range(t + 1):
            small = attention.compress.weight @ u[0, s]
            latent = small[:K] / small[:K].square().mean().sqrt() * attention.latent_norm.weight
            both = attention.decompress.weight @ latent
            key = torch.cat([both[:D], turned(small[K:], s)])
            scores.append(query @ key / math.sqrt(D + R))
            values.append(both[D:])
        weights = torch.stack(scores).softmax(0)
        wanted.append(
            attention.output.weight @ sum(w * v for w, v in zip(weights, values, strict=True))
        )
    torch.testing.assert_close(attention(u)[0], torch.stack(wanted), rtol=1e-6, atol=1e-7)


def test_attention_sees_relative_positions_only():
    attention = LatentAttention(24, SMALL.attention, norm_eps=1e-20)
    u = torch.randn(1, 1, 24).expand(1, 6, 24)
    out = attention(u)
    torch.testing.assert_close(out, out[:, :1].expand_as(out))


def test_bfloat16_and_float64_run():
    for dtype in (torch.bfloat16, torch.float64):
        model = Decoder(SMALL, ConnectionConfig()).to(dtype)
        assert model(torch.randint(0, 50, (1, 4))).dtype == dtype


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DecoderConfig(blocks=0), "blocks: must be at least 1"),
        (
            lambda: DecoderConfig(blocks=2, experts=ExpertsConfig(routed=4, dense_blocks=2)),
            r"experts\.dense_blocks: must be below blocks=2",
        ),
        (lambda: DecoderConfig(vocabulary=0), "vocabulary: must be at least 1"),
        (lambda: AttentionConfig(heads=0), "heads: must be at least 1"),
        (lambda: AttentionConfig(rotary_size=3), "rotary_size: must be even"),
    ],
)
def test_invalid_sizes(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize("kind", ["residual", "mhc"])
def test_no_document_leaks_over_a_boundary(kind):
    """Changing one document moves no logit of another, though they share a sequence."""
    model = Decoder(SMALL, ConnectionConfig(kind=kind, phi_std=0.5))
    tokens = torch.randint(0, 50, (2, 9))
    documents = torch.tensor([[3, 3, 3, 4, 4, 4, 4, 7, 7], [1, 1, 1, 1, 1, 1, 2, 2, 2]])
    before = model(tokens, documents)
    for row, document in ((0, 3), (0, 4), (0, 7), (1, 1), (1, 2)):
        own = documents[row] == document
        changed = tokens.clone()
        changed[row, own] = (changed[row, own] + 1) % 50
        after = model(changed, documents)
        assert torch.equal(after[row, ~own], before[row, ~own])
        assert (after[row, own] - before[row, own]).abs().amax(-1).min() > 0
    unmasked = model(tokens)
    assert (unmasked[0, 3:] - before[0, 3:]).abs().amax(-1).min() > 0
    torch.testing.assert_close(unmasked[0, :3], before[0, :3])


def test_a_document_reads_as_if_it_stood_alone():
    """Positions are relative, so it does not matter where in the sequence it begins."""
    model = Decoder(SMALL, ConnectionConfig())
    tokens = torch.randint(0, 50, (1, 9))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(model(tokens, documents)[:, 3:], model(tokens[:, 3:]))


def test_streams_take_autocasts_dtype():
    model = Decoder(SMALL, ConnectionConfig())
    seen = []
    model.stack.connections[2].maps.register_forward_hook(lambda *call: seen.append(call[2].x))
    tokens = torch.randint(0, 50, (2, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
    assert seen[0].dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(tokens), rtol=0.1, atol=0.05)
