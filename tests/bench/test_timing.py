"""Turns, threads and ratios; never how long anything takes."""

import torch

from manifold_hc.bench.measure import timing as m
from manifold_hc.bench.ops import fastest
from manifold_hc.bench.task import Task, leaf


def recorder(name, calls, seconds):
    """A run that takes `seconds[number of threads]`."""

    def run():
        calls.append((name, torch.get_num_threads()))
        return m.Sample(seconds.get(torch.get_num_threads(), 1.0), 0.0)

    return run


def test_runs_take_turns():
    calls = []
    runs = [recorder(name, calls, {}) for name in "abc"]
    samples = m.alternate(runs, 4)
    assert [name for name, _ in calls] == list("abccba") * 2
    assert [len(mine) for mine in samples] == [4, 4, 4]


def test_each_has_its_own_best_number_of_threads():
    before, calls = torch.get_num_threads(), []
    alone, together = {1: 1.0, 2: 3.0}, {1: 3.0, 2: 1.0}
    runs = [recorder("alone", calls, alone), recorder("together", calls, together)]
    timings = m.measure(runs, [[1, 2], [1, 2]], 5)
    assert [timing.threads for timing in timings] == [1, 2]
    assert sorted(calls[-10:]) == [("alone", 1)] * 5 + [("together", 2)] * 5
    assert [len(timing.samples) for timing in timings] == [5, 5]
    assert torch.get_num_threads() == before


def test_compiled_code_has_its_threads_built_in():
    everything = torch.get_num_threads()
    assert m.thread_counts("cpu", compiled=True) == [everything]
    assert m.thread_counts("cpu") == sorted({1, everything})
    assert m.thread_counts("cuda") == [everything]


def test_gradients_are_fresh_every_time():
    weight = leaf(torch.ones(3))
    seen = []

    def forward():
        seen.append(weight.grad)
        return (2 * weight,)

    run = m.timed(Task(forward, (weight,), (torch.ones(3),)))
    for _ in range(3):
        sample = run()
    assert seen == [None] * 3
    assert weight.grad.tolist() == [2.0] * 3
    assert sample.total == sample.forward + sample.backward


def test_ratios_are_between_medians_of_rows_that_passed(ops_table):
    assert (ops_table.ours.implementation, ops_table.ours.total) == ("cpu", 2.0)
    assert ops_table.fastest_peer.implementation == "eager, compiled"
    assert ops_table.fastest_eager_peer.implementation == "eager"
    assert ops_table.fastest_peer.total / ops_table.ours.total == 2.5
    assert ops_table.fastest_eager_peer.total / ops_table.ours.total == 5.0
    assert fastest(row for row in ops_table.rows if row.state == "wrong") is None
