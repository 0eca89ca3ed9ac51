"""Expert parallelism gives the losses and expert choices of one process."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from manifold_hc.errors import ConfigError
from manifold_hc.parallel import ParallelConfig
from manifold_hc.parallel import experts as exchange
from tests.parallel.layouts import (
    ExpertChoices,
    distributed,
    figures,
    layouts,
    run,
    with_microbatches,
)
from tests.parallel.ranks import run_on_ranks
from tests.training import runs

EXPERTS = runs.with_experts(runs.config(probe_every=1))
NARROW = [{"shard": 2, "experts": 2}]
WIDE = [
    {"shard": 4, "experts": 2},
    {"shard": 4, "experts": 4},
    {"replicate": 2, "shard": 2, "experts": 2},
    {"tensor": 2, "experts": 2},
    {"shard": 2, "tensor": 2, "experts": 4},
]
STEPS = 19
"""Steps with recorded choices: all but the first."""


def choices_and_sent_share(config, folder):
    """Chosen experts [step, N, K] of the local tokens, and the share sent to other ranks."""
    rows = [0, 0]
    send = exchange._all_to_all

    def counted(tensor, coming, going, group):
        rows[0] += sum(going) - going[dist.get_rank(group)]
        rows[1] += sum(going)
        return send(tensor, coming, going, group)

    exchange._all_to_all = counted
    choices = ExpertChoices()
    run(config, folder, [lambda probe: choices])
    return torch.stack(choices.chosen).numpy(), rows[0] / rows[1]


def concatenated(answers, parallel):
    """Concatenate the choices [step, B, T, K] of all ranks along B and T."""
    T = EXPERTS.data.sequence // parallel.tensor
    slices = [torch.from_numpy(made).unflatten(1, (-1, T)) for made, _ in answers]
    rows = [
        slices[first : first + parallel.tensor] for first in range(0, len(slices), parallel.tensor)
    ]
    return torch.cat([torch.cat(row, 2) for row in rows], 1)


def flips(found, wanted):
    """Describe the tokens whose chosen experts differ from those in one process."""
    return "\n".join(
        f"step {step + 1}, sequence {row}, token {token}: visits "
        f"{found[step, row, token].tolist()} instead of {wanted[step, row, token].tolist()}"
        for step, row, token in (found != wanted).any(-1).nonzero().tolist()
    )


@pytest.mark.parametrize("degrees", layouts(NARROW, WIDE))
def test_every_layout(degrees, tmp_path):
    config = distributed(EXPERTS, **degrees)
    answers = run_on_ranks(
        config.parallel.size, choices_and_sent_share, config, tmp_path / "together"
    )
    assert min(share for _, share in answers) > 0.25
    alone = ExpertChoices()
    run(
        with_microbatches(EXPERTS, config.parallel.dp_size),
        tmp_path / "alone",
        [lambda probe: alone],
    )
    T = EXPERTS.data.sequence
    wanted = torch.stack(alone.chosen).unflatten(0, (STEPS, -1)).unflatten(2, (-1, T)).flatten(1, 2)
    told = flips(concatenated(answers, config.parallel), wanted)
    there, here = figures(tmp_path / "together"), figures(tmp_path / "alone")
    assert there["losses"] == pytest.approx(here["losses"], rel=1e-5), told
    assert there["validation"] == pytest.approx(here["validation"], rel=1e-5), told
    assert there["norms"] == pytest.approx(here["norms"], rel=2e-4), told


@pytest.mark.wide
def test_the_layout_may_change(tmp_path):
    """Checkpoints of sharded experts load in other layouts, and the reverse."""
    from tests.parallel.test_checkpoints_distributed import stopped_after

    folder = tmp_path / "moving"
    order = [
        {"shard": 2, "experts": 2},
        {"shard": 4, "experts": 2},
        {},
        {"tensor": 2, "experts": 2},
    ]
    for number, degrees in enumerate(order, start=1):
        here = distributed(EXPERTS, **degrees) if degrees else with_microbatches(EXPERTS, 4)
        size = here.parallel.size
        assert (
            run_on_ranks(size, stopped_after, 4 * number - 1, here, folder)
            == [(4 * number, True)] * size
        )
    run_on_ranks(4, run, distributed(EXPERTS, shard=4, experts=4), folder)
    run(with_microbatches(EXPERTS, 4), tmp_path / "calm")
    found, wanted = figures(folder), figures(tmp_path / "calm")
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)


def test_degrees_that_do_not_divide():
    with pytest.raises(ConfigError, match=r"^experts: must divide shard x tensor = 4 but is 3$"):
        ParallelConfig(shard=4, experts=3)
    message = r"^parallel.experts: must divide model.experts.routed=%s but is %s$"
    with pytest.raises(ConfigError, match=message % (0, 2)):
        replace(runs.config(), parallel=ParallelConfig(shard=2, experts=2))
    wide = replace(EXPERTS, training=replace(EXPERTS.training, batch=8))
    with pytest.raises(ConfigError, match=message % (4, 8)):
        replace(wide, parallel=ParallelConfig(shard=8, experts=8))
