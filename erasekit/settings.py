"""What the settings of a method or attack must be, which are taken, and what every `fit` asks first."""

import dataclasses
from collections.abc import Mapping, Sequence

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


def check(config, **least) -> None:
    """ValueError unless each named field is a number of at least the given one."""
    for name, minimum in least.items():
        value = getattr(config, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not minimum <= value < float("inf")
        ):
            raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    for field in dataclasses.fields(config):
        if field.type in (int, "int") and not isinstance(getattr(config, field.name), int):
            raise ValueError(f"{field.name} must be a whole number, got {getattr(config, field.name)!r}")


def chosen(presets: Mapping, model: DiffusionModel, config, other: str):
    """`config`, or the preset "emoji" of the emoji model, or that of the name `other`."""
    return config or presets["emoji" if model.preset == "emoji" else other]


def for_fit(presets: Mapping, model: DiffusionModel, config):
    """The settings of a `fit`, of a model that can be edited: else a ValueError that says what to do."""
    model.check_fit()
    return chosen(presets, model, config, "sd14-object")


def asked(
    presets: Mapping,
    model: DiffusionModel,
    config,
    erase,
    preserve,
    anchor,
    generator: torch.Generator | None,
) -> tuple:
    """What a `fit` that trains is asked for: the settings, the concepts to erase, and the generator, seed 0 if None.

    ValueError for a model that cannot be edited, or not be trained as it was loaded, for a denoiser that is no UNet,
    for nothing to erase, and for names that are unknown to the world, among those to preserve and the anchor as well.
    """
    if model.denoiser_part != "unet":
        raise ValueError(
            f"this method trains the UNet of Stable Diffusion 1 or 2, and {type(model.pipeline).__name__} has a "
            f"{type(model.denoiser).__name__}: erase by a closed form (uce, rece) instead"
        )
    config = for_fit(presets, model, config)
    if model.dtype is torch.float16 and model.device.type == "cpu":
        raise ValueError(
            "training in float16 needs a GPU: load the model with dtype='float32', or 'bfloat16' to save memory"
        )
    erased = model.concepts(erase)
    model.concepts(preserve)
    if isinstance(anchor, str) and anchor.strip():
        model.concepts(anchor)
    if not erased:
        raise ValueError("there is nothing to erase: name at least one concept")
    return config, erased, torch.Generator().manual_seed(0) if generator is None else generator


def anchored(model: DiffusionModel, concept: Concept, given: str | Concept | None, default: str) -> str:
    """What is drawn instead of a concept: `given`, else its own anchor, else the default. ValueError where `given` is
    unknown to the world.
    """
    if isinstance(given, Concept):
        return given.name
    if given is None:
        return default if concept.anchor is None else concept.anchor
    if given.strip():
        model.concepts(given)  # an unknown anchor is an error, as an unknown concept is
    return given


def erase_prompts(concepts: Sequence[Concept], templates: Sequence[str]) -> list[str]:
    """Every concept in its own templates, or in these."""
    return [fill(t, concept.name)[0] for concept in concepts for t in concept.templates or templates]
