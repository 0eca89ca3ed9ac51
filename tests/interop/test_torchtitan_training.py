"""torchtitan's own program trains our model on a CPU; see `torchtitan_cpu` for what is replaced."""

from importlib.util import find_spec

import pytest

from tests.interop.torchtitan_runs import OURS, TINY, Run, train

pytestmark = pytest.mark.skipif(
    find_spec("torchtitan") is None, reason="needs torchtitan 0.3.0: see docs/torchtitan.md"
)

KINDS = ("residual", "hc", "mhc")
EXACT = "--training.mixed_precision_param float32 --debug.moe_force_load_balance"
"""Settings under which sums in another order change nothing but the last digits."""


def test_debug_runs_start_as_torchtitans_own_and_learn(tmp_path):
    steps = "--training.steps 6 --training.local_batch_size 4"
    saved = "--checkpoint.enable --checkpoint.interval 4"
    own, residual, hc, mhc, resumed = train(
        tmp_path,
        Run("own", "--module deepseek_v3 --config deepseek_v3_debugmodel "
            f"{steps.replace('6', '1')} --parallelism.spmd_backend partial_dtensor"),
        Run("residual", f"{OURS} deepseek_v3_residual_debug {steps}"),
        Run("hc", f"{OURS} deepseek_v3_mhc_debug {steps} --connection.kind hc"),
        Run("mhc", f"{OURS} deepseek_v3_mhc_debug {steps} {saved}"),
        Run("resumed", f"{OURS} deepseek_v3_mhc_debug {steps} {saved} --checkpoint.load_step 4"),
    )  # fmt: skip
    # bfloat16 products: the same weights, and sums in another order for hc and mhc.
    assert own.records[0][0] == residual.records[0][0]
    for kind in (hc, mhc):
        assert kind.column("loss")[0] == pytest.approx(own.column("loss")[0], rel=1e-3)
        assert kind.column("loss") != residual.column("loss")
    for kind in (residual, hc, mhc):
        assert kind.column("loss")[-1] < kind.column("loss")[0] - 3
    assert resumed.column("step") == [5, 6]
    assert resumed.records[0] == mhc.records[0][4:]


def test_stages_and_shards_train_as_one_process(tmp_path):
    def run(name, args, ranks=1):
        args = f"{TINY} {EXACT} --training.steps 4 --checkpoint.enable {args}"
        return Run(name, args, ranks, float32_experts=True)

    whole, half = "--training.local_batch_size 4", "--training.local_batch_size 2"
    # Every rank draws initial weights of its own: all load those of one process.
    load = "--checkpoint.load_only --checkpoint.load_step 0"
    pipeline = f"{load} {whole} --parallelism.pipeline_parallel_degree 2"
    schedule = "--parallelism.pipeline_parallel_schedule"
    _, one, forward_backward, interleaved, interwoven, sharded, experts = train(
        tmp_path,
        run("seed", "--checkpoint.create_seed_checkpoint"),
        run("one", f"{load} {whole}"),
        run("1f1b", pipeline, ranks=2),
        run("interleaved", f"{pipeline} {schedule} Interleaved1F1B", ranks=2),
        run("interwoven", f"{load} {whole} --dataloader.dataset_path interleaved"),
        run("sharded", f"{load} {half}", ranks=2),
        run("experts", f"{load} {half} --parallelism.expert_parallel_degree 2", ranks=2),
    )
    for expected, splits in (
        (one, (forward_backward, interleaved)),
        (interwoven, (sharded, experts)),
    ):
        for split in splits:
            assert split.column("loss") == pytest.approx(expected.column("loss"), rel=2e-6)
            assert split.column("norm") == pytest.approx(expected.column("norm"), rel=2e-6)


@pytest.mark.slow
def test_compiled_and_checkpointed_blocks_train_as_plain_ones(tmp_path):
    base = f"{TINY} --training.steps 3 --training.local_batch_size 2"
    compiled = "--compile.enable --compile.components model --compile.backend aot_eager"
    plain, *others = train(
        tmp_path,
        Run("plain", f"{base} activation_checkpoint:none"),
        Run("selective", base),
        Run("full", f"{base} activation_checkpoint:full"),
        Run("compiled", f"{base} {compiled}"),
        Run("single", f"{base} --connection.numerics deepseek_v41 activation_checkpoint:full"),
    )
    *same, single = others
    for run in same:
        assert run.column("loss") == plain.column("loss")
        assert run.column("norm") == plain.column("norm")
    assert single.column("loss") == pytest.approx(plain.column("loss"), rel=1e-2)
