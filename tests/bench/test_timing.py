"""Turns, threads and ratios, with invented seconds."""

import pytest
import torch

from manifold_hc.bench.measure import timing as m
from manifold_hc.bench.ops import fastest
from manifold_hc.bench.task import Task, leaf


def recorder(name, calls, seconds):
    """A run that takes `seconds[number of threads]`."""

    def run():
        calls.append((name, torch.get_num_threads()))
        return seconds.get(torch.get_num_threads(), 1.0), 0.0

    return run


def test_runs_take_turns():
    calls = []
    runs = [recorder(name, calls, {}) for name in "abc"]
    samples = m.alternate(runs, 4)
    assert [name for name, _ in calls] == list("abccba") * 2
    assert [len(mine) for mine in samples] == [4, 4, 4]


def test_each_has_its_own_best_number_of_threads():
    before, calls = torch.get_num_threads(), []
    one, two = {1: 1.0, 2: 3.0}, {1: 3.0, 2: 1.0}
    runs = [recorder("one", calls, one), recorder("two", calls, two)]
    rows = [m.Timing(), m.Timing()]
    m.measure(list(zip(rows, runs, strict=True)), 5, [[1, 2], [1, 2]])
    assert [row.threads for row in rows] == [1, 2]
    assert sorted(calls[-10:]) == [("one", 1)] * 5 + [("two", 2)] * 5
    assert [(row.totals, row.total) for row in rows] == [([1.0] * 5, 1.0)] * 2
    assert torch.get_num_threads() == before


def test_compiled_code_has_its_threads_built_in():
    everything = torch.get_num_threads()
    assert m.thread_counts("cpu", compiled=True) == [everything]
    assert m.thread_counts("cpu") == sorted({1, everything})
    assert m.thread_counts("cuda") == [everything]


def test_every_run_has_new_gradients():
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
    assert len(sample) == 2


@pytest.mark.usefixtures("unchecked")
def test_gpu_seconds_are_those_between_events(monkeypatch):
    now = iter([10.0, 13.0, 18.0])  # milliseconds

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    calls = []
    seconds = m.call_seconds(torch.device("cuda"), lambda: calls.append(1), lambda: calls.append(2))
    assert (seconds, calls) == ([0.003, 0.005], [1, 2])


def test_seconds_of_one_pass_of_several(monkeypatch):
    monkeypatch.setattr(m, "call_seconds", lambda device, *calls: [4.0, 8.0])
    task = Task(lambda: (), (), (torch.ones(3),))
    assert m.timed(task, passes=4)() == [1.0, 2.0]


def test_ratios_compare_medians_of_timed_rows(ops_result):
    assert (ops_result.ours.implementation, ops_result.ours.total) == ("cpu", 2.0)
    assert ops_result.fastest_peer.implementation == "eager, compiled"
    assert ops_result.fastest_eager_peer.implementation == "eager"
    assert ops_result.fastest_peer.total / ops_result.ours.total == 2.5
    assert ops_result.fastest_eager_peer.total / ops_result.ours.total == 5.0
    assert fastest(row for row in ops_result.rows if row.state == "wrong") is None
