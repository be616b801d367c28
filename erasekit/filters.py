"""Filters: edits that act while a model draws, and are in no weight. Their formulas, and the hooks that apply them.

A filter has a kind, a formula with settings, and tensors. kind "prompt_filter": the formula changes what the text
encoder gives. kind "attention_filter": it changes the values of every cross-attention. kind "guidance_filter": it
changes what the UNet predicts for a text. `methods` fit the tensors and explain the formulas; `Edit.applied` puts a
filter in place.

Hooks can be passed by: code that was compiled before does not call them, and fused projections do without the layer
that they stand on. Such models are refused, before or when they draw. What cannot be seen here is an embedding that was
made elsewhere and is handed to the model: no prompt filter reads it.
"""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasekit.concepts import token_ids
from erasekit.layers import check_uncompiled, cross_attention, uncompiled

FilterKind = Literal["prompt_filter", "attention_filter", "guidance_filter"]
KINDS = get_args(FilterKind)
NEAR = 0.01  # of its norm: how far from the empty prompt an embedding is still the empty prompt, rounded otherwise

_VALUES = (
    threading.local()
)  # .layer: which `to_v` the filter saw in this call; small models draw in several threads
_DRAWN = threading.local()  # .by: {guidance filter: the `Drawing` that this thread is at}


def adavd(values: Tensor, targets: Tensor, *, a: float, b: float, c: float, scale: float = 1.0) -> Tensor:
    """AdaVD: values (n, length, d), the heads side by side, without what they share with targets t (concepts, d).

        v_j <- v_j - scale sum_i delta(cos(v_j, t_i)) k_ij t_i,    delta(x) = c / (1 + exp(-a (x - b)))

    k_j are the coefficients of the point of the targets' span that is nearest to v_j: of one target v_j.t / ||t||^2.
    The start token, j = 0, stays.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    v, t = values.to(wide), targets.to(values.device, wide)
    share = v @ t.T @ torch.linalg.pinv(t @ t.T, hermitian=True)
    gate = c * torch.sigmoid(a * (F.cosine_similarity(v[..., None, :], t, dim=-1) - b))
    gate = gate * (torch.arange(v.shape[1], device=v.device) > 0)[:, None]
    return (v - scale * (gate * share) @ t).to(values.dtype)


def presence(states: Tensor, directions: Tensor, *, beta: float, gamma: float, pooling: str) -> Tensor:
    """Semantic Surgery: rho (n, m) = sigmoid((cos(e, de) - beta) / gamma) of embeddings e (n, length, d) and directions
    de (m, length, d). pooling: "all", one cosine of all rows; "tokens", the mean of those of the rows.
    """
    e, de = (states.flatten(1), directions.flatten(1)) if pooling == "all" else (states, directions)
    cosine = F.cosine_similarity(e[:, None], de[None], dim=-1)
    return torch.sigmoid(((cosine if pooling == "all" else cosine.mean(-1)) - beta) / gamma)


def semantic_surgery(
    states: Tensor,
    directions: Tensor,
    members: Tensor,
    *,
    beta: float,
    gamma: float,
    tau: float,
    pooling: str,
    strength: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """Semantic Surgery: e' = e - scale strength rho de, for states e (n, length, d).

    directions: de (m, length, d) of each set of concepts; members: (m, concepts), 1 for those in the set, the concepts
    by themselves first. A prompt's set are the concepts with rho > tau, the likeliest ones where no set has so many;
    rho is the largest of theirs. Where there is none, e stays as it is.
    """
    if states.shape[1:] != directions.shape[1:]:
        raise ValueError(
            f"this prompt filter reads embeddings of shape {tuple(directions.shape[1:])}, and the text encoder gives "
            f"{tuple(states.shape[1:])}: pad prompts to the limit of the tokenizer"
        )
    wide = torch.promote_types(states.dtype, torch.float32)
    e, de, members = states.to(wide), directions.to(states.device, wide), members.to(states.device)
    concepts, most = members.shape[1], int(members.sum(1).max())
    rho = presence(e, de[:concepts], beta=beta, gamma=gamma, pooling=pooling)
    likeliest = torch.zeros_like(rho).scatter(1, rho.topk(most, 1).indices, 1.0)
    found = (rho > tau) & (likeliest > 0)
    which = (found[:, None] == members.bool()).all(-1).to(wide)  # (n, m): no row is 1 where nothing was found
    rho = (rho * found).amax(1)[:, None, None]
    return (e - scale * strength * rho * (which @ de.flatten(1)).view_as(e)).to(states.dtype)


def safree(
    states: Tensor, masked: Tensor, real: Tensor, concepts: Tensor, *, alpha: float, scale: float = 1.0
) -> Tensor:
    """SAFREE: states (n, length, d) of which the rows of flagged tokens are projected twice,

        e_i <- e_i + scale ((I - P_C) P_I e_i - e_i)
        where  ||(I - P_C) p_i|| >= (1 + alpha) mean over j != i of ||(I - P_C) p_j||

    masked: p (n, length, d), the pooled prompt without token i; real: (n, length), tokens that are no start, end or
    padding; P_C, P_I: projections onto the spans of concepts (m, d) and of a prompt's p. No token is flagged alone.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    e, p, c = states.to(wide), masked.to(wide) * real[..., None], concepts.to(states.device, wide)
    leave = torch.eye(e.shape[-1], device=e.device, dtype=wide) - torch.linalg.pinv(c) @ c
    away = (p @ leave).norm(dim=-1)
    count = real.sum(1, keepdim=True)
    flagged = real & (count > 1) & (away * (count - 1) >= (1 + alpha) * (away.sum(1, keepdim=True) - away))
    moved = e @ (torch.linalg.pinv(p) @ p) @ leave
    return torch.where(flagged[..., None], e + scale * (moved - e), e).to(states.dtype)


@torch.no_grad()
def without_each(encoder: nn.Module, ids: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Pooled prompts (n, length, d) without each of their tokens, which no token attends to then, and which tokens are
    `real` (n, length), as `safree` takes both. end: the end token, whose first row is the pooled prompt; ValueError
    where it is missing.
    """
    if not (ids == end).any(1).all():
        raise ValueError(
            "this prompt filter looks for the end token, and a prompt has none: pad it to the limit"
        )
    last = (ids == end).int().argmax(1)
    places = torch.arange(ids.shape[1], device=ids.device)
    real = (places > 0) & (places < last[:, None])
    rows, found = torch.arange(len(ids), device=ids.device), {}
    for i in range(1, int(last.max())):
        seen = (places != i).int().expand_as(ids)
        found[i] = encoder.forward(ids, attention_mask=seen)[0][
            rows, last
        ]  # not encoder(): that calls the filter
    none = torch.zeros(len(ids), encoder.config.hidden_size, device=ids.device, dtype=encoder.dtype)
    return torch.stack([found.get(i, none) for i in places.tolist()], 1), real


def sld(
    text: Tensor,
    concept: Tensor,
    empty: Tensor,
    momentum: Tensor,
    *,
    s_s: float,
    lam: float,
    s_m: float,
    beta_m: float,
    clamp: str,
) -> tuple[Tensor, Tensor]:
    """SLD: gamma, which is taken from what is predicted for a text, and the momentum of the next step,

        gamma = mu (e_S - e_0) + s_m nu,    nu <- beta_m nu + (1 - beta_m) gamma
        mu = |s_S (e_c - e_S)| where e_c - e_S < lambda, else 0

    text, concept, empty, momentum: e_c, e_S, e_0 and nu, all of one shape; in single precision at least. clamp: "min",
    mu is at most 1; "max", it is at least 1 where it is not 0.
    """
    wide = torch.promote_types(text.dtype, torch.float32)
    e_c, e_s, e_0 = (one.to(wide) for one in (text, concept, empty))
    mu = (s_s * (e_c - e_s)).abs()
    mu = mu.clamp(max=1) if clamp == "min" else mu.clamp(min=1)
    mu = torch.where(e_c - e_s < lam, mu, torch.zeros_like(mu))
    gamma = mu * (e_s - e_0) + s_m * momentum
    return gamma, beta_m * momentum + (1 - beta_m) * gamma


FORMULAS = {
    "adavd": "attention_filter",
    "semantic_surgery": "prompt_filter",
    "safree": "prompt_filter",
    "sld": "guidance_filter",
}


@dataclass(frozen=True, eq=False)
class Filter:
    """One filter with its strength, whose methods are the hooks; settings: `formula` and its own."""

    tensors: Mapping[str, Tensor]
    settings: Mapping
    scale: float

    def on_values(self, layer: nn.Linear, args: tuple, output: Tensor) -> Tensor:
        """Of a `to_v`. What it makes of the concepts depends on its weight, which other edits change."""
        _VALUES.layer = layer
        rows = self.tensors["concepts"].to(layer.weight)
        return adavd(output, rows @ layer.weight.T, **self._given)

    def on_states(self, encoder: nn.Module, args: tuple, kwargs: dict, output):
        """Of a text encoder: another last hidden state."""
        states, *more = output.to_tuple() if hasattr(output, "to_tuple") else output
        if any(isinstance(one, tuple) for one in more):
            raise ValueError(
                "a prompt filter changes the last hidden state, and earlier ones are asked for: leave out clip_skip "
                "and output_hidden_states"
            )
        if self.settings["formula"] == "semantic_surgery":
            states = semantic_surgery(states, **self.tensors, **self._given)
        else:
            given = self._given
            ids = kwargs.get("input_ids", args[0] if args else None)
            masked, real = without_each(encoder, ids, given.pop("end"))
            states = safree(states, masked, real, self.tensors["concepts"], **given)
        if not hasattr(output, "to_tuple"):
            return (states, *more)
        return type(output)(**{**output, "last_hidden_state": states})

    @property
    def _given(self) -> dict:
        own = {name: value for name, value in self.settings.items() if name != "formula"}
        return own | {"scale": self.scale}


@dataclass
class Drawing:
    """Where a guidance filter is: time step of the first call and of the last one, calls so far, embeddings of the
    texts and of the empty prompt, and the momentum of the rows that are not the empty prompt (None before the first).
    """

    first: float
    text: Tensor
    empty: Tensor
    last: float = float("inf")
    step: int = 0
    momentum: Tensor | None = None

    def goes_on(self, t: float, text: Tensor) -> bool:
        """Whether a call at time step t is of the same drawing: the same texts, and a time step that falls. It may
        stay for a call, as in samplers that look twice (PNDM, Heun), but not at the first one.
        """
        return t < self.first and t <= self.last and torch.equal(text, self.text)


@dataclass(frozen=True, eq=False)
class GuidanceFilter(Filter):
    """A filter of what a UNet predicts. encoder: the text encoder; ids: tokens (1, length) of the empty prompt, which
    is read when a drawing begins, since edits of the text encoder move it.
    """

    encoder: nn.Module
    ids: Tensor

    def on_prediction(self, unet: nn.Module, args: tuple, kwargs: dict, output):
        """Of a UNet: e_c - scale gamma for every row but those of the empty prompt, which stay as they are.

        e_0 is what the same call predicts for the empty prompt where it holds the same latents with it, as guidance
        asks, and else computed. Calls that follow each other in a drawing (`Drawing.goes_on`) share warm-up and
        momentum; one with gradients, or with time steps of its rows' own, stands by itself: it has neither.
        """
        predicted, *more = output.to_tuple() if hasattr(output, "to_tuple") else output
        given = inspect.signature(unet.forward).bind(*args, **kwargs).arguments
        text, times = given["encoder_hidden_states"], torch.as_tensor(given["timestep"]).flatten()
        drawing, alone = self._drawing(text, times)
        own = self._given
        delta, scale = own.pop("delta"), own.pop("scale")
        if len(rows := self._asked(text, drawing.empty)):
            concept, empty = self._beside(unet, given, rows, drawing.empty, predicted)
            momentum = torch.zeros_like(concept) if drawing.momentum is None else drawing.momentum
            gamma, drawing.momentum = sld(predicted[rows], concept, empty, momentum, **own)
            if alone or drawing.step >= delta:
                changed = (predicted[rows].to(gamma.dtype) - scale * gamma).to(predicted.dtype)
                predicted = predicted.index_copy(0, rows, changed)
        drawing.last, drawing.step = float(times[0]), drawing.step + 1
        return type(output)(predicted) if hasattr(output, "to_tuple") else (predicted, *more)

    def _drawing(self, text: Tensor, times: Tensor) -> tuple[Drawing, bool]:
        """Where this call is, and whether it stands by itself."""
        alone = torch.is_grad_enabled() or bool((times != times[0]).any())
        if not hasattr(_DRAWN, "by"):
            _DRAWN.by = WeakKeyDictionary()
        found = None if alone else _DRAWN.by.get(self)
        if found is None or not found.goes_on(float(times[0]), text):
            with torch.no_grad():
                empty = self.encoder(self.ids.to(self.encoder.device))[0]
            found = Drawing(float(times[0]), text.detach(), empty)
            if not alone:
                _DRAWN.by[self] = found
        return found, alone

    def _asked(self, text: Tensor, empty: Tensor) -> Tensor:
        """Indices of the rows of a call whose text is not the empty prompt."""
        if text.shape[1:] != empty.shape[1:]:
            raise ValueError(
                f"this guidance filter reads embeddings of shape {tuple(empty.shape[1:])}, and the UNet is given "
                f"{tuple(text.shape[1:])}: pad prompts to the limit of the tokenizer"
            )
        text, empty = text.detach().float(), empty.to(text.device).float()
        return ((text - empty).flatten(1).norm(dim=1) > NEAR * empty.norm()).nonzero()[:, 0]

    def _beside(
        self, unet: nn.Module, given: Mapping, rows: Tensor, blank: Tensor, predicted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """e_S and e_0 for the latents and time steps of these rows of a call."""
        text = given["encoder_hidden_states"]
        count, told = len(text), lambda one: one.to(text.device, text.dtype).expand(len(rows), -1, -1)
        others = [i for i in range(count) if i not in set(rows.tolist())]
        at = lambda name, which: _at(torch.as_tensor(given[name]), torch.as_tensor(which), count)
        same = len(others) == len(rows) and all(
            torch.equal(at(name, others), at(name, rows)) for name in ("sample", "timestep")
        )
        texts = [told(self.tensors["concept"])] + ([] if same else [told(blank)])
        own = {name: _at(one, rows.repeat(len(texts)), count) for name, one in given.items()}
        own |= {"encoder_hidden_states": torch.cat(texts), "return_dict": False}
        found = unet.forward(**own)[0].split(len(rows))  # not unet(): that calls the filter
        return found[0], predicted[others] if same else found[1]


def _at(value, rows: Tensor, count: int):
    """What an argument of a call with `count` rows is for these: tensors of as many rows, inside lists and dicts too;
    anything else is for all of them.
    """
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        return {name: _at(one, rows, count) for name, one in value.items()}
    return type(value)(_at(one, rows, count) for one in value) if isinstance(value, (list, tuple)) else value


def _begins(attention: nn.Module, args: tuple) -> None:
    _VALUES.layer = None


def _ends(attention: nn.Module, args: tuple, output) -> None:
    if _VALUES.layer is not attention.to_v:
        raise ValueError(
            f"values of cross-attention passed by the filter ({type(attention.processor).__name__}, "
            f"{type(attention.to_v).__name__}): inside the block fuse no projections, load no LoRA, set no processor"
        )


def check(kind: str, settings) -> None:
    """ValueError unless the settings of a filter name a formula of its kind."""
    formula = settings.get("formula") if isinstance(settings, dict) else None
    if FORMULAS.get(formula) != kind:
        known = ", ".join(name for name, of in FORMULAS.items() if of == kind)
        raise ValueError(f"a {kind} has one of the formulas {known}, got {formula!r}")


def said(settings: Mapping) -> str:
    """In words: the formula and its settings."""
    own = ", ".join(f"{name}={value}" for name, value in settings.items() if name != "formula")
    return f"{settings['formula']} with {own}"


def in_force(*modules: nn.Module | None) -> bool:
    """Whether a filter stands on a UNet or text encoder now."""
    hooks = [
        hook
        for module in modules
        if module is not None
        for one in uncompiled(module).modules()
        for hook in one._forward_hooks.values()
    ]
    return any(isinstance(getattr(hook, "__self__", None), Filter) for hook in hooks)


@contextmanager
def installed(kind: str, one: Filter, pipeline) -> Iterator[None]:
    """Inside the block a filter acts on the UNet or the text encoder of a pipeline; its hooks go at the end, also after
    an exception. ValueError, with no hook left, where the part is compiled, before or inside the block.
    """
    part = "text_encoder" if kind == "prompt_filter" else "unet"
    check_uncompiled(part, getattr(pipeline, part))
    module = uncompiled(getattr(pipeline, part))
    with ExitStack() as stack:
        keep = lambda handle: stack.callback(handle.remove)
        if kind == "prompt_filter":
            keep(module.register_forward_hook(one.on_states, with_kwargs=True))
        elif kind == "guidance_filter":
            encoder = uncompiled(pipeline.text_encoder)
            ids = token_ids(pipeline.tokenizer, [""]).to(encoder.device)
            guides = GuidanceFilter(one.tensors, one.settings, one.scale, encoder, ids)
            keep(module.register_forward_hook(guides.on_prediction, with_kwargs=True))
        else:
            for attention in cross_attention(module).values():
                keep(attention.register_forward_pre_hook(_begins))
                keep(attention.to_v.register_forward_hook(one.on_values))
                keep(attention.register_forward_hook(_ends))
        yield
    check_uncompiled(part, getattr(pipeline, part))  # what was compiled inside the block keeps the filter
