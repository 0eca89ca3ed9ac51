import resource

import pytest
import torch

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError
from manifold_hc.models import Decoder, count_parameters
from manifold_hc.training import PRESETS, RunConfig, preset
from manifold_hc.training.optimizer import learning_rate

PAPER = {
    "3b": ("612.33M", "2.9729B", "331M", 30_000, 320, 8.6e-4, "39.3B"),
    "9b": ("1660.66M", "9.1785B", "496M", 50_000, 512, 5.9e-4, "105B"),
    "27b": ("4138.87M", "27.048B", "662M", 50_000, 1280, 4.0e-4, "262B"),
    "3b-long": ("612.33M", "2.9729B", "331M", 100_000, 2560, 9.0e-4, "1.05T"),
}


def built(config):
    with torch.device("meta"):
        return Decoder(config.model, config.connection)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_to_every_printed_digit(name):
    active, total, vocabulary, steps, batch, lr, tokens = PAPER[name]
    config = preset(name)
    assert (config.connection.kind, config.connection.streams) == ("mhc", 4)
    count = count_parameters(built(config))
    assert f"{count.active / 1e6:.2f}M" == active
    assert f"{count.total / 1e9:.5g}B" == total
    assert f"{count.vocabulary / 1e6:.0f}M" == vocabulary
    training = config.training
    assert (training.steps, training.batch, config.optimizer.lr) == (steps, batch, lr)
    seen = steps * batch * config.data.sequence
    assert f"{seen / 1e12:.2f}T" == tokens if seen > 1e12 else f"{seen / 1e9:.3g}B" == tokens


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipe(name):
    config = preset(name)
    optimizer, model = config.optimizer, config.model
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.95), 1e-20, 0.1)
    assert (optimizer.warmup, optimizer.schedule, model.norm_eps) == (2000, "step", 1e-20)
    assert (config.connection.alpha, config.connection.iterations) == (0.01, 20)
    assert (model.experts.active, model.experts.shared, model.experts.dense_blocks) == (6, 2, 1)
    assert model.feed_forward == 8 * model.experts.width
    attention = model.attention
    assert (attention.head_size, attention.rotary_size, attention.latent_size) == (128, 64, 512)
    assert (attention.theta, config.data.sequence, model.vocabulary) == (10000.0, 4096, 129280)


def test_the_learning_rate_of_27b():
    config = preset("27b")
    rates = [learning_rate(s, 50_000, config.optimizer) for s in (0, 1999, 2000, 40_000, 45_000)]
    assert rates == pytest.approx([2e-7, 4e-4, 4e-4, 1.264e-4, 4e-5])


def test_mhc_adds_96_c_plus_27_parameters_a_sublayer():
    config = preset("27b")
    with torch.device("meta"):
        residual = Decoder(config.model, ConnectionConfig(kind="residual"))
    added = count_parameters(built(config)).total - count_parameters(residual).total
    assert added == 60 * (96 * 2560 + 27)
    assert f"{added / 1e6:.1f}M" == "14.7M"


def test_small_presets():
    assert preset("tiny") == RunConfig()
    assert 95e6 < count_parameters(built(preset("small"))).total < 105e6
    assert preset("tiny-moe").model.experts.routed > 0
    with pytest.raises(ConfigError, match="must be one of tiny, tiny-moe, small, 3b"):
        preset("70b")


def test_the_dry_run_of_the_largest_preset_allocates_no_weights(capsys):
    from manifold_hc.cli.dry_run import show_plan

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    show_plan(PRESETS["27b"])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000, "kilobytes; the weights are 108 GB"
    printed = " ".join(capsys.readouterr().out.split())
    for figure in (
        "active parameters 4.14B 4,138,873,940",
        "total parameters 27.0B 27,048,293,460",
        "vocabulary parameters 662M 661,913,600",
        "tokens 262B 50,000 steps of 1,280 sequences of 4,096",
        "learning rate at step 0 2e-07",
        "learning rate at step 2000 0.0004",
        "learning rate at step 40000 0.0001264",
        "learning rate at step 45000 4e-05",
    ):
        assert figure in printed


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (12, "12"), (999, "999"), (1000, "1.00K"), (27_048_293_460, "27.0B"),
     (2_972_931_976, "2.97B"), (612_325_256, "612M"), (1_048_576_000_000, "1.05T"),
     (999_999, "1.00M"), (104_857_600_000, "105B"), (30_000, "30.0K")],
)  # fmt: skip
def test_three_digits(count, text):
    from manifold_hc.cli.dry_run import short

    assert short(count) == text
