"""Theorems of the closed form, in float64 on random rows; each beside a control that must fail."""

import pytest
import torch
from conftest import literal_erase

from erasekit import closed_form
from erasekit.closed_form import ContextMap, solve, span

D, N, M = 24, 5, 3
LAYERS = (7, 24, 40)  # d_out of the weights


@pytest.fixture
def problem(generator):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "c": draw(N, D),
        "c_star": draw(N, D),
        "p": draw(M, D),
        "weights": [draw(out, D) for out in LAYERS],
        "scales": {"erase_scale": 0.7, "preserve_scale": 0.4, "lam": 0.3},
    }


def fitted(problem, **changes):
    q = {**problem, **changes}
    return solve(q["c"], q["c_star"], q["p"], **q["scales"])


def objective(new, weight, problem):
    e, p, lam = problem["scales"].values()
    erase = (problem["c"] @ new.T - problem["c_star"] @ weight.T).square().sum()
    keep = (problem["p"] @ new.T - problem["p"] @ weight.T).square().sum()
    return e * erase + p * keep + lam * (new - weight).square().sum()


def literal_layer(weight, problem):
    pairs = zip(problem["c"], problem["c_star"], strict=True)
    return literal_erase(weight, pairs, problem["p"], *problem["scales"].values())


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_gradient_of_the_objective_is_zero_at_the_answer(problem):
    t = fitted(problem).matrix()
    for weight in problem["weights"]:
        new = (weight @ t).requires_grad_()
        at_answer = torch.autograd.grad(objective(new, weight, problem), new)[0].norm()
        old = weight.clone().requires_grad_()
        at_start = torch.autograd.grad(objective(old, weight, problem), old)[0].norm()
        assert at_answer < 1e-12 * at_start


def test_any_step_away_costs_what_the_curvature_says(problem, generator):
    e, p, lam = problem["scales"].values()
    c, kept, weight = problem["c"], problem["p"], problem["weights"][0]
    new = weight @ fitted(problem).matrix()
    step = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    rise = objective(new + step, weight, problem) - objective(new, weight, problem)
    curvature = lam * torch.eye(D, dtype=torch.float64) + e * c.T @ c + p * kept.T @ kept
    assert torch.isclose(rise, torch.trace(step @ curvature @ step.T), rtol=1e-10)
    assert rise >= lam * step.square().sum()


def test_one_matrix_serves_all_layers(problem):
    t = fitted(problem)
    for weight in problem["weights"]:
        expected = literal_layer(weight, problem)
        assert relative(weight @ t.matrix(), expected) < 1e-10
        assert relative(t.apply_to_weight(weight), expected) < 1e-10
        assert relative(weight, expected) > 1e-2  # control: the edit does something


def test_equals_least_squares_on_the_stacked_system(problem):
    e, p, lam = (scale**0.5 for scale in problem["scales"].values())
    c, c_star, kept, weight = problem["c"], problem["c_star"], problem["p"], problem["weights"][0]
    rows = torch.cat([e * c, p * kept, lam * torch.eye(D, dtype=torch.float64)])
    values = torch.cat([e * c_star @ weight.T, p * kept @ weight.T, lam * weight.T])
    assert relative(weight @ fitted(problem).matrix(), torch.linalg.lstsq(rows, values).solution.T) < 1e-10


def test_tensor_targets_are_not_one_matrix(problem):
    """Control: the `tensor` technique of the authors' code depends on W and must not pass for a shared T."""
    c, c_star, kept = problem["c"], problem["c_star"], problem["p"]
    e, p, lam = problem["scales"].values()
    denominator = lam * torch.eye(D, dtype=torch.float64) + e * c.T @ c + p * kept.T @ kept
    maps = []
    for weight in problem["weights"][1:]:  # d_out >= d, so that W has a left inverse
        old, new = c @ weight.T, c_star @ weight.T
        unit = old / old.norm()
        values = new - (new * unit).sum() * unit
        numerator = lam * weight + e * values.T @ c + p * weight @ kept.T @ kept
        maps.append(torch.linalg.lstsq(weight, numerator @ torch.linalg.inv(denominator)).solution)
    assert relative(maps[0], maps[1]) > 1e-3


@pytest.mark.parametrize("n, m", [(1, 0), (5, 3), (20, 3), (21, 3), (30, 0), (40, 30)])
def test_both_ways_of_solving_agree(n, m, generator):
    """Fewer rows than d are solved at (n + m) x (n + m); the literal d x d system must say the same."""
    c, c_star = (torch.randn(n, D, generator=generator, dtype=torch.float64) for _ in range(2))
    p = torch.randn(m, D, generator=generator, dtype=torch.float64)
    gram = 0.3 * torch.eye(D, dtype=torch.float64) + 0.7 * c.T @ c + 0.4 * p.T @ p
    expected = torch.eye(D, dtype=torch.float64) + 0.7 * (c_star - c).T @ c @ torch.linalg.inv(gram)
    assert (
        relative(solve(c, c_star, p, erase_scale=0.7, preserve_scale=0.4, lam=0.3).matrix(), expected) < 1e-10
    )


def test_identity_when_the_target_is_the_source(problem):
    eye = torch.eye(D, dtype=torch.float64)
    assert torch.equal(fitted(problem, c_star=problem["c"]).matrix(), eye)
    assert not torch.allclose(fitted(problem).matrix(), eye)


def test_nothing_changes_without_erase_scale(problem):
    scales = {**problem["scales"], "erase_scale": 0.0}
    assert fitted(problem, scales=scales).rank == 0


def test_large_lam_leaves_the_weights_as_one_over_lam(problem):
    eye = torch.eye(D, dtype=torch.float64)
    moved = [
        float((fitted(problem, scales={**problem["scales"], "lam": lam}).matrix() - eye).norm())
        for lam in (1e0, 1e4, 1e6, 1e8)
    ]
    assert moved[0] > 0.1 and moved[3] < 1e-6
    assert moved[1] / moved[2] == pytest.approx(100, rel=0.02)
    assert moved[2] / moved[3] == pytest.approx(100, rel=0.02)


def test_exact_mapping_as_lam_goes_to_zero(problem):
    residual = [
        relative(
            solve(problem["c"], problem["c_star"], problem["p"], lam=lam).apply(problem["c"]),
            problem["c_star"],
        )
        for lam in (1e-1, 1e-3, 1e-5)
    ]
    assert residual[0] > 1e-3
    assert residual[0] / residual[1] == pytest.approx(100, rel=0.2)
    assert residual[1] / residual[2] == pytest.approx(100, rel=0.05)


def test_trade_off_is_monotone(problem):
    def residuals(**scales):
        t = fitted(problem, scales={**problem["scales"], **scales})
        c, p = problem["c"], problem["p"]
        return float((t.apply(c) - problem["c_star"]).norm()), float((t.apply(p) - p).norm())

    erased = [residuals(lam=lam)[0] for lam in (0.01, 0.1, 1.0, 10.0)]
    drifted = [residuals(preserve_scale=p)[1] for p in (0.01, 0.1, 1.0, 10.0)]
    assert erased == sorted(erased) and erased[0] < erased[-1]
    assert drifted == sorted(drifted, reverse=True) and drifted[0] > drifted[-1]


def test_drift_is_bounded_by_what_there_was_to_erase(problem):
    e, p, lam = problem["scales"].values()
    t = fitted(problem)
    for weight in problem["weights"]:
        budget = e * ((problem["c"] - problem["c_star"]) @ weight.T).square().sum()
        new = t.apply_to_weight(weight)
        assert p * (problem["p"] @ (new - weight).T).square().sum() <= budget
        assert lam * (new - weight).square().sum() <= budget


def test_rows_orthogonal_to_everything_stay(problem, generator):
    u = torch.randn(D, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([problem["c"], problem["p"]]).T).Q
    orthogonal = u - basis @ (basis.T @ u)
    t = fitted(problem)
    assert relative(t.apply(orthogonal), orthogonal) < 1e-12
    assert relative(t.apply(u), u) > 1e-3


def test_rank_is_at_most_the_number_of_rows(problem):
    t = fitted(problem)
    assert t.rank <= N
    singular = torch.linalg.svdvals(t.matrix() - torch.eye(D, dtype=torch.float64))
    assert (singular > 1e-9 * singular[0]).sum() == N
    repeated = fitted(problem, c=problem["c"].repeat(3, 1), c_star=problem["c_star"].repeat(3, 1))
    assert repeated.rank == 3 * N and repeated.compressed().rank == N


def test_order_and_repetition(problem, generator):
    t = fitted(problem).matrix()
    order = torch.randperm(N, generator=generator)
    assert (
        relative(fitted(problem, c=problem["c"][order], c_star=problem["c_star"][order]).matrix(), t) < 1e-12
    )
    assert relative(fitted(problem, c=problem["c"][order]).matrix(), t) > 1e-2  # control: pairs matter
    thrice = fitted(problem, p=problem["p"].repeat(3, 1)).matrix()
    scales = {**problem["scales"], "preserve_scale": 3 * problem["scales"]["preserve_scale"]}
    assert relative(thrice, fitted(problem, scales=scales).matrix()) < 1e-12
    scales = {name: 5 * value for name, value in problem["scales"].items()}
    assert relative(fitted(problem, scales=scales).matrix(), t) < 1e-12


def test_single_pair_determinant():
    c, c_star = (
        torch.randn(1, D, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2)
    )
    e, lam = 0.7, 0.3
    expected = (lam + e * (c @ c_star.T)) / (lam + e * (c @ c.T))
    t = solve(c, c_star, erase_scale=e, lam=lam)
    assert torch.isclose(torch.linalg.det(t.matrix()), expected.squeeze(), rtol=1e-12)


def test_composition_is_the_chained_edit(problem, generator):
    first = fitted(problem)
    second = fitted(problem, c=torch.randn(N, D, generator=generator, dtype=torch.float64))
    weight = problem["weights"][0]
    chained = second.apply_to_weight(first.apply_to_weight(weight))
    assert relative(first.compose(second).apply_to_weight(weight), chained) < 1e-12
    assert relative(second.compose(first).apply_to_weight(weight), chained) > 1e-3  # control: order matters


def test_inverse_undoes_the_map(problem):
    t, eye = fitted(problem), torch.eye(D, dtype=torch.float64)
    assert relative(t.compose(t.inverse()).matrix(), eye) < 1e-10
    assert relative(t.inverse().matrix(), torch.linalg.inv(t.matrix())) < 1e-10
    assert relative(t.matrix(), eye) > 1e-2


def test_singular_map_has_no_inverse():
    c = torch.zeros(1, D, dtype=torch.float64)
    c[0, 0] = 1.0
    t = ContextMap(-c.T, c.T)  # projects the first axis away
    with pytest.raises(ValueError, match="singular"):
        t.inverse()
    assert ContextMap(-0.5 * c.T, c.T).inverse().apply(0.5 * c).allclose(c)


def test_editing_weights_is_mapping_embeddings(problem, generator):
    t, x = fitted(problem), torch.randn(2, 9, D, generator=generator, dtype=torch.float64)
    for weight in problem["weights"]:
        assert relative(x @ t.apply_to_weight(weight).T, t.apply(x) @ weight.T) < 1e-12


def test_scaling_and_identity(problem):
    t, eye = fitted(problem), torch.eye(D, dtype=torch.float64)
    assert torch.equal(t.scaled(0.0).matrix(), eye)
    assert relative(t.scaled(0.5).matrix(), (t.matrix() + eye) / 2) < 1e-12
    assert torch.equal(ContextMap.identity(D).matrix(), eye)
    assert torch.equal(ContextMap.identity(D).compose(t).matrix(), t.matrix())
    assert ContextMap.identity(D).inverse().rank == 0


def test_compression_keeps_the_map(problem):
    both = fitted(problem).compose(fitted(problem))
    assert both.rank == 2 * N
    small = both.compressed()
    assert small.rank == N and small.nbytes == both.nbytes // 2  # the second map has the same rows
    assert relative(small.matrix(), both.matrix()) < 1e-13


def test_float32_rows_are_solved_in_float64(problem):
    rows = [problem[name].float() for name in ("c", "c_star", "p")]
    t = solve(*rows, **problem["scales"])
    assert t.left.dtype == torch.float64
    assert torch.equal(t.matrix(), solve(*(row.double() for row in rows), **problem["scales"]).matrix())
    assert t.apply(rows[0]).dtype == torch.float32
    assert t.apply_to_weight(problem["weights"][0].half()).dtype == torch.float16


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q: q["c"][0, 0].fill_(float("nan")), "sources holds NaN"),
        (lambda q: q["p"][0, 0].fill_(float("inf")), "preserved holds NaN or infinity"),
        (lambda q: q.update(c_star=q["c_star"][:2]), "one target row"),
        (lambda q: q.update(p=q["p"][:, :4]), "4 wide"),
        (lambda q: q.update(c=q["c"][0]), r"must be \(rows, d\)"),
        (lambda q: q.update(c=q["c"].long()), "floating-point"),
        (lambda q: q["scales"].update(lam=-1.0), "lam must be zero or positive"),
        (lambda q: q["scales"].update(erase_scale=float("nan")), "erase_scale must be"),
        (lambda q: q["scales"].update(lam=0.0), "singular"),
    ],
)
def test_bad_input_is_one_clear_error(problem, change, message):
    fitted(problem)  # control: good as it is
    change(problem)
    with pytest.raises(ValueError, match=message):
        fitted(problem)


def test_no_ridge_is_fine_when_the_rows_span_everything(generator):
    c = torch.randn(2 * D, D, generator=generator, dtype=torch.float64)
    t = torch.randn(D, D, generator=generator, dtype=torch.float64)
    assert relative(solve(c, c @ t.T, lam=0.0).matrix(), t) < 1e-10


def test_a_map_that_changes_nothing_lies_where_the_rows_do(monkeypatch):
    """On another device than the CPU, so that it composes with what was solved there; the control does not."""
    there = torch.zeros(N, D, dtype=torch.float64, device="meta")
    one = ContextMap(there.T, there.T)
    assert ContextMap.identity(D, there.device).compose(one).left.device == there.device
    with pytest.raises(RuntimeError, match="device"):
        ContextMap.identity(D).compose(one)
    monkeypatch.setattr(
        closed_form, "_checked", lambda name, value, like: value
    )  # reads values, and meta has none
    assert solve(there, there, erase_scale=0.0).left.device == there.device
    assert ContextMap.identity(D).left.device.type == "cpu"


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_repeated_rows_span_no_more_than_once_without_a_cut(size, generator):
    """Rounding is no direction, at any scale; the control: a weak row is one, unless the cut is above it."""
    rows = size * torch.randn(N, D, generator=generator, dtype=torch.float64)
    assert len(span(torch.cat([rows, rows, rows[:1] + rows[1:2]]), 0.0)) == N
    weak = 1e-9 * size * torch.randn(1, D, generator=generator, dtype=torch.float64)
    assert len(span(torch.cat([rows, weak]), 0.0)) == N + 1
    assert len(span(torch.cat([rows, weak]), 1e-6 * size)) == N
    assert len(span(torch.zeros(2, D), 0.0)) == 0
