"""What the settings of a method or attack must be, which are taken, and what every `fit` asks first."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from erasekit.concepts import Concept, fill
from erasekit.models import DiffusionModel

EMOJI_TEMPLATES = (
    "{}",
    "a {}",
    "a {} in noto style",
    "a {} in twemoji style",
    "a {} in flat style",
    "a {} in ink style",
    "a {} in glossy style",
)
EMOJI_CAPTIONS = ("{}", "a {}", "a {} in flat style", "An {} image in flat style.")  # fewer, for closed forms


def check(config, **least) -> None:
    """ValueError unless each named field is a number of at least the given one, each of type int a whole number (or of
    type int | None none at all), and each of type float finite.
    """
    for name, minimum in least.items():
        value = getattr(config, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not minimum <= value < float("inf")
        ):
            raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        whole = field.type in (int, "int") or field.type in (int | None, "int | None") and value is not None
        if whole and not isinstance(value, int):
            raise ValueError(f"{field.name} must be a whole number, got {value!r}")
        finite = isinstance(value, (int, float)) and math.isfinite(value)
        if field.type in (float, "float") and not finite:
            raise ValueError(f"{field.name} must be a finite number, got {value!r}")


def chosen(presets: Mapping, model: DiffusionModel, config, other: str):
    """`config`, or the preset of the model's world, of its family ("sdxl", and "flux" for every transformer), or where
    there is none that of the name `other`. ValueError for what is no Config.
    """
    if config is not None and not isinstance(config, tuple({type(one) for one in presets.values()})):
        name = config if isinstance(config, str) and config in presets else next(iter(presets))
        raise ValueError(f"config is a Config, such as PRESETS[{name!r}], got {config!r}")
    family = None if model.own_loop else {"unet": "sdxl", "transformer": "flux"}[model.denoiser_part]
    return config or next(presets[name] for name in (model.preset, family, other) if name in presets)


def asked(
    presets: Mapping,
    model: DiffusionModel,
    config,
    erase,
    preserve,
    anchor,
    generator: torch.Generator | None,
    *,
    trains: bool | Callable = True,
    families: bool = False,
) -> tuple:
    """What a `fit` is asked for: settings, concepts to erase, concepts to preserve, and the generator, seed 0 if None.

    config None: the preset of the model's world or family, or "sd14-object". trains: whether the method trains, or a
    function that says whether it does with these settings. ValueError for a model that cannot be edited, or, of a `fit`
    that trains, not be trained as it was loaded or, unless it knows all `families`, without a UNet, for nothing to
    erase, and for names that are unknown to the world, the anchor's as well.
    """
    config = chosen(presets, model, config, "sd14-object")
    trains = trains(config) if callable(trains) else trains
    if trains and not families and model.denoiser_part != "unet":
        raise ValueError(
            f"this method trains on Stable Diffusion 1, 2 and XL, and {type(model.pipeline).__name__} has a "
            f"{type(model.denoiser).__name__}: erase by a closed form (uce, rece, mace and realera with lora=False, "
            "trce with stages='text') or by esd instead"
        )
    model.check_fit()
    if trains and model.dtype is torch.float16 and model.device.type == "cpu":
        raise ValueError(
            "training in float16 needs a GPU: load the model with dtype='float32', or 'bfloat16' to save memory"
        )
    erased, preserved = model.concepts(erase), model.concepts(preserve)
    if isinstance(anchor, str) and anchor.strip():
        model.concepts(anchor)
    if not erased:
        raise ValueError("there is nothing to erase: name at least one concept")
    return config, erased, preserved, torch.Generator().manual_seed(0) if generator is None else generator


def check_first_family(model: DiffusionModel, method: str) -> None:
    """ValueError for other models than Stable Diffusion 1 and 2, of a method that changes how these read text."""
    if not model.own_loop:
        raise ValueError(
            f"{method} is for Stable Diffusion 1 and 2; {type(model.pipeline).__name__} reads text elsewhere as well: "
            "erase by uce or rece instead"
        )


def check_no_anchor(anchor: str | Concept | None, method: str) -> None:
    """ValueError for an anchor that a method would not draw."""
    if anchor is not None:
        raise ValueError(
            f"{method} puts nothing in the place of a concept: leave anchor out, or erase by uce or dp"
        )


def about(
    erased: Sequence[Concept], instead: Sequence[str], preserved: Sequence[Concept]
) -> dict[str, list[str]]:
    """The concepts of an edit by name, as its metadata has them."""
    names = lambda concepts: [one.name for one in concepts]
    return {"erase": names(erased), "anchor": list(instead), "preserve": names(preserved)}


def apart(erased: Sequence[Concept], preserved: Sequence[Concept], synonyms: bool = False) -> None:
    """ValueError for a concept that is both erased, with `synonyms` also as one of these, and preserved."""
    phrases = {phrase.lower() for one in erased for phrase in (one.name, *(one.synonyms if synonyms else ()))}
    if both := phrases & {one.name.lower() for one in preserved}:
        raise ValueError(
            f"{', '.join(sorted(both))} cannot be both erased and preserved: take it out of one list"
        )


def anchors(erased: Sequence[Concept], given: str | Concept | None, default: str) -> list[str]:
    """What is drawn instead of each concept: `given`, else its own anchor, else the default."""
    if given is None:
        return [default if one.anchor is None else one.anchor for one in erased]
    return [given.name if isinstance(given, Concept) else given] * len(erased)


def warn_of_itself(pairs: Iterable[tuple[Concept | str, str]]) -> None:
    """UserWarning, at the caller of a `fit`, for concepts or phrases that are their own anchor, which stands beside."""
    named = [(one.name if isinstance(one, Concept) else one, anchor) for one, anchor in pairs]
    if same := [name for name, anchor in named if name.strip().lower() == anchor.strip().lower()]:
        warnings.warn(
            f"{', '.join(dict.fromkeys(same))}: its own anchor, so nothing is put in its place; name another anchor",
            stacklevel=3,
        )


def erase_prompts(concepts: Sequence[Concept], templates: Sequence[str]) -> list[str]:
    """Every concept in its own templates, or in these."""
    return [fill(t, concept.name)[0] for concept in concepts for t in concept.templates or templates]
