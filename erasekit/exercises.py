"""Exercises of the notebooks: checks that take the student's function.

Each check raises AssertionError with a hint, or prints that all is well. A stub that gives nothing back is told so: it
does not pass, and the notebook goes on. Solutions are folded away in the notebooks, below the stubs.
"""

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor

from erasekit import closed_form
from erasekit.evaluate.metrics import rate


class Unsolved(Exception):
    """A function that gives nothing back."""


def exercise(check: Callable[[Callable], None]) -> Callable[[Callable], None]:
    """A check that takes an untouched stub for what it is."""

    @wraps(check)
    def checked(theirs: Callable) -> None:
        def answered(*given):
            if (found := theirs(*given)) is None or found is ...:
                raise Unsolved
            return found

        name = getattr(theirs, "__name__", "your function")
        try:
            check(answered)
        except Unsolved:
            print(f"{name}: not solved yet, it gives nothing back. Write its body, and run this cell again")

    return checked


@exercise
def check_target_rate(theirs: Callable[[Sequence[str], str], float]) -> None:
    """Notebook 00, exercise 1."""
    for shown, expected in ((["church"] * 3 + ["castle"], 0.75), (["dog", "cat"], 0.0), (["church"], 1.0)):
        found = theirs(shown, "church")
        assert abs(found - expected) < 1e-9, f"for {shown} the target rate is {expected}, yours is {found}"
    print("target_rate: all tests passed")


@exercise
def check_guidance(theirs: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Notebook 01, exercise 1."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, generator=generator) for _ in range(2))
    for w, expected, hint in ((0.0, a, "the unconditional prediction"), (1.0, b, "the text prediction")):
        assert torch.allclose(theirs(a, b, w), expected, atol=1e-6), f"guidance {w:g} should give {hint}"
    assert torch.allclose(theirs(a, b, 3.0), 3 * b - 2 * a, atol=1e-5), (
        "guidance 3 should extrapolate beyond the text"
    )
    print("guidance: all tests passed")


def add_noise(x_0: Tensor, noise: Tensor, abar: float) -> Tensor:
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) e."""
    return abar**0.5 * x_0 + (1 - abar) ** 0.5 * noise


@exercise
def check_add_noise(theirs: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Notebook 03, exercise 1."""
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(4, 1000, generator=generator, dtype=torch.float64) for _ in range(2))
    for abar, expected, hint in ((1.0, x_0, "the picture alone"), (0.0, noise, "the noise alone")):
        assert torch.allclose(theirs(x_0, noise, abar), expected), f"abar {abar:g} should give {hint}"
    for abar in (0.1, 0.5, 0.9):
        found = theirs(x_0, noise, abar)
        assert abs(float(found.var()) - 1) < 0.1, (
            f"picture and noise have variance 1, and so has x_t; at abar {abar:g} yours has {found.var():.2f}: "
            "shares of the variance, not of the numbers themselves, add up to 1"
        )
        assert torch.allclose(found, add_noise(x_0, noise, abar)), f"at abar {abar:g} it is not the formula's"
    print("add_noise: all tests passed")


def x0_from_eps(x_t: Tensor, eps: Tensor, abar: float) -> Tensor:
    """x_0 = (x_t - sqrt(1 - abar) e) / sqrt(abar): what is left of x_t without the noise e."""
    return (x_t - (1 - abar) ** 0.5 * eps) / abar**0.5


@exercise
def check_x0_from_eps(theirs: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Notebook 03, exercise 2."""
    generator = torch.Generator().manual_seed(0)
    x_0, noise, wrong = (torch.randn(4, 10, generator=generator, dtype=torch.float64) for _ in range(3))
    for abar in (0.01, 0.5, 1.0):
        x_t = add_noise(x_0, noise, abar)
        found = theirs(x_t, noise, abar)
        assert torch.allclose(found, x_0), (
            f"at abar {abar:g}, with the true noise, it should be x_0; yours is off by {(found - x_0).norm():.2g}"
        )
        again = add_noise(theirs(x_t, wrong, abar), wrong, abar)
        assert torch.allclose(again, x_t), (
            f"at abar {abar:g}, with the same noise added again, it should be x_t"
        )
    print("x0_from_eps: all tests passed")


@exercise
def check_one_pair_map(theirs: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Notebook 10, exercise 1."""
    generator = torch.Generator().manual_seed(0)
    for lam in (0.1, 1.0, 10.0):
        c, c_star = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        expected = closed_form.solve(c[None], c_star[None], lam=lam).matrix()
        found = theirs(c, c_star, lam)
        assert found.shape == (5, 5), f"T is (d, d), here (5, 5); yours is {tuple(found.shape)}"
        assert torch.allclose(found, expected), (
            f"with lam={lam} your T is off by {(found - expected).abs().max():.2g}"
        )
    print("one_pair_map: all tests passed")


@exercise
def check_derived_embedding(theirs: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Notebook 20, exercise 1."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    weight, t, c = draw(9, 4), torch.eye(4, dtype=torch.float64) + 0.3 * draw(4, 4), draw(4)
    gram = weight.T @ weight
    assert torch.allclose(theirs(t, gram, c, 0.0), torch.linalg.solve(t, c)), (
        "with lam=0 the edited model must see c itself: T c' = c"
    )
    for lam in (0.1, 10.0):
        found = theirs(t, gram, c, lam).clone().requires_grad_()
        loss = (weight @ t @ found - weight @ c).square().sum() + lam * found.square().sum()
        (slope,) = torch.autograd.grad(loss, found)
        assert slope.norm() < 1e-8, (
            f"with lam={lam} the objective still has a slope of {slope.norm():.2g} at your c'"
        )
    print("derived_embedding: all tests passed")


@exercise
def check_wilson_interval(theirs: Callable[[int, int], tuple[float, float]]) -> None:
    """Notebook 02, exercise 1."""
    for k, n in ((0, 50), (3, 151), (50, 50), (7, 10)):
        expected, found = rate(k, n), theirs(k, n)
        for end, one in zip(("low", "high"), found, strict=True):
            assert abs(one - expected[end]) < 1e-4, (
                f"{k}/{n}: the {end} end is {expected[end]}, yours is {one:.5f}"
            )
    print("wilson_interval: all tests passed")


@exercise
def check_simplex_projection(theirs: Callable[[Tensor], Tensor]) -> None:
    """Notebook 30, exercise 1."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 5.0):
        v = scale * torch.randn(6, generator=generator, dtype=torch.float64)
        found = theirs(v)
        assert (found >= 0).all() and abs(float(found.sum()) - 1) < 1e-8, "it is not on the simplex"
        corners = torch.eye(6, dtype=torch.float64)
        # nearest: no corner of the simplex lies on the far side of the residual
        assert ((corners - found) @ (v - found) < 1e-8).all(), (
            "a point of the simplex is nearer to v than yours"
        )
    print("simplex_projection: all tests passed")


@exercise
def check_esd_target(theirs: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Notebook 11, exercise 1."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, generator=generator) for _ in range(2))
    for eta, expected, hint in ((0.0, a, "the unconditional prediction"), (-1.0, b, "the text prediction")):
        assert torch.allclose(theirs(a, b, eta), expected, atol=1e-6), f"eta {eta:g} should give {hint}"
    assert torch.allclose(theirs(a, b, 1.0), 2 * a - b, atol=1e-6), "eta 1 should lead away from the text"
    print("esd_target: all tests passed")


@exercise
def check_linear_hinge(theirs: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Notebook 22, exercise 1."""
    generator = torch.Generator().manual_seed(0)
    x, safe, unsafe = (torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    mean = lambda a: a.square().flatten(1).mean(1)
    for margin in (0.0, 5.0):
        expected = (mean(x - safe) - mean(x - unsafe) + margin).relu()
        found = theirs(x, safe, unsafe, margin)
        assert found.shape == (4,), f"one number for each row, shape (4,); yours is {tuple(found.shape)}"
        assert torch.allclose(found, expected), (
            f"with margin {margin:g} it should be {expected}, yours is {found}"
        )
    at_safe = theirs(safe, safe, unsafe, 0.1)
    assert not at_safe.any(), "at the safe prediction, far from the unsafe one, there is nothing left to do"
    print("linear_hinge: all tests passed")


def fused_change(changes: Sequence[Tensor], keys: Sequence[Tensor], lam: float) -> Tensor:
    """sum_i dW_i C_i (sum_i C_i + lam I)^-1, C_i the mean of e e^T over the keys (n_i, d) of concept i."""
    grams = [rows.T @ rows / len(rows) for rows in keys]
    whole = sum(grams) + lam * torch.eye(len(grams[0])).to(grams[0])
    return sum(change @ gram for change, gram in zip(changes, grams, strict=True)) @ torch.linalg.inv(whole)


@exercise
def check_fused_change(theirs: Callable[[Sequence[Tensor], Sequence[Tensor], float], Tensor]) -> None:
    """Notebook 12, exercise 1."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    changes, keys = [draw(5, 6), draw(5, 6)], [draw(20, 6), draw(30, 6)]
    found = theirs(changes, keys, 0.1)
    assert found.shape == (5, 6), f"a change of the weight, (5, 6); yours is {tuple(found.shape)}"
    assert torch.allclose(found, fused_change(changes, keys, 0.1)), (
        "it is not the minimum: look at the normal equations"
    )
    assert torch.allclose(theirs(changes[:1], keys[:1], 0.0), changes[0]), (
        "one concept and no ridge give its change"
    )
    basis = torch.linalg.qr(draw(6, 6))[0]
    apart = [draw(20, 3) @ basis[:3], draw(20, 3) @ basis[3:]]
    both = theirs(changes, apart, 1e-12)
    for change, rows in zip(changes, apart, strict=True):
        assert torch.allclose(rows @ both.T, rows @ change.T, atol=1e-6), (
            "keys that lie apart do not disturb each other"
        )
    print("fused_change: all tests passed")


@exercise
def check_attenuation(theirs: Callable[..., float]) -> None:
    """Notebook 21, exercise 1."""
    assert abs(theirs(5, 1.0, 0, 1.0, 1.0, 0.0)) < 1e-12, (
        "neighbours and nothing to hold: everything across fades to 0"
    )
    assert abs(theirs(0, 1.0, 3, 1.0, 1.0, 0.1) - 1) < 1e-12, "no neighbours: nothing fades"
    generator, d, n, m, sigma, tau, weight, lam = (
        torch.Generator().manual_seed(0),
        16,
        4000,
        4000,
        0.5,
        1.0,
        0.7,
        3.0,
    )
    e = torch.zeros(d, dtype=torch.float64)
    e[0] = 4.0
    draw = lambda count, spread: spread * torch.randn(count, d, generator=generator, dtype=torch.float64)
    solved = closed_form.solve(
        e + draw(n, sigma),
        torch.zeros(n, d, dtype=torch.float64),
        draw(m, tau),
        preserve_scale=weight,
        lam=lam,
    ).matrix()
    measured, predicted = float(solved[1:, 1:].diagonal().mean()), theirs(n, sigma, m, tau, weight, lam)
    assert abs(measured - predicted) < 0.02, f"measured {measured:.3f}, your formula says {predicted:.3f}"
    print("attenuation: all tests passed")


@exercise
def check_pareto(theirs: Callable[[Sequence[float], Sequence[float]], Sequence[bool]]) -> None:
    """Notebook 40, exercise 1."""
    found = lambda *points: [bool(one) for one in theirs(*zip(*points, strict=True))]
    assert found((0.5, 0.5)) == [True], "a point by itself is dominated by nobody"
    assert found((0.9, 0.3), (0.2, 0.9), (0.1, 0.8)) == [True, True, False], (
        "the third is worse than the second in both"
    )
    assert found((0.5, 0.5), (0.5, 0.6)) == [False, True], (
        "as good in one and worse in the other is dominated"
    )
    assert found((0.5, 0.5), (0.5, 0.5)) == [True, True], "equal points do not dominate each other"
    print("pareto: all tests passed")


@exercise
def check_average_of_weights(theirs: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Notebook 31, exercise 1."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    weight, t = draw(5, 6), closed_form.ContextMap(draw(6, 2), draw(6, 2))
    for share in (0.0, 0.3, 1.0):
        found = theirs(weight, weight @ t.matrix(), share)
        assert torch.allclose(found, weight @ t.scaled(share).matrix()), (
            f"with share {share:g} the average should be the edit at that strength"
        )
    print("average_of_weights: all tests passed")


@exercise
def check_entry_weight(theirs: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Notebook 13, exercise 1."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    weight, bias, c, c_star, other = draw(5, 6), 3 * draw(5), draw(6), draw(6), draw(6)
    found = theirs(weight, bias, c, c_star)
    assert found.shape == (5, 6), f"a weight, (5, 6); yours is {tuple(found.shape)}"
    wanted = weight @ c_star + bias
    assert torch.allclose(found @ c + bias, wanted), (
        f"the layer should give for c what it gave for c*; yours is off by {(found @ c + bias - wanted).norm():.2g}"
    )
    apart = other - (other @ c) / (c @ c) * c
    assert torch.allclose(found @ apart, weight @ apart), (
        "a row at a right angle to c should be read as before"
    )
    print("entry_weight: all tests passed")


@exercise
def check_noise_of(theirs: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Notebook 13, exercise 2."""
    generator = torch.Generator().manual_seed(0)
    picture, noise = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    for s in (0.0, 0.3, 1.0):
        x = (1 - s) * picture + s * noise
        found = theirs(x, noise - picture, s)
        assert torch.allclose(found, noise), (
            f"at s = {s:g} the noise is off by {(found - noise).norm():.2g}: what is left of x_s without the picture?"
        )
    print("noise_of: all tests passed")
