import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from manifold_hc import constraints, functional
from manifold_hc.constraints import CONSTRAINTS, Constraint, ConstraintName, constraint
from manifold_hc.errors import ConfigError, ManifoldError
from manifold_hc.numerics import PRESETS, preset
from tests import oracle

DOUBLE = torch.float64
PAPER, V4 = PRESETS["paper"], PRESETS["deepseek_v4"]


def logits(*shape, std=1.0, dtype=DOUBLE):
    return std * torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn_is_the_papers_to_the_last_digit(n, iterations):
    matrix = logits(n, n, std=2)
    wanted = oracle.sinkhorn_paper(matrix, iterations)
    torch.testing.assert_close(
        constraints.sinkhorn(matrix, iterations, PAPER), wanted, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn_is_deepseeks_to_the_last_digit(n, iterations):
    matrix = logits(n, n, std=2)
    wanted = oracle.sinkhorn_v4(matrix, iterations, 1e-6).T
    torch.testing.assert_close(
        constraints.sinkhorn(matrix, iterations, V4), wanted, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_columns_last_is_rows_then_columns_to_the_last_digit(n, iterations):
    flat = logits(n * n, std=2)
    build = CONSTRAINTS["sinkhorn_columns"].build
    # The paper's loop on the transposed matrix takes rows first; V4's `comb` is used as it is.
    wanted = oracle.sinkhorn_paper(flat.view(n, n).T.contiguous(), iterations).T
    torch.testing.assert_close(build(flat, n, iterations, PAPER), wanted, rtol=1e-12, atol=1e-14)
    wanted = oracle.sinkhorn_v4(flat.view(n, n).T.contiguous(), iterations, 1e-6)
    torch.testing.assert_close(build(flat, n, iterations, V4), wanted, rtol=1e-12, atol=1e-14)


def test_columns_last_by_hand():
    """exp gives [[1, 2], [3, 2]]; rows first: [[1/3, 2/3], [3/5, 2/5]]; then columns."""
    flat = torch.tensor([1.0, 2.0, 3.0, 2.0], dtype=DOUBLE).log()
    wanted = torch.tensor([[5 / 14, 5 / 8], [9 / 14, 3 / 8]], dtype=DOUBLE)
    torch.testing.assert_close(CONSTRAINTS["sinkhorn_columns"].build(flat, 2, 1, PAPER), wanted)


def test_one_sinkhorn_iteration_by_hand():
    """exp gives [[1, 2], [3, 2]]; columns first: [[1/4, 1/2], [3/4, 1/2]]; then rows."""
    matrix = torch.tensor([[1.0, 2.0], [3.0, 2.0]], dtype=DOUBLE).log()
    wanted = torch.tensor([[1 / 3, 2 / 3], [3 / 5, 2 / 5]], dtype=DOUBLE)
    torch.testing.assert_close(constraints.sinkhorn(matrix, 1, PAPER), wanted)


def test_rows_are_exact_and_the_truncation_error_is_in_the_columns():
    res = constraints.sinkhorn(logits(2000, 4, 4, std=4), 20, PAPER)
    assert (res.sum(-1) - 1).abs().max() < 1e-14
    assert (res.sum(-2) - 1).abs().max() > 1e-3
    res = constraints.sinkhorn(logits(2000, 4, 4, std=4), 20, V4)
    assert (res.sum(-1) - 1).abs().max() < 2e-6
    assert (res.sum(-2) - 1).abs().max() > 1e-3


@pytest.mark.parametrize(("std", "low", "high"), [(1, 1e-7, 1e-5), (2, 3e-3, 4e-2), (4, 0.02, 0.1)])
def test_truncation_error_has_the_measured_size(std, low, high):
    res = constraints.sinkhorn(logits(20000, 4, 4, std=std), 20, PAPER)
    error = (res.sum(-2) - 1).abs().amax(-1).quantile(0.99)
    assert low < error < high


def test_a_row_or_column_far_below_the_rest_is_no_nan():
    for axis in (0, 1):
        matrix = torch.zeros(4, 4, requires_grad=True)
        shift = torch.zeros(4, 4).index_fill(axis, torch.tensor([2]), -120.0)
        res = constraints.sinkhorn(matrix + shift, 20, PAPER)
        torch.testing.assert_close(res, torch.full((4, 4), 0.25))
        res.square().sum().backward()
        assert matrix.grad.isfinite().all()


def test_streams_can_be_renamed():
    """Renaming streams before or after the projection is the same: a law of symmetric things."""
    matrix, order = logits(3, 4, 4), torch.tensor([2, 0, 3, 1])
    renamed = matrix[:, order][:, :, order]
    for numerics in (PAPER, V4):
        torch.testing.assert_close(
            constraints.sinkhorn(renamed, 20, numerics),
            constraints.sinkhorn(matrix, 20, numerics)[:, order][:, :, order],
        )


@pytest.mark.parametrize("numerics", [PAPER, V4], ids=lambda numerics: numerics.name)
@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_gradients_of_every_constraint(name, n, numerics):
    flat = logits(2, CONSTRAINTS[name].size(n)).requires_grad_()

    def build(flat):
        return CONSTRAINTS[name].build(flat, n, 5, numerics)

    if name == "identity" or not flat.numel():
        assert not build(flat).requires_grad or torch.equal(
            torch.autograd.grad(build(flat).sum(), flat)[0], torch.zeros_like(flat)
        )
        return
    assert gradcheck(build, flat)
    assert gradgradcheck(build, flat)


EXACT = ["identity", "permutation", "kronecker", "exact"]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("std", [0.1, 1, 4, 16])
def test_exact_constraints_are_exact(name, std):
    for n in (1, 2, 4):
        flat = logits(500, CONSTRAINTS[name].size(n), std=std)
        res = CONSTRAINTS[name].build(flat, n, 20, PAPER)
        assert res.shape == (500, n, n)
        assert (res.sum(-1) - 1).abs().max() < 1e-12
        assert (res.sum(-2) - 1).abs().max() < 1e-12
        assert (res >= 0).all()


def test_exact_is_where_sinkhorn_goes():
    matrix = logits(50, 4, 4)
    torch.testing.assert_close(
        constraints.exact(matrix), constraints.sinkhorn(matrix, 3000, PAPER), rtol=0, atol=1e-12
    )


def test_exact_of_a_scaled_matrix_is_the_matrix_itself():
    """[[.2, .8], [.8, .2]] with its rows scaled by 3 and 5 and its columns by 7 and 11."""
    wanted = torch.tensor([[0.2, 0.8], [0.8, 0.2]], dtype=DOUBLE)
    scaled = wanted * torch.tensor([[3.0], [5.0]]) * torch.tensor([[7.0, 11.0]])
    torch.testing.assert_close(constraints.exact(scaled.log()), wanted)


def test_exact_keeps_dtype_and_passes_nan_on():
    assert constraints.exact(logits(3, 3, dtype=torch.float32)).dtype == torch.float32
    assert constraints.exact(torch.full((2, 2), math.nan)).isnan().all()
    assert constraints.exact(torch.zeros(0, 4, 4)).shape == (0, 4, 4)


def test_exact_refuses_what_float64_cannot_hold():
    with pytest.raises(ManifoldError, match=r"exact: wanted row sums .* use constraint=.sinkhorn"):
        constraints.exact(logits(50, 4, 4, std=1e10))


def test_permutation_by_hand():
    """n = 3, all weight on the 4th permutation in lexicographic order, (1, 2, 0)."""
    flat = torch.full((6,), -800.0, dtype=DOUBLE)
    flat[3] = 0
    assert list(itertools.permutations(range(3)))[3] == (1, 2, 0)
    wanted = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=DOUBLE)
    torch.testing.assert_close(constraints.permutation(flat, 3), wanted)


def test_kronecker_by_hand():
    """First factor swaps (the most significant bit), second keeps: 0 1 2 3 -> 2 3 0 1."""
    flat = torch.tensor([-800.0, 0.0, 0.0, -800.0], dtype=DOUBLE)
    wanted = torch.eye(4, dtype=DOUBLE)[[2, 3, 0, 1]]
    torch.testing.assert_close(constraints.kronecker(flat, 4), wanted)


def test_unconstrained_is_the_logits_row_major():
    flat = torch.arange(4.0)
    assert CONSTRAINTS["none"].build(flat, 2, 20, PAPER).tolist() == [[0, 1], [2, 3]]
    assert CONSTRAINTS["none"].build(flat, 2, 20, V4).tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_initial_bias_is_at_or_near_the_identity(name):
    for n in (1, 2, 4):
        build = CONSTRAINTS[name]
        res = build.build(torch.tensor(build.initial(n)).double(), n, 20, PAPER)
        assert (res - torch.eye(n)).abs().max() < 0.15, "far from the identity"
        if name not in ("identity", "none") and n > 1:
            assert res[0, 1] > 1e-3, "saturated: no gradient"


def test_the_initial_sinkhorn_matrix_is_the_documented_one():
    res = constraints.sinkhorn(
        torch.tensor(CONSTRAINTS["sinkhorn"].initial(4)).view(4, 4), 20, PAPER
    )
    assert res[0, 1].item() == pytest.approx(0.0066, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 6), depth=st.integers(1, 5), std=st.floats(0.1, 3), seed=st.integers(0, 99))
def test_products_stay_doubly_stochastic(n, depth, std, seed):
    torch.manual_seed(seed)
    product = torch.eye(n, dtype=DOUBLE)
    for matrix in constraints.exact(logits(depth, n, n, std=std)):
        product = matrix @ product
    assert (product.sum(-1) - 1).abs().max() < 1e-11
    assert (product.sum(-2) - 1).abs().max() < 1e-11
    assert oracle.spectral_norm(product) <= 1 + 1e-11


def test_spectral_norm_is_bounded_by_the_sums():
    """||M||_2 <= sqrt(largest row sum x largest column sum), here for truncated Sinkhorn."""
    for matrix in constraints.sinkhorn(logits(200, 4, 4, std=4), 3, PAPER):
        bound = math.sqrt(float(matrix.sum(1).max() * matrix.sum(0).max()))
        assert oracle.spectral_norm(matrix) <= bound + 1e-12


def test_the_presets_differ_as_measured():
    matrix = logits(5000, 4, 4, std=1)
    paper = constraints.sinkhorn(matrix, 20, PAPER)
    v4 = constraints.sinkhorn(matrix.mT.contiguous(), 20, V4)
    assert 1e-6 < (paper - v4).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "n", "message"),
    [
        ("permutation", 6, "n <= 5 but n is 6"),
        ("kronecker", 6, "power of two but n is 6"),
        ("nothing", 4, "must be one of sinkhorn"),
    ],
)
def test_constraints_that_do_not_exist(name, n, message):
    with pytest.raises(ConfigError, match=message):
        constraints.constraint(name, n)


def test_presets_are_named_and_closed():
    with pytest.raises(ConfigError, match="must be one of paper, deepseek_v4"):
        preset("v3")
    with pytest.raises(ConfigError, match="hc_eps"):
        preset("paper", hc_eps=1e-6)
    assert preset("deepseek_v4", norm_eps=1e-5, hc_eps=1e-4).hc_eps == 1e-4


def test_the_rows_of_res_are_exact_in_both_presets():
    """Truncation after 20 iterations shows in the columns; without hc_eps both are one matrix."""
    logits = 4 * torch.randn(500, 4, 4, dtype=torch.float64)
    for numerics, exact in (("paper", 1e-14), ("deepseek_v4", 3e-6)):
        res = functional.sinkhorn(logits, numerics=numerics)
        assert (res.sum(-1) - 1).abs().max() < exact
        assert (res.sum(-2) - 1).abs().max() > 1e-2
    comb = functional.sinkhorn(logits.mT.contiguous(), numerics="deepseek_v4", hc_eps=0.0)
    torch.testing.assert_close(comb, functional.sinkhorn(logits), rtol=1e-12, atol=1e-14)


def test_names_are_those_of_the_table():
    assert get_args(ConstraintName) == tuple(CONSTRAINTS)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_row_is_all_that_a_new_constraint_needs(monkeypatch, backend):
    """Sizes, bounds, initial values and the reading of a sublayer follow from it."""
    average = Constraint(
        size=lambda n: 0,
        initial=lambda n: [],
        build=lambda logits, n, *_: logits.new_full((*logits.shape[:-1], n, n), 0.5),
        problem=lambda n: f"takes n = 2 but n is {n}" if n != 2 else None,
    )
    monkeypatch.setitem(CONSTRAINTS, "average", average)
    x, phi = torch.randn(3, 2, 8), torch.randn(4, 16)
    reading = functional.coefficients_and_read(
        x, phi, torch.ones(3), torch.zeros(4), constraint="average", backend=backend
    )
    assert torch.equal(reading.res, torch.full((3, 2, 2), 0.5))
    with pytest.raises(ConfigError, match="constraint: average takes n = 2 but n is 3"):
        constraint("average", 3)
