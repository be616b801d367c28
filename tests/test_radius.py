"""The regeneration radius against brute force, on matrices and on tiny edits."""

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from scipy.optimize import minimize

import erasekit as ek
from erasekit.evaluate.radius import Response, radius, response
from erasekit.layers import cross_attention_kv


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def edited(weights, t):
    return Response.of([(w, w @ t) for w in weights])


def brute(weights, t, c, p, n, tau):
    """The nearest rows by a general solver, from several starts."""
    flat = lambda x: torch.as_tensor(x).reshape(c.shape)
    scale = sum(((c - n) @ w.T).square().sum() for w in weights)
    room = lambda x: float(tau**2 - sum(((flat(x) @ t.T - c) @ w.T).square().sum() for w in weights) / scale)
    found = [
        minimize(lambda x: np.square(x - p.flatten().numpy()).sum(), first.flatten().numpy(), method="SLSQP",
                 constraints={"type": "ineq", "fun": room}, options={"maxiter": 500, "ftol": 1e-14})
        for first in (p, c, c @ torch.linalg.pinv(t).T)
    ]  # fmt: skip
    best = min(one.fun for one in found if room(one.x) > -1e-7)
    return best**0.5 / float((c - n).norm())


@pytest.mark.parametrize("flat", [0, 2])
def test_it_is_what_a_general_solver_finds(rows, flat):
    """Also where the edit flattens directions, with the concept's answer still within reach."""
    weights, c, p, n = [rows(5, 6), rows(7, 6)], rows(2, 6), rows(2, 6), rows(2, 6)
    u, s, v = torch.linalg.svd(torch.eye(6, dtype=torch.float64) + 0.5 * rows(6, 6))
    s[6 - flat :] = 0
    t = u @ s.diag() @ v
    of = edited(weights, t)
    reachable = min(of.distance(x, c, n) for x in [c @ torch.linalg.pinv(t).T])
    tau = max(0.4, 1.2 * reachable)
    found, nearest = radius(of, c, p, n, tau)
    assert found == pytest.approx(brute(weights, t, c, p, n, tau), rel=1e-4)
    assert of.distance(nearest, c, n) == pytest.approx(tau, rel=1e-6)
    assert float((nearest - p).norm() / (c - n).norm()) == pytest.approx(found, rel=1e-9)


def test_without_an_edit_the_concept_is_at_no_distance(rows):
    weights, c, n = [rows(5, 6)], rows(2, 6), rows(2, 6)
    of = edited(weights, torch.eye(6, dtype=torch.float64))
    assert radius(of, c, c, n, 0.5)[0] == 0 and of.distance(n, c, n) == pytest.approx(1)
    away, _ = radius(of, c, n, n, 0.5)
    assert 0 < away <= 0.5 + 1e-12, "half way from the neutral prompt is enough, a shorter way may be"


def test_what_no_embedding_reaches_is_infinitely_far(rows):
    """A projection that removes the concept's direction, and the control: within reach when tau allows what is left."""
    c, n = rows(1, 6), torch.zeros(1, 6, dtype=torch.float64)
    direction = c / c.norm()
    eye = torch.eye(6, dtype=torch.float64)
    of = edited([eye], eye - direction.T @ direction)
    assert radius(of, c, c, n, 0.99) == (float("inf"), None)
    half = edited([eye], eye - 0.999 * direction.T @ direction)
    assert radius(half, c, c, n, 0.5)[0] == pytest.approx(0.5 / 0.001 - 1, rel=1e-6)


def test_it_grows_as_tau_falls_and_a_nearer_start_is_nearer(rows):
    weights, c, p, n = [rows(8, 6)], rows(3, 6), rows(3, 6), rows(3, 6)
    of = edited(weights, torch.eye(6, dtype=torch.float64) + 0.3 * rows(6, 6))
    found = [radius(of, c, p, n, tau)[0] for tau in (0.8, 0.5, 0.2, 0.05)]
    assert found == sorted(found) and found[0] < found[-1]
    _, nearest = radius(of, c, p, n, 0.2)
    assert radius(of, c, (p + nearest) / 2, n, 0.2)[0] == pytest.approx(found[2] / 2, rel=1e-6)


def test_the_response_of_an_edit_is_that_of_its_weights():
    model = ek.load(tiny_pipeline())
    edit = ek.uce.fit(model, "dog", ["castle"])
    of = response(model, edit)
    weights = [layer.weight.detach().double() for layer in cross_attention_kv(model.unet).values()]
    t = edit.context_map.matrix()
    assert torch.allclose(of.edited, sum(t.T @ w.T @ w @ t for w in weights), rtol=1e-4, atol=1e-6)
    none = response(model, None)
    assert torch.equal(none.edited, none.original) and torch.equal(none.cross, none.original)


def test_edits_of_anything_else_are_refused():
    model = ek.load(tiny_pipeline())
    config = ek.esd.Config(iterations=1, batch=1, noises=1)
    for edit in (ek.semantic_surgery.fit(model, "dog"), ek.esd.fit(model, "dog", config=config)):
        with pytest.raises(ValueError, match="key and value projections alone"):
            response(model, edit)
    with pytest.raises(ValueError, match="tau is a share"):
        radius(response(model, None), *[torch.ones(1, 4)] * 3, 1.0)
