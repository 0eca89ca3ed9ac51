"""The table of peers, and hyper-connections' parameter layout in terms of ours."""

from dataclasses import replace

import torch

from manifold_hc import functional
from manifold_hc.bench import peers
from manifold_hc.bench.peers.implementations import without_branch
from manifold_hc.bench.problem import Problem
from manifold_hc.bench.task import quiet


def test_hyper_connections_is_ours_on_streams_of_equal_size():
    """One projection of each stream is a block of the joint one; its res is ours transposed."""
    n, C = 3, 32
    problem = Problem(tokens=8, streams=n, channels=C)
    inputs = problem.inputs()
    x = torch.nn.functional.rms_norm(inputs.x, (C,), eps=0.0)
    with quiet():
        connect, _ = peers.adapters.hyper_connections(problem, inputs)
        u, new = without_branch(connect)(x, inputs.y)
    own = n**0.5 * torch.cat([inputs.phi[:1, :C], inputs.phi[n : n + 1, :C]])
    mixing = n**0.5 * inputs.phi[2 * n : 3 * n, :C]
    eye = torch.eye(n)
    blocks = [torch.kron(eye, row) for row in own[:, None]]
    blocks.append(torch.stack([torch.kron(eye[s], mixing[t]) for s in range(n) for t in range(n)]))
    pre, post, res = functional.coefficients(x, torch.cat(blocks), inputs.alpha, inputs.bias)
    assert torch.allclose(functional.read(x, pre), u, atol=1e-5)
    assert torch.allclose(functional.write(x, inputs.y, post, res.mT), new, atol=1e-5)


def test_inputs_are_reproducible():
    problem = Problem(tokens=4, channels=16)
    for a, b in zip(problem.inputs(), replace(problem).inputs(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(problem.inputs(1).x, problem.inputs(0).x)


def test_a_missing_package_has_no_version():
    assert peers.Peer("no-such-distribution", peers.adapters.transformers).version is None


def test_peers_of_a_device_and_dtype():
    def names(**changes):
        return [peer.package for peer in peers.for_problem(Problem(**changes))]

    assert names() == ["transformers", "hyper-connections"]
    everywhere = ["transformers", "hyper-connections", "liger-kernel"]
    assert names(device="cuda") == everywhere
    assert names(device="cuda", streams=3) == everywhere[:2]
    assert names(device="cuda:1", dtype="bfloat16") == [*everywhere, "tile-kernels"]


def test_gpu_peers_are_not_imported_on_a_cpu():
    import subprocess
    import sys

    code = (
        "import sys, manifold_hc.bench.ops, manifold_hc.verify;"
        "print([m for m in ('liger_kernel', 'tile_kernels', 'triton', 'transformers',"
        "'hyper_connections') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == "[]\n", answer.stderr
