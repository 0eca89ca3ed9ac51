"""Mutation tests: the oracle detects every defect that is put into the reference.

Each mutant is a defect that makes two implementations of mHC disagree without an error.
"""

import pytest

from manifold_hc import constraints, reference
from tests.test_functional import check_against_oracle

WRITE, COEFFICIENTS = reference.write, reference.coefficients


def transposed_res(x, y, post, res):
    return WRITE(x, y, post, res.mT)


def swapped_order(logits, iterations, numerics):
    for _ in range(iterations):
        logits = logits.log_softmax(1).log_softmax(0)
    return logits.exp()


def swapped_order_v4(logits, iterations, numerics):
    eps = numerics.hc_eps
    comb = logits.softmax(0) + eps
    comb = comb / (comb.sum(1, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(0, keepdim=True) + eps)
        comb = comb / (comb.sum(1, keepdim=True) + eps)
    return comb.transpose(0, 1)


def epsilon_only_in_denominators(logits, iterations, numerics):
    eps = numerics.hc_eps
    comb = logits.softmax(1)
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return comb.transpose(0, 1)


def no_factor_two(*arguments):
    pre, post, res = COEFFICIENTS(*arguments)
    return pre, post / 2, res


def no_epsilon_on_pre(x, phi, alpha, bias, iterations, constraint, numerics):
    pre, post, res = COEFFICIENTS(x, phi, alpha, bias, iterations, constraint, numerics)
    return pre - numerics.hc_eps, post, res


def epsilon_outside_the_root(x, phi, norm_eps):
    v = x.flatten(-2)
    return (v @ phi.mT) / (v.square().mean(-1, keepdim=True).sqrt() + norm_eps)


MUTANTS = [
    ("paper", reference, "write", transposed_res),
    ("deepseek_v4", reference, "write", transposed_res),
    ("paper", constraints, "_sinkhorn_paper", swapped_order),
    ("deepseek_v4", constraints, "_sinkhorn_deepseek_v4", swapped_order_v4),
    ("paper", reference, "coefficients", no_factor_two),
    ("deepseek_v4", reference, "coefficients", no_factor_two),
    ("deepseek_v4", constraints, "_sinkhorn_deepseek_v4", epsilon_only_in_denominators),
    ("deepseek_v4", reference, "coefficients", no_epsilon_on_pre),
    ("deepseek_v4", reference, "project", epsilon_outside_the_root),
]


@pytest.mark.parametrize(
    ("numerics", "module", "name", "mutant"),
    MUTANTS,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_oracle_detects(monkeypatch, numerics, module, name, mutant):
    monkeypatch.setattr(module, name, mutant)
    with pytest.raises(AssertionError):
        check_against_oracle(3, numerics)


def test_the_oracle_accepts_the_reference():
    for numerics in ("paper", "deepseek_v4"):
        check_against_oracle(3, numerics)
