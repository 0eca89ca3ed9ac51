"""Logits with a cache are those of the whole sequence, and only new tokens are computed."""

import pytest
import torch

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ShapeError
from manifold_hc.models import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    ExpertsConfig,
    LatentCache,
    mixtures,
)
from manifold_hc.models.cache import read_context

V, B, T = 50, 2, 11

CONNECTIONS = {
    "residual": ConnectionConfig(kind="residual"),
    "hc": ConnectionConfig(kind="hc", phi_std=0.3),
    "mhc": ConnectionConfig(phi_std=0.3),
    "deepseek_v4": ConnectionConfig(numerics="deepseek_v4", phi_std=0.3),
    "single_pass": ConnectionConfig(numerics="deepseek_v4", single_pass=True, phi_std=0.3),
    "permutation": ConnectionConfig(constraint="permutation", streams=3, phi_std=0.3),
}


def decoder(connection=None, experts=None, **sizes):
    """A decoder whose attention depends visibly on position and content."""
    config = DecoderConfig(
        vocabulary=V,
        channels=24,
        blocks=2,
        feed_forward=40,
        init_std=0.3,
        attention=AttentionConfig(heads=3, head_size=8, rotary_size=4, latent_size=10, theta=50.0),
        experts=experts or ExpertsConfig(),
        **sizes,
    )
    return Decoder(config, connection or ConnectionConfig(phi_std=0.3)).eval()


def tokens(rows=B, length=T):
    return torch.randint(0, V, (rows, length))


@pytest.mark.parametrize("name", CONNECTIONS)
@pytest.mark.parametrize("steps", [[5, 1, 1, 4], [1] * T], ids=["chunks", "one by one"])
def test_the_logits_are_those_of_the_whole_sequence(name, steps):
    model = decoder(CONNECTIONS[name], ExpertsConfig(routed=4, width=16)).double()
    given = tokens()
    cache = LatentCache()
    made = torch.cat([model(part, cache=cache) for part in given.split(steps, 1)], 1)
    torch.testing.assert_close(made, model(given), rtol=1e-9, atol=1e-9)
    assert cache.length == T


def test_bfloat16_differs_by_rounding_only():
    model = decoder().to(torch.bfloat16)
    given = tokens()
    cache = LatentCache()
    made = torch.cat([model(part, cache=cache) for part in given.split(1, 1)], 1)
    assert made.dtype == torch.bfloat16
    wide = decoder().double()
    wide.load_state_dict(model.state_dict())
    wanted = wide(given)
    error = (made.double() - wanted).norm() / wanted.norm()
    assert error < 2 * (model(given).double() - wanted).norm() / wanted.norm()
    assert error < 0.05


def test_only_new_tokens_pass_a_branch_and_only_latents_are_kept():
    model = decoder()
    passed = []
    for branch in model.branches:
        branch.register_forward_pre_hook(lambda _, inputs: passed.append(inputs[0].shape[1]))
    decompressed = []
    model.branches[0].decompress.register_forward_hook(
        lambda _, __, out: decompressed.append(out.shape[1])
    )
    cache = LatentCache()
    for part in tokens().split([7, 1, 1, 2], 1):
        model(part, cache=cache)
    assert passed == [7] * 4 + [1] * 4 + [1] * 4 + [2] * 4
    assert decompressed == [7]
    assert cache.bytes == 2 * B * T * (10 + 4) * 4  # blocks, B, S, K + R, float32


@pytest.mark.parametrize("name", ["residual", "mhc", "single_pass"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(name, side):
    model = decoder(CONNECTIONS[name], ExpertsConfig(routed=4, width=16)).double()
    lengths = (3, T, 8)
    given = tokens(len(lengths))
    mask = torch.zeros(len(lengths), T, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, T - length :] = 1
    if side == "right":
        mask = mask.flip(1)
    made = model(given, mask=mask)
    other = model(torch.where(mask.bool(), given, (given + 1) % V), mask=mask)
    for row, length in enumerate(lengths):
        real = mask[row].bool()
        assert real.sum() == length
        torch.testing.assert_close(made[row, real], other[row, real], rtol=1e-12, atol=1e-12)
        alone = model(given[row : row + 1, real])
        torch.testing.assert_close(made[row, real], alone[0], rtol=1e-9, atol=1e-9)
    if side == "left":
        assert (model(given)[0, -1] - made[0, -1]).abs().max() > 1e-3  # the mask matters


@pytest.mark.parametrize("steps", [[T, 1, 1], [4, 7, 2], [1] * 13])
def test_a_padded_batch_goes_on_as_each_sequence_alone(steps):
    """Also in chunks, the first of which holds nothing but padding of some sequences."""
    model = decoder(CONNECTIONS["mhc"]).double()
    lengths = (3, T, 8)
    given = tokens(len(lengths), T + 2)
    mask = torch.ones_like(given)
    for row, length in enumerate(lengths):
        mask[row, : T - length] = 0
    cache, made, done = LatentCache(), [], 0
    for part in given.split(steps, 1):
        done += part.shape[1]
        made.append(model(part, mask=mask[:, :done], cache=cache))
    made = torch.cat(made, 1)
    assert made.isfinite().all()
    for row in range(len(lengths)):
        real = mask[row].bool()
        alone = model(given[row : row + 1, real])
        torch.testing.assert_close(made[row, real], alone[0], rtol=1e-9, atol=1e-9)


def test_every_token_has_a_key():
    """Padding too: kernels differ in the result of a row without one, which may be NaN."""
    model = decoder()
    cache = LatentCache()
    mask = torch.tensor([[0, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    model(tokens(length=2), mask=mask[:, :2], cache=cache)
    context, _ = read_context(tokens(length=3), None, mask, cache)
    wanted = [[[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]]
    wanted.append([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert context.visible.squeeze(1).long().tolist() == wanted
    assert context.positions.tolist() == [[0, 0, 0], [2, 3, 4]]


def test_rows_are_selected_as_beam_search_reorders_them():
    model = decoder().double()
    given = tokens(3)
    cache = LatentCache()
    model(given[:, :6], cache=cache)
    rows = torch.tensor([2, 0, 0])
    cache.select(rows)
    made = model(given[rows, 6:], cache=cache)
    torch.testing.assert_close(made, model(given[rows])[:, 6:], rtol=1e-9, atol=1e-9)


def test_the_last_logits_alone():
    model = decoder()
    given = tokens()
    whole = model(given)
    for last in (1, 3, T, T + 4):
        torch.testing.assert_close(model(given, last=last), whole[:, -last:])


def test_a_part_has_a_cache_of_its_own():
    """As a pipeline's stages do: streams go in and out, and `pre` with single_pass."""
    model = decoder(CONNECTIONS["single_pass"]).double()
    first, second = model.part(range(2)), model.part(range(2, 4))
    given = tokens()
    caches = LatentCache(), LatentCache()
    made = []
    for part in given.split([5, 1, 5], 1):
        x, pre = first(part, cache=caches[0])
        made.append(second(x, pre=pre, cache=caches[1]))
    torch.testing.assert_close(torch.cat(made, 1), model(given), rtol=1e-9, atol=1e-9)


def test_generation_leaves_the_balancing_alone():
    model = decoder(experts=ExpertsConfig(routed=4, width=16, balancing=0.1))
    cache = LatentCache()
    for part in tokens().split(1, 1):
        model(part, cache=cache)
    (mixture,) = mixtures(model).values()
    assert mixture.router.bias.count_nonzero() == 0
    assert mixture.router.load.count_nonzero() == 0


def test_gradients_pass_through_a_cache():
    model = decoder().double()
    given = tokens()

    def gradients(logits):
        return torch.autograd.grad(logits.square().sum(), [*model.branches.parameters()])

    cache = LatentCache()
    parts = [model(part, cache=cache) for part in given.split([6, 5], 1)]
    for made, wanted in zip(gradients(torch.cat(parts, 1)), gradients(model(given)), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.usefixtures("unchecked")
def test_invalid_calls():
    model = decoder()
    cache = LatentCache()
    model(tokens(), cache=cache)
    with pytest.raises(ShapeError, match=r"mask must be \[2, 12\], over 11 cached and 1 new"):
        model(tokens(length=1), mask=torch.ones(2, 1, dtype=torch.long), cache=cache)
    with pytest.raises(ShapeError, match="must be of 2 sequences, as the cached ones"):
        model(tokens(rows=3, length=1), cache=cache)
    with pytest.raises(ShapeError, match="documents go with neither mask nor cache"):
        model(tokens(), torch.zeros(B, T, dtype=torch.long), cache=LatentCache())
