"""Pipelines that draw and encode by their own methods: every family but Stable Diffusion 1 and 2.

No sampler of ours: what a family does with guidance, time shifts, templates and masks is its pipeline's business. Each
picture has its own generator. Nothing asked for is dropped in silence: what a pipeline does not know is an error.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL.Image import Image
from torch import Tensor

from erasekit.concepts import check_learned_words
from erasekit.sampling import own_noise

# The sizes asked for, not the nearest of a list; captions as they are, whether or not ftfy and bs4 are installed.
PLAIN = {"use_resolution_binning": False, "clean_caption": False}


def known(method: Callable) -> dict[str, inspect.Parameter]:
    """{name: parameter} of a method of a pipeline."""
    return dict(inspect.signature(method).parameters)


def run(pipeline: DiffusionPipeline, **wanted):
    """Call the pipeline with those of the arguments that it knows. ValueError as in `check_learned_words`."""
    for part, one in pipeline.components.items():
        if part.startswith("tokenizer"):
            check_learned_words(one)
    names = known(pipeline.__call__)
    return pipeline(**{name: value for name, value in (PLAIN | wanted).items() if name in names})


def guided(pipeline: DiffusionPipeline, denoiser, guidance: float | None, negative: str | None) -> dict:
    """Arguments for guidance and a negative prompt. guidance None: the pipeline's own.

    A model that was trained with its guidance as an input (FLUX.1-dev) takes it as that; one that was not, and whose
    pipeline can guide in the classic way (`true_cfg_scale`), is guided so, away from " " if nothing else is given (by
    itself Qwen-Image's pipeline does not guide at all without a negative prompt).
    ValueError where a pipeline would ignore what is asked.
    """
    names, name = known(pipeline.__call__), type(pipeline).__name__
    classic = "true_cfg_scale" in names
    embedded = classic and bool(denoiser.config.get("guidance_embeds"))
    if negative is not None and ("negative_prompt" not in names or embedded):
        raise ValueError(
            f"{name} guides without a negative prompt: leave `negative` out, or use model.pipeline"
        )
    if guidance is not None and pipeline.config.get("is_distilled"):
        raise ValueError(f"this {name} is distilled and ignores guidance: leave `guidance` out")
    if not classic or embedded:
        given = {"guidance_scale": guidance, "negative_prompt": negative}
    else:
        scale = names["true_cfg_scale"].default if guidance is None else guidance
        if negative is not None and not scale > 1:
            raise ValueError(f"a negative prompt needs guidance above 1 here, got {scale}: give `guidance`")
        away = (negative or " ") if scale > 1 else None
        given = {"true_cfg_scale": guidance, "negative_prompt": away}
    return {key: value for key, value in given.items() if value is not None}


@torch.no_grad()
def pictures(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    first: int = 0,
    callback: Callable[[dict], None] | None = None,
    height: int | None = None,
    width: int | None = None,
    **wanted,
) -> list[Image]:
    """One batch of pictures, one per prompt and seed, by the pipeline's own call; `wanted`: more of its arguments.

    callback: once a step, with step, timestep, latents and first. ValueError for a pipeline that draws over a picture,
    and where another size comes out than was asked for.
    """
    names, name = known(pipeline.__call__), type(pipeline).__name__
    if "strength" in names:
        raise ValueError(f"{name} draws over a picture: call model.pipeline with one")
    if callback is not None and "callback_on_step_end" not in names:
        raise ValueError(f"{name} does not report its steps: leave `callback` out")
    if callback is not None:
        wanted["callback_on_step_end"] = _reporting(callback, first)
    if "negative_prompt" in wanted:
        wanted["negative_prompt"] = [wanted["negative_prompt"]] * len(prompts)
    size = {side: asked for side, asked in (("height", height), ("width", width)) if asked is not None}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with own_noise(pipeline.scheduler, generators):
        drawn = run(
            pipeline,
            prompt=[*prompts],  # a new list: Z-Image's pipeline writes its template into it
            generator=generators,
            **size,
            **wanted,
        ).images
    for side, asked in size.items():
        if (found := getattr(drawn[0], side)) != asked:
            raise ValueError(
                f"{name} drew {found} pixels for {side}={asked}: give a multiple of what it can draw"
            )
    return drawn


def _reporting(callback: Callable[[dict], None], first: int) -> Callable:
    def report(pipeline, step, timestep, tensors):
        callback({"step": step, "timestep": float(timestep), "latents": tensors["latents"], "first": first})
        return {}

    return report


@torch.no_grad()
def embeddings(pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device) -> Tensor:
    """The sequence embeddings (n, length, d) that the pipeline's `encode_prompt` gives, each prompt by itself.

    Settings such as the longest length are those of a call of the pipeline. ValueError for prompts of different lengths
    in a family that does not pad them.
    """
    names, defaults = known(pipeline.encode_prompt), known(pipeline.__call__)
    given = {
        name: defaults[name].default
        for name in names
        if name in defaults and defaults[name].default is not inspect.Parameter.empty
    }
    given |= {"prompt_2": None, "prompt_3": None, "prompt_4": None, "device": device, "clean_caption": False}
    given |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    given = {name: value for name, value in given.items() if name in names}
    found = []
    for prompt in prompts:
        first = pipeline.encode_prompt(**given | {"prompt": [prompt]})
        while not isinstance(first, Tensor):
            first = first[0]
        found.append(first.reshape(-1, first.shape[-1]))
    lengths = {len(one) for one in found}
    if len(lengths) > 1:
        raise ValueError(
            f"{type(pipeline).__name__} does not pad its prompts, and these have {sorted(lengths)} rows: encode them "
            "one at a time"
        )
    return torch.stack(found)


@contextmanager
def silently() -> Iterator[None]:
    """No advice from diffusers, for calls that look at a pipeline and draw nothing."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)
