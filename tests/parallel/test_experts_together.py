"""Experts that several processes share: tokens travel, and nothing else changes."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from manifold_hc.errors import ConfigError
from manifold_hc.parallel import ParallelConfig
from manifold_hc.parallel import experts as exchange
from tests.parallel.groups import together
from tests.parallel.sharing import Choices, figures, in_pieces, layouts, run, shared
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
"""Those after the first one, in which the choices are not looked at yet."""


def travelled(config, folder):
    """Choices of this process's tokens [step, N, K], and the share of visits elsewhere."""
    rows = [0, 0]
    send = exchange._all_to_all

    def counted(tensor, coming, going, group):
        rows[0] += sum(going) - going[dist.get_rank(group)]
        rows[1] += sum(going)
        return send(tensor, coming, going, group)

    exchange._all_to_all = counted
    choices = Choices()
    run(config, folder, [lambda probe: choices])
    return torch.stack(choices.made).numpy(), rows[0] / rows[1]


def side_by_side(answers, parallel):
    """Choices [step, B, T, K] of processes, each of which has a part of B and a part of T."""
    T = EXPERTS.data.sequence // parallel.tensor
    parts = [torch.from_numpy(made).unflatten(1, (-1, T)) for made, _ in answers]
    rows = [
        parts[first : first + parallel.tensor] for first in range(0, len(parts), parallel.tensor)
    ]
    return torch.cat([torch.cat(row, 2) for row in rows], 1)


def flips(found, wanted):
    """Where a token visits other experts than in one process."""
    return "\n".join(
        f"step {step + 1}, sequence {row}, token {token}: visits "
        f"{found[step, row, token].tolist()} instead of {wanted[step, row, token].tolist()}"
        for step, row, token in (found != wanted).any(-1).nonzero().tolist()
    )


@pytest.mark.parametrize("degrees", layouts(NARROW, WIDE))
def test_every_layout(degrees, tmp_path):
    config = shared(EXPERTS, **degrees)
    answers = together(config.parallel.size, travelled, config, tmp_path / "together")
    assert min(share for _, share in answers) > 0.25
    alone = Choices()
    run(in_pieces(EXPERTS, config.parallel.dp_size), tmp_path / "alone", [lambda probe: alone])
    T = EXPERTS.data.sequence
    wanted = torch.stack(alone.made).unflatten(0, (STEPS, -1)).unflatten(2, (-1, T)).flatten(1, 2)
    told = flips(side_by_side(answers, config.parallel), wanted)
    there, here = figures(tmp_path / "together"), figures(tmp_path / "alone")
    assert there["losses"] == pytest.approx(here["losses"], rel=1e-5), told
    assert there["validation"] == pytest.approx(here["validation"], rel=1e-5), told
    assert there["norms"] == pytest.approx(here["norms"], rel=2e-4), told


@pytest.mark.wide
def test_the_layout_may_change(tmp_path):
    """Checkpoints of experts that were shared are read by others, and the other way round."""
    from tests.parallel.test_checkpoints_together import stopped_after

    folder = tmp_path / "moving"
    order = [
        {"shard": 2, "experts": 2},
        {"shard": 4, "experts": 2},
        {},
        {"tensor": 2, "experts": 2},
    ]
    for number, degrees in enumerate(order, start=1):
        here = shared(EXPERTS, **degrees) if degrees else in_pieces(EXPERTS, 4)
        size = here.parallel.size
        assert (
            together(size, stopped_after, 4 * number - 1, here, folder)
            == [(4 * number, True)] * size
        )
    together(4, run, shared(EXPERTS, shard=4, experts=4), folder)
    run(in_pieces(EXPERTS, 4), tmp_path / "calm")
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
