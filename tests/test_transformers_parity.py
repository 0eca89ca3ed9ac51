"""Against an implementation we did not write: transformers' DeepSeek-V4, on random weights."""

import pytest
import torch

from manifold_hc import functional


@pytest.fixture(scope="module")
def deepseek():
    import warnings

    with warnings.catch_warnings(action="ignore"):
        from transformers.models.deepseek_v4 import configuration_deepseek_v4 as configuration
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling
    return configuration.DeepseekV4Config, modeling


def build(module, config, std):
    built = module(config)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, std)
    return built


def assert_close(ours, theirs):
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_connection(deepseek, n):
    Config, modeling = deepseek
    C = 24
    config = Config(hc_mult=n, hidden_size=C, num_hidden_layers=1)
    theirs = build(modeling.DeepseekV4HyperConnection, config, 0.5)
    x = torch.randn(2, 5, n, C)
    y = torch.randn(2, 5, C)
    cotangents = torch.randn(2, 5, C), torch.randn(2, 5, n, C)

    def gradients(u, new, leaves):
        loss = (cotangents[0] * u).sum() + (cotangents[1] * new).sum()
        return torch.autograd.grad(loss, leaves)

    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    post, comb, u = theirs(a)
    new = post.unsqueeze(-1) * b.unsqueeze(-2) + comb.transpose(-1, -2) @ a
    wanted = gradients(u, new, [a, b, theirs.fn, theirs.scale, theirs.base])

    c, d = x.clone().requires_grad_(), y.clone().requires_grad_()
    phi, alpha, bias = (
        t.detach().clone().requires_grad_() for t in (theirs.fn, theirs.scale, theirs.base)
    )
    pre, our_post, res = functional.coefficients(
        c, phi, alpha, bias, numerics="deepseek_v4", norm_eps=config.rms_norm_eps
    )
    our_u = functional.read(c, pre)
    our_new = functional.write(c, d, our_post, res)

    assert_close(our_post, post)
    assert_close(res, comb.transpose(-1, -2))
    assert_close(our_u, u)
    assert_close(our_new, new)
    for ours, other in zip(
        gradients(our_u, our_new, [c, d, phi, alpha, bias]), wanted, strict=True
    ):
        assert_close(ours, other)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_head(deepseek, n):
    Config, modeling = deepseek
    C = 24
    config = Config(hc_mult=n, hidden_size=C, num_hidden_layers=1)
    theirs = build(modeling.DeepseekV4HyperHead, config, 0.5)
    a = torch.randn(2, 5, n, C, requires_grad=True)
    c = a.detach().clone().requires_grad_()
    phi, alpha, bias = (
        t.detach().clone().requires_grad_() for t in (theirs.hc_fn, theirs.hc_scale, theirs.hc_base)
    )
    weights = functional.exit_coefficients(c, phi, alpha, bias, norm_eps=config.rms_norm_eps)
    ours, wanted = functional.collapse(c, weights), theirs(a)
    assert_close(ours, wanted)
    cotangent = torch.randn_like(wanted)
    for mine, other in zip(
        torch.autograd.grad(ours, [c, phi, alpha, bias], cotangent),
        torch.autograd.grad(wanted, [a, theirs.hc_fn, theirs.hc_scale, theirs.hc_base], cotangent),
        strict=True,
    ):
        assert_close(mine, other)


def test_the_presets_epsilons_are_those_of_transformers(deepseek):
    from manifold_hc.numerics import PRESETS

    Config, _ = deepseek
    config = Config()
    preset = PRESETS["deepseek_v4"]
    assert config.hc_eps == preset.hc_eps
    assert config.rms_norm_eps == preset.norm_eps
    assert config.hc_sinkhorn_iters == 20
