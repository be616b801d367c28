"""The regeneration radius: how far an embedding must be moved until an edited model answers it as the original answered
the erased concept.

With W_i the original key and value projections, W_i' the edited ones and c the rows of a prompt of the concept, the
embeddings x that the edited model reads, within tau, as the original read c are

    { x : sum_i ||W_i' x - W_i c||^2  <=  tau^2 sum_i ||W_i (c - n)||^2 },

n the rows of a neutral prompt: an ellipsoid. Its distance from the rows p of a real prompt is one secular equation,
that of a trust region: the nearest point solves (I + mu M) x = p + mu B c with M = sum_i W_i'^T W_i' and
B = sum_i W_i'^T W_i, and mu >= 0 is where the constraint holds with equality. Our own; no paper has it. It holds for
every edit that changes keys and values alone, by one matrix or not.

What it is worth (`benchmarks/regeneration_radius.py`, `data/results/benchmark_regeneration_radius.json`): the
unedited model still draws a concept at tau = 0.4 on the way to another concept (61 of 100) and no longer at 0.6 (1 of
100), but at 0.6 in a random direction (81 of 100), so there is no one tau. Its order and that of UnlearnDiffAtk's
successes go against each other on "dog", as they should, but no more than by luck (Kendall's tau-b -0.57 at tau = 0.4
from the nearest other prompt, eight edits, p = 0.061; 0.73 adjusted for the fourteen orders that were tried), and the
other way on the weapons (0.50, eight edits, p = 0.11). Use it to see what an edit closed, not how safe it is; notebook
14 draws both.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from erasekit.edits import Edit
from erasekit.layers import cross_attention_kv
from erasekit.models import DiffusionModel

LARGEST = 1e30  # of mu: where the constraint is not met by then, no embedding meets it


@dataclass(frozen=True, eq=False)
class Response:
    """What key and value projections answer: original = sum W^T W, edited = sum W'^T W', cross = sum W'^T W, (d, d)."""

    original: Tensor
    edited: Tensor
    cross: Tensor

    @classmethod
    def of(cls, weights: Iterable[tuple[Tensor, Tensor]]) -> "Response":
        """From pairs (W, W') of projections (out, d)."""
        pairs = [(w.detach().double(), after.detach().double()) for w, after in weights]
        products = [sum(a.T @ b for a, b in both) for both in (
            [(w, w) for w, _ in pairs], [(after, after) for _, after in pairs], [(after, w) for w, after in pairs]
        )]  # fmt: skip
        return cls(*products)

    def distance(self, rows: Tensor, sources: Tensor, neutral: Tensor) -> float:
        """How far the edited model's answer to rows is from the original's to sources (n, d), as a share of how far the
        original's answers to sources and neutral are apart: 0, the same; the rows of neutral, before an edit: 1.
        """
        x, c, n = (one.double() for one in (rows, sources, neutral))
        squared = (x @ self.edited * x).sum() - 2 * (x @ self.cross * c).sum() + (c @ self.original * c).sum()
        return float((squared.clamp_min(0) / self._scale(c, n)).sqrt())

    def _scale(self, c: Tensor, n: Tensor) -> Tensor:
        scale = ((c - n) @ self.original * (c - n)).sum()
        if scale <= 0:
            raise ValueError(
                "the original model answers the concept and the neutral prompt alike: choose another"
            )
        return scale


def response(model: DiffusionModel, edit: Edit | None) -> Response:
    """Of an edit of a model.

    Raises ValueError for an edit that changes more than key and value projections, on which this says nothing.
    """
    before = {name: layer.weight for name, layer in cross_attention_kv(model.unet).items()}
    try:
        after = {} if edit is None else edit.projections(model)
    except ValueError as error:
        raise ValueError(
            f"the regeneration radius is of edits that change key and value projections alone: {error}"
        ) from error
    return Response.of((weight, after.get(name, weight)) for name, weight in before.items())


def radius(
    of: Response, sources: Tensor, starts: Tensor, neutral: Tensor, tau: float
) -> tuple[float, Tensor | None]:
    """The distance from starts to the nearest rows that the edited model answers, within tau, as the original answered
    sources; and these rows. All are (n, d), one prompt row by row; the distance is that of all rows together, over
    that of sources from neutral. 0 where starts are answered so already; inf and None where no rows are.
    """
    c, p, n = (one.double() for one in (sources, starts, neutral))
    if not 0 < tau < 1:
        raise ValueError(f"tau is a share between 0, the concept, and 1, the neutral prompt, got {tau}")
    scale = float(of._scale(c, n))
    size, axes = torch.linalg.eigh((of.edited + of.edited.T) / 2)
    size = size.clamp_min(0).numpy()[None]
    start, pull = ((one @ axes).numpy() for one in (p, c @ of.cross.T))
    constant = float((c @ of.original * c).sum()) - tau**2 * scale

    def nearest(mu: float) -> np.ndarray:
        return (start + mu * pull) / (1 + mu * size)

    def excess(mu: float) -> float:  # falls with mu
        x = nearest(mu)
        return (float((size * x * x).sum() - 2 * (pull * x).sum()) + constant) / scale

    if excess(0.0) <= 0:
        return 0.0, p
    high = 1.0
    while excess(high) > 0:
        high *= 10
        if high > LARGEST:
            return float("inf"), None
    found = nearest(brentq(excess, 0.0 if high == 1.0 else high / 10, high, xtol=1e-300, rtol=1e-13))
    distance = np.linalg.norm(found - start) / float((c - n).norm())
    return float(distance), torch.from_numpy(found) @ axes.T
