"""Memory that large results leave to the next ones."""

import gc
import threading

import pytest
import torch

import manifold_hc as mhc
from manifold_hc import functional
from manifold_hc.kernels import unsupported_reason
from manifold_hc.kernels.cpu import memory
from manifold_hc.kernels.cpu.memory import LARGE, PAGE, Blocks

NEEDS_KERNELS = pytest.mark.skipif(
    bool(unsupported_reason("cpu", 4, "cpu", [torch.float32])), reason="no CPU kernels here"
)

MEGABYTE = 1 << 20


@pytest.fixture
def blocks():
    return Blocks(limit=64 * MEGABYTE)


def large(blocks, megabytes=8):
    return blocks.tensor(torch.empty(0), (megabytes, MEGABYTE // 4))


def test_a_freed_block_serves_again(blocks):
    first = large(blocks)
    first.fill_(7)
    place = first.data_ptr()
    assert place % PAGE == 0
    del first
    assert blocks.kept() == 8 * MEGABYTE + PAGE
    again = large(blocks)
    assert (again.data_ptr(), blocks.kept()) == (place, 0)
    assert large(blocks).data_ptr() != place


def test_a_view_holds_its_block(blocks):
    view = large(blocks)[3].view(torch.int32)[5:9]
    view.fill_(1)
    gc.collect()
    assert blocks.kept() == 0
    other = large(blocks)
    other.zero_()
    assert view.tolist() == [1, 1, 1, 1]
    del view
    assert blocks.kept() > 0


def test_other_sizes_and_dtypes(blocks):
    tensor = large(blocks, 8)
    del tensor
    smaller = large(blocks, 6)
    assert blocks.kept() == 8 * MEGABYTE + PAGE
    # 7 MiB fill the same huge pages as 8.
    half = blocks.tensor(torch.empty(0, dtype=torch.bfloat16), (7, MEGABYTE // 2))
    assert (half.dtype, half.shape, blocks.kept()) == (torch.bfloat16, (7, MEGABYTE // 2), 0)
    assert smaller.shape == (6, MEGABYTE // 4)


def test_the_oldest_go_when_there_are_too_many(blocks):
    tensors = [large(blocks, megabytes) for megabytes in (30, 20, 10, 12)]
    while tensors:
        del tensors[0]
    assert blocks.kept() == (20 + 10 + 12) * MEGABYTE + 3 * PAGE
    blocks.release()
    assert blocks.kept() == 0
    tensor = large(blocks, 80)
    del tensor
    assert blocks.kept() == 0


def test_threads_do_not_share_a_block(blocks):
    wrong = []

    def work(number):
        for _ in range(200):
            tensor = large(blocks, 4)
            tensor[:, ::4096] = number
            if not (tensor[:, ::4096] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert blocks.kept() <= blocks.limit


@NEEDS_KERNELS
@pytest.mark.parametrize("tokens", [64, 2100])
def test_results_may_be_changed_in_place(tokens):
    """Large ones too: a branch changes u, a model the streams."""
    connection = mhc.Connection(512, mhc.ConnectionConfig(streams=4, backend="cpu"))

    def gradient(branch, change):
        x = torch.randn(tokens, 4, 512, generator=torch.Generator().manual_seed(1))
        out = connection(x.requires_grad_(), branch)
        change(out).square().sum().backward()
        return x.grad

    ours = gradient(torch.nn.ReLU(inplace=True), lambda out: out.mul_(2))
    assert torch.equal(ours, gradient(torch.nn.ReLU(), lambda out: out * 2))


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_what_was_there(monkeypatch, dtype):
    """Every large result is written over memory full of NaN, and equals the one without."""
    n, C, tokens = 4, 512, 2100
    assert tokens * C * dtype.itemsize >= LARGE or dtype == torch.bfloat16
    inputs = [torch.randn(tokens, n, C).to(dtype), torch.randn(24, n * C) / 40]
    inputs += [torch.ones(3), torch.randn(24), torch.randn(tokens, C).to(dtype)]

    def run():
        x, phi, alpha, bias, y = leaves = [t.clone().requires_grad_() for t in inputs]
        reading = functional.coefficients_and_read(x, phi, alpha, bias, backend="cpu")
        out = functional.write(x, y, reading.post, reading.res, "cpu", link=reading.link)
        loss = (out * out).sum() + reading.u.sum()
        return [out.detach(), reading.u.detach(), *torch.autograd.grad(loss, leaves)]

    monkeypatch.setattr(memory, "BLOCKS", Blocks(0))
    wanted = run()
    monkeypatch.setattr(memory, "BLOCKS", own := Blocks(1 << 30))
    for _ in range(2):
        got = run()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        del got
        gc.collect()
        assert own.kept() > 4 * LARGE
        for block in own._free:
            block[:] = b"\xff" * len(block)
