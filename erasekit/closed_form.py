"""The weighted least-squares solver that UCE, RECE, TRCE and RealEra share.

For every key and value projection W at once it minimizes

    J(W') = e sum_i ||W' c_i - W c*_i||^2 + p sum_j ||W' c_j - W c_j||^2 + lam ||W' - W||_F^2

whose solution, because the targets are W c*_i, is W' = W T with one matrix for all layers:

    T = I + e (C* - C)^T C M^-1,   M = lam I + e C^T C + p P^T P

Notation (code -> paper): sources -> C, targets -> C*, preserved -> P (embeddings as rows), erase_scale -> e,
preserve_scale -> p (lambda_1 in RECE), lam -> lambda (lambda_2 in RECE). T - I has rank at most n, the number
of source rows, so it is kept as two thin factors: T = I + U V^T.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ContextMap:
    """T = I + left right^T: a linear map of text embeddings. left, right: float64 (d, r)."""

    left: Tensor
    right: Tensor

    def __post_init__(self):
        if self.left.ndim != 2 or self.left.shape != self.right.shape:
            raise ValueError(
                f"left and right must both be (d, r), got {tuple(self.left.shape)}, {tuple(self.right.shape)}"
            )
        if self.left.dtype != torch.float64 or self.right.dtype != torch.float64:
            raise ValueError(f"a ContextMap is float64, got {self.left.dtype} and {self.right.dtype}")

    @classmethod
    def identity(cls, d: int, device: torch.device | None = None) -> "ContextMap":
        """The map that changes nothing, with r = 0."""
        return cls(*(torch.zeros(d, 0, dtype=torch.float64, device=device) for _ in range(2)))

    @property
    def d(self) -> int:
        """Width of the text embeddings."""
        return self.left.shape[0]

    @property
    def rank(self) -> int:
        """Number of factor columns r, an upper bound of the rank of T - I (tight after `compressed`)."""
        return self.left.shape[1]

    @property
    def nbytes(self) -> int:
        """Size of the two factors."""
        return self.left.nbytes + self.right.nbytes

    def matrix(self) -> Tensor:
        """T, (d, d), with W' = W @ T."""
        eye = torch.eye(self.d, dtype=torch.float64, device=self.left.device)
        return eye + self.left @ self.right.T

    def apply(self, embeddings: Tensor) -> Tensor:
        """Rows x (..., d) mapped to x T^T; editing W to W T is the same as feeding W these rows."""
        x = embeddings.to(self.left)
        return (x + (x @ self.right) @ self.left.T).to(embeddings)

    def apply_to_weight(self, weight: Tensor) -> Tensor:
        """W T for W (d_out, d), in the dtype of W. W (T - I) is computed in float64 for a float64 W, else in float32:
        its rounding is then far below that of W itself.
        """
        w = weight if weight.dtype == torch.float64 else weight.float()
        left, right = self.left.to(w), self.right.to(w)
        return torch.addmm(w, w @ left, right.T).to(weight.dtype)

    def compose(self, other: "ContextMap") -> "ContextMap":
        """T_self T_other: `self` is applied to the weights first, W' = (W T_self) T_other."""
        _same_width(self, other)
        left = torch.cat([self.left, other.left + self.left @ (self.right.T @ other.left)], 1)
        right = torch.cat([self.right, other.right], 1)
        return ContextMap(left, right) if left.shape[1] <= self.d else _dense(left @ right.T)

    def scaled(self, alpha: float) -> "ContextMap":
        """I + alpha (T - I): alpha 0 changes nothing, 1 is this map, above 1 exaggerates it."""
        return ContextMap(alpha * self.left, self.right)

    def inverse(self) -> "ContextMap":
        """T^-1 = I - U (I + V^T U)^-1 V^T. ValueError when T is singular to working precision."""
        core = torch.eye(self.rank).to(self.left) + self.right.T @ self.left
        if self.rank and not torch.linalg.cond(core) < 1 / torch.finfo(torch.float64).eps:
            raise ValueError("this map is singular, so no embedding undoes it: fit it with a larger lam")
        return ContextMap(-torch.linalg.solve(core.T, self.left.T).T, self.right)

    def compressed(self, rtol: float = 1e-14) -> "ContextMap":
        """The same map with balanced factors of its numerical rank.

        Singular values of T - I below rtol times the largest are dropped, which moves T by no more than that.
        """
        if not self.rank:
            return self
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right)
        u, s, vh = torch.linalg.svd(r_left @ r_right.T)
        keep = s > rtol * s[0]
        root = s[keep].sqrt()
        return ContextMap(q_left @ u[:, keep] * root, q_right @ vh.T[:, keep] * root)


def _dense(difference: Tensor) -> ContextMap:
    """The map with T - I = difference, (d, d): for more rows than d, where thin factors would be wider than that."""
    return ContextMap(difference, torch.eye(len(difference)).to(difference))


def _same_width(a: ContextMap, b: ContextMap) -> None:
    if a.d != b.d:
        raise ValueError(
            f"cannot compose maps of width {a.d} and {b.d}: they belong to different text encoders"
        )


def solve(
    sources: Tensor,
    targets: Tensor,
    preserved: Tensor | None = None,
    *,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    lam: float = 0.1,
) -> ContextMap:
    """Minimize J of the module docstring for every W at once (the objective of UCE with the ridge of its
    code; RECE Eq. 3).

    sources: rows to map away, (n, d). targets: rows they are mapped to, (n, d). preserved: rows to keep, (m,
    d). Any float dtype; the work is float64 on the device of `sources`. With fewer rows than d the system is
    solved at (n + m) x (n + m), otherwise at d x d. Raises ValueError for wrong shapes, values that are not
    finite, negative scales, and a singular system.

    Preserved rows count only through P^T P: pass `condensed(rows)` when many are used more than once.
    """
    rows = {"sources": sources, "targets": targets}
    if preserved is not None:
        rows["preserved"] = preserved
    rows = {name: _checked(name, value, sources) for name, value in rows.items()}
    c, c_star = rows["sources"], rows["targets"]
    n, d = c.shape
    kept = rows.get("preserved", c.new_zeros(0, d))
    if c_star.shape != c.shape:
        raise ValueError(
            f"every source row needs one target row: sources {tuple(c.shape)}, targets {tuple(c_star.shape)}"
        )
    if kept.shape[1] != d:
        raise ValueError(f"preserved rows are {kept.shape[1]} wide, sources are {d}")
    for name, value in dict(erase_scale=erase_scale, preserve_scale=preserve_scale, lam=lam).items():
        if not (0 <= value < float("inf")):
            raise ValueError(f"{name} must be zero or positive, got {value}")
    if erase_scale == 0 or n == 0:
        return ContextMap.identity(d, c.device)

    left = erase_scale * (c_star - c).T
    weighted = torch.cat([erase_scale**0.5 * c, preserve_scale**0.5 * kept])  # S, with M = lam I + S^T S
    singular = f"the least-squares system is singular with lam={lam}: raise lam, or give independent rows"
    if len(weighted) < d and lam > 0:
        # M^-1 S^T = S^T (lam I + S S^T)^-1: the same answer from a system as small as the number of rows.
        gram = weighted @ weighted.T + lam * torch.eye(len(weighted)).to(c)
        first = torch.eye(len(weighted), n).to(c)
        right = weighted.T @ torch.cholesky_solve(first, cholesky(gram, singular)) / erase_scale**0.5
        return ContextMap(left, right)
    factor = cholesky(_gram([weighted]) + lam * torch.eye(d).to(c), singular)
    if n < d:
        return ContextMap(left, torch.cholesky_solve(c.T, factor))
    return _dense(torch.cholesky_solve(c.T @ left.T, factor).T)


def span(rows: Tensor, cut: float) -> Tensor:
    """Orthonormal directions (r, d), float64, of rows (m, d) along which their singular values are above `cut`.

    Those below 1e-12 of their norm are rounding and are never among them.
    """
    rows = rows.double()
    if len(rows) > rows.shape[1]:
        rows = torch.linalg.qr(rows, mode="r").R  # the same directions and singular values, of fewer rows
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    return directions[values > (1e-12 * values.norm()).clamp_min(cut)]


def complement(preserved: Tensor | None, d: int, cut: float) -> Tensor:
    """Pi (d, d): the projection onto what is orthogonal to the span of the preserved rows (m, d)."""
    eye = torch.eye(d, dtype=torch.float64)
    if preserved is None:
        return eye
    inside = span(preserved, cut)
    return eye.to(inside) - inside.T @ inside


def confined(sources: Tensor, targets: Tensor, pi: Tensor, ridge: float, singular: str) -> ContextMap:
    """T = I + (C* - C)^T (C Pi C^T + ridge I)^-1 C Pi: least squares that move nothing outside the range of Pi (d, d).

    It minimizes ||T c - c*||^2 + ridge ||T - I||_F^2 over rows c, c* (n, d), among the maps with T x = x wherever
    Pi x = 0. ValueError(singular) where the rows are not independent in that range and no ridge makes up for it.
    """
    outside = sources @ pi
    gram = outside @ outside.T + ridge * torch.eye(len(sources)).to(outside)
    right = torch.cholesky_solve(outside, cholesky(gram, singular))
    return ContextMap((targets - sources).T.contiguous(), right.T.contiguous())


def condensed(rows: Tensor) -> Tensor:
    """At most d rows with the same rows^T rows as (m, d), float64: to `solve` they preserve the same.

    Directions below 1e-14 of the largest eigenvalue are rounding and are dropped.
    """
    rows = rows.double()
    if len(rows) <= rows.shape[1]:
        return rows
    values, vectors = torch.linalg.eigh(_gram([rows]))
    keep = values > 1e-14 * values[-1]
    return values[keep, None].sqrt() * vectors[:, keep].T


def weight_gram(weights: Iterable[Tensor]) -> Tensor:
    """A = sum_i W_i^T W_i of projections (d_out_i, d), float64 (d, d): all that a search over embeddings needs to
    know of them, since sum_i ||W_i x||^2 = x^T A x.
    """
    return _gram([weight.detach() for weight in weights])


@dataclass(frozen=True, eq=False)
class Rows:
    """The embeddings of one erasure, float64: sources and their targets (n, d), preserved (m, d) or None.

    concepts: the names erased, their anchors, and the names preserved. prompts: each erased phrase by itself, or in its
    concept's templates, beside the same with the anchor.
    """

    sources: Tensor
    targets: Tensor
    preserved: Tensor | None
    concepts: dict[str, list[str]]
    prompts: tuple[tuple[str, str], ...] = ()


def residuals(context_map: ContextMap, given: Rows) -> dict[str, float]:
    """erase_residual: ||T c - c*|| over ||c - c*||; preserve_drift: ||T p - p|| over ||p||."""
    kept, sources, targets = given.preserved, given.sources, given.targets
    return {
        "erase_residual": _relative(context_map.apply(sources) - targets, sources - targets),
        "preserve_drift": 0.0 if kept is None else _relative(context_map.apply(kept) - kept, kept),
    }


def output_residuals(weight: Tensor, edited: Tensor, given: Rows) -> dict[str, float]:
    """The same of what one projection (d_out, d) gives: W' c beside W c*, W' p beside W p."""
    w, new = weight.double(), edited.double()
    kept, sources, targets = given.preserved, given.sources, given.targets
    return {
        "erase_residual": _relative(sources @ new.T - targets @ w.T, (sources - targets) @ w.T),
        "preserve_drift": 0.0 if kept is None else _relative(kept @ (new - w).T, kept @ w.T),
    }


def _gram(matrices: Sequence[Tensor], block: int = 4096, columns: int = 192) -> Tensor:
    """sum_i M_i^T M_i in float64, a block of rows and columns at a time; symmetry gives the lower half."""
    d = matrices[0].shape[1]
    total = torch.zeros(d, d, dtype=torch.float64, device=matrices[0].device)
    for part in (part for matrix in matrices for part in matrix.split(block)):
        part = part.double()
        for i in range(0, d, columns):
            total[i : i + columns, i:].addmm_(part[:, i : i + columns].T, part[:, i:])
    return total.triu() + total.triu(1).T


def _checked(name: str, value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a floating-point tensor of rows, got {kind}")
    if value.ndim != 2:
        raise ValueError(f"{name} must be (rows, d), got {tuple(value.shape)}")
    if not value.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity: check the text encoder that made it")
    return value.detach().to(like.device, torch.float64)


def cholesky(gram: Tensor, complaint: str) -> Tensor:
    """Lower factor of a symmetric (n, n). ValueError(complaint) when it is singular to working precision."""
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal() ** 2
    if info.item() or pivots.min() <= len(gram) * torch.finfo(torch.float64).eps * pivots.max():
        raise ValueError(complaint)
    return factor


def _relative(difference: Tensor, size: Tensor) -> float:
    return float(difference.norm() / size.norm().clamp_min(torch.finfo(torch.float64).tiny))
