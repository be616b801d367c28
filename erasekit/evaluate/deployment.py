"""Deployment: what users do to an edited model, with no attacker among them, and whether the concept comes back.

    from erasekit.evaluate import deployment, protocols

    steps = deployment.steps("dog", neighbour="cat")
    used = evaluate.run(model, edit, protocols.deployment("dog"), step=steps["merged, 50 %"])
    deployment.handover(model, edit, protocols.deployment("dog"))     # at which step is the concept decided?

A step draws by a model with an edit (or with none) as it would be used, and leaves model and edit as they were.
`rounded` and `pruned` change a model inside a `with` block and can be used by themselves.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image
from torch import Tensor, nn

from erasekit import filters
from erasekit.concepts import subject_span
from erasekit.edits import Edit, applied
from erasekit.evaluate import metrics, runs
from erasekit.evaluate.protocols import Protocol
from erasekit.models import DiffusionModel
from erasekit.tokens import embed, layout, opened

Group = Literal["weights", "sampler", "handover", "prompt", "picture"]
GROUP_SIZE = 32  # weights that share a scale where they are rounded to whole numbers
FLOATS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
AS_IT_IS = "as it is"
FAR = 1000  # added to a picture's seed for the picture that it starts from


class NoMeaning(ValueError):
    """The step cannot be done with this kind of edit, or of model."""


@dataclass(frozen=True)
class Step:
    """One way of use. name: as tables show it. how: draws, called as `draw` calls it. settings: its further arguments,
    which with `how` say all that a picture depends on. of_edit: whether it does nothing to an unedited model.
    """

    name: str
    group: Group
    how: Callable[..., list[Image.Image]] = field(repr=False)
    settings: Mapping = field(default_factory=dict)
    of_edit: bool = False

    def draw(
        self,
        model: DiffusionModel,
        edit: Edit | None,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
    ) -> list[Image.Image]:
        """A picture for each prompt and seed. NoMeaning where the step cannot be done with the edit or the model."""
        return self.how(
            model, edit, list(prompts), list(seeds), steps=steps, guidance=guidance, **self.settings
        )

    def key(self, edit: Edit | None) -> str:
        """What tells its pictures from those of other steps and edits."""
        settings = json.dumps(self.settings, default=_told, sort_keys=True)
        return f"{self.how.__name__} {settings} of {edit.digest if edit else None}"


def _told(one: Edit | Tensor | Path):
    if isinstance(one, Path):
        return hashlib.sha256(one.read_bytes()).hexdigest()
    return one.digest if isinstance(one, Edit) else one.tolist()


# Weights


@contextmanager
def rounded(model: DiffusionModel, form: str) -> Iterator[DiffusionModel]:
    """Inside the block the weights of the denoiser and the text encoders are those that a rounded model computes with.

    form: "bf16" and "fp8" (e4m3), every parameter cast there and back; "int8", "int4", "int3": weights of Linear and
    Conv2d layers in groups of 32 along their inputs, each group's range in 2^bits equal steps. ValueError where these
    are not the weights that the model computes with (`DiffusionModel.check_editable`).
    """
    if form not in FLOATS and form not in ("int8", "int4", "int3"):
        raise ValueError(f"unknown form {form!r}: choose bf16, fp8, int8, int4 or int3")
    if form in FLOATS:
        change = lambda one: one.to(FLOATS[form]).to(one.dtype)
    else:
        change = lambda one: _whole(one, int(form[3:]))
    with _changed(model, change, everything=form in FLOATS):
        yield model


def _whole(weight: Tensor, bits: int) -> Tensor:
    flat = weight.float().flatten(1)
    groups = nn.functional.pad(flat, (0, -flat.shape[1] % GROUP_SIZE), mode="replicate").unflatten(
        1, (-1, GROUP_SIZE)
    )
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    near = (((groups - low) / scale).round() * scale + low).flatten(1)[:, : flat.shape[1]]
    return near.view_as(weight).to(weight.dtype)


@contextmanager
def pruned(model: DiffusionModel, share: float) -> Iterator[DiffusionModel]:
    """Inside the block the given share of each Linear and Conv2d layer's weights is zero, the smallest in magnitude."""
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")

    def change(weight: Tensor) -> Tensor:
        least = weight.abs().flatten().kthvalue(max(1, int(share * weight.numel()))).values
        return weight.masked_fill(weight.abs() <= least, 0)

    with _changed(model, change):
        yield model


@contextmanager
def _changed(
    model: DiffusionModel, change: Callable[[Tensor], Tensor], everything: bool = False
) -> Iterator[None]:
    model.check_editable()
    model.fingerprint()  # of the weights before they are changed
    modules = [model.denoiser, *model.text_encoders.values()]
    layers = [one for module in modules for one in module.modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    wanted = (
        [p for one in modules for p in one.parameters()] if everything else [one.weight for one in layers]
    )
    old = [(parameter, parameter.data) for parameter in wanted]
    try:
        for parameter, data in old:
            parameter.data = change(data)
        yield
    finally:
        for parameter, data in old:
            parameter.data = data


def _within(
    context: Callable[..., AbstractContextManager], model, edit, prompts, seeds, sampling, **settings
):
    with applied(edit, model), context(model, **settings):
        return model.generate(prompts, seeds, **sampling)


def _rounded(model, edit, prompts, seeds, *, form, **sampling):
    return _within(rounded, model, edit, prompts, seeds, sampling, form=form)


def _pruned(model, edit, prompts, seeds, *, share, **sampling):
    return _within(pruned, model, edit, prompts, seeds, sampling, share=share)


def _merged(model, edit, prompts, seeds, *, scale, sibling=None, sibling_scale=0.0, **sampling):
    """W + scale (W_edited - W) + sibling_scale (W_sibling - W): an edit at strength s is the average of weights with
    share s, since what it adds to a weight is linear in its strength. The edit comes first: a map of an edit multiplies
    the weights that it finds. NoMeaning for a part of a filter, which is in no weight that could be averaged.
    """
    if edit is not None and edit.kind in filters.KINDS and scale != 1:
        raise NoMeaning(f"a {edit.kind} is in no weight, and models are averaged by their weights")
    with applied(edit, model, scale), applied(sibling, model, sibling_scale):
        return model.generate(prompts, seeds, **sampling)


def _with_lora(model, edit, prompts, seeds, *, lora, **sampling):
    """A LoRA loaded into the edited model, by stock diffusers, and unloaded: none may be there already. NoMeaning for a
    filter of values, behind which the LoRA would add its own.
    """
    model.check_editable()
    if edit is not None and edit.kind == "attention_filter":
        raise NoMeaning("a LoRA that is loaded over an attention_filter adds to the values behind it")
    with applied(edit, model):
        model.pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
        try:
            return model.generate(prompts, seeds, **sampling)
        finally:
            model.pipeline.unload_lora_weights()


def _torchao(model: DiffusionModel) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.unet, Int8WeightOnlyConfig())


def _quanto(model: DiffusionModel) -> None:
    from optimum import quanto

    quanto.quantize(model.unet, weights=quanto.qint8)
    quanto.freeze(model.unet)


def _tomesd(model: DiffusionModel) -> None:
    import tomesd

    tomesd.apply_patch(model.unet, ratio=0.5)


PACKAGES = {  # what it does, its module, and how
    "int8 by torchao": ("torchao", _torchao),
    "int8 by quanto": ("optimum.quanto", _quanto),
    "half the tokens merged by tomesd": ("tomesd", _tomesd),
}


def installed(module: str) -> bool:
    """Whether a package of `PACKAGES` is there."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it stands in
        return False


def _packaged(model, edit, prompts, seeds, *, by, **sampling):
    """A package changes the UNet that `merged` returns, a model of its own. NoMeaning for a filter, which no weights
    hold.
    """
    if edit is not None and edit.kind in filters.KINDS:
        raise NoMeaning(f"a {edit.kind} is in no weight, and a package is given a model's weights")
    model.check_editable()
    used = model.copy() if edit is None else edit.merged(model)
    PACKAGES[by][1](used)
    return used.generate(prompts, seeds, **sampling)


# Sampler


def _sampled(model, edit, prompts, seeds, *, changes, sampler=None, **sampling):
    with applied(edit, model), runs.sampled_by(model, sampler or type(model.scheduler).__name__):
        return model.generate(prompts, seeds, **sampling | changes)


def _handed_over(model, edit, prompts, seeds, *, at, first, steps, guidance):
    """The first `at` steps by the model `first` ("edited" or "unedited"), the others by the other: a base and a
    refiner of which one was edited, each with its own text.
    """
    order = (edit, None) if first == "edited" else (None, edit)
    drawn = None
    for one, skip, stop in ((order[0], 0, at), (order[1], at, steps)):
        with applied(one, model):
            if skip < stop:
                drawn = model.draw(
                    model.conditioning(prompts),
                    seeds,
                    steps=steps,
                    guidance=guidance,
                    start=drawn,
                    skip=skip,
                    stop=stop,
                    decode=stop == steps,
                )
    return drawn


# Prompts


def _reworded(model, edit, prompts, seeds, *, phrases, form, **sampling):
    """Another spelling of the phrase: "{}s"; capitals where the form is "upper"."""
    other = (lambda phrase: phrase.upper()) if form == "upper" else form.format
    changed = [text.replace(found, other(found)) for text, found in _found(prompts, phrases)]
    with applied(edit, model):
        return model.generate(changed, seeds, **sampling)


def _found(prompts: Sequence[str], phrases: Sequence[str]) -> list[tuple[str, str]]:
    """Each prompt with the phrase that it holds, of several the longest."""
    found = []
    for text in prompts:
        held = [phrase for phrase in phrases if phrase in text]
        if not held:
            raise ValueError(f"{text!r} holds none of {', '.join(phrases)}")
        found.append((text, max(held, key=len)))
    return found


def _weighted(model, edit, prompts, seeds, *, phrases, factor, **sampling):
    """(phrase:factor), as compel weighs: rows x of the phrase become x_0 + factor (x - x_0), x_0 those of the empty
    prompt.
    """
    with applied(edit, model):
        told, empty = model.conditioning(prompts), model.conditioning("").rows[0]
        rows = told.rows.clone()
        for i, (text, phrase) in enumerate(_found(prompts, phrases)):
            at = list(subject_span(model.tokenizer, text, phrase))
            rows[i, at] = empty[at] + factor * (rows[i, at] - empty[at])
        return model.draw(told.with_rows(rows), seeds, **sampling)


def _blended(model, edit, prompts, seeds, *, phrases, other, share, **sampling):
    """Embeddings `share` of the way from the prompt to the same with another thing in place of the phrase."""
    changed = [text.replace(phrase, other) for text, phrase in _found(prompts, phrases)]
    with applied(edit, model):
        told = model.conditioning(prompts)
        rows = torch.lerp(told.rows, model.conditioning(changed).rows, share)
        return model.draw(told.with_rows(rows), seeds, **sampling)


def _negative(model, edit, prompts, seeds, *, negative, **sampling):
    with applied(edit, model):
        return model.generate(prompts, seeds, negative=negative, **sampling)


def _spared(model, edit, prompts, seeds, **sampling):
    """The negative branch by the unedited weights: W' x = W (T x), so a closed form is drawn by the unedited model from
    mapped rows T x of the prompt, and the unconditional rows stay as they are.
    """
    told = model.conditioning(prompts)
    if edit is not None:
        if edit.kind != "context_map":
            raise NoMeaning(f"a {edit.kind} edit is not one map of the rows that cross-attention reads")
        told = told.with_rows(edit.context_map.apply(told.rows).to(model.dtype))
    return model.draw(told, seeds, **sampling)


def _learned(model, edit, prompts, seeds, *, phrases, rows, **sampling):
    """A word (tokens, d) in place of the phrase, as textual inversion of the unedited model learned it."""
    found = _found(prompts, phrases)
    laid = [layout(one, [opened(one, *held, len(rows)) for held in found]) for one in model.tokenizers]
    encoders, scale = list(model.text_encoders.values()), model.pipeline.vae_scale_factor
    with applied(edit, model), torch.no_grad():
        text = embed(encoders, laid, rows.repeat(len(prompts), 1).to(model.device), scale)
        return model.draw(text, seeds, **sampling)


# Pictures


def _from_picture(model, edit, prompts, seeds, *, strength, steps, guidance, mask=False):
    """Image to image by stock diffusers, from the unedited model's picture of the same prompt and another seed. mask:
    inpaint the right half of it.
    """
    if mask and (channels := model.unet.config.in_channels) not in (4, 9):
        raise NoMeaning(f"stock pipelines inpaint with UNets of 4 or 9 channels, not of {channels}")
    shown = model.generate(prompts, [seed + FAR for seed in seeds], steps=steps, guidance=guidance)
    maker = AutoPipelineForInpainting if mask else AutoPipelineForImage2Image
    pipeline = maker.from_pipe(model.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    size, given = model.batch_size, {}
    if mask:
        width, height = shown[0].size
        half = Image.new("L", (width, height), 0)
        half.paste(255, (width // 2, 0, width, height))
        given = {"height": height, "width": width}
    drawn = []
    with applied(edit, model):
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            if mask:
                given["mask_image"] = [half] * len(prompts[part])
            drawn += pipeline(
                prompt=prompts[part],
                image=shown[part],
                strength=strength,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                **given,
            ).images
    return drawn


# All of them


def steps(
    phrases: str | Sequence[str],
    neighbour: str,
    *,
    number: int = 10,
    sibling: Edit | None = None,
    lora: Path | None = None,
    word: Tensor | None = None,
) -> dict[str, Step | None]:
    """{name: step}, the plain use, None, first.

    phrases: what the prompts call the concept. neighbour: another thing, to blend with and as a negative prompt.
    number: of the protocol's steps, for handing over. sibling: fine-tuning of the unedited model, as an edit of it;
    lora: the file of a LoRA that stock diffusers loads; word: (tokens, d), learned for the concept by textual
    inversion of the unedited model. Steps that need one that is not given are left out, and those of `PACKAGES` that
    are not installed.
    """
    phrases = [phrases] if isinstance(phrases, str) else list(phrases)
    made = []
    add = lambda name, group, how, **settings: made.append(Step(name, group, how, settings))
    of_edit = lambda name, group, how, **settings: made.append(Step(name, group, how, settings, of_edit=True))
    for form in ("bf16", "fp8", "int8", "int4", "int3"):
        add(f"rounded to {form}", "weights", _rounded, form=form)
    for share in (0.2, 0.4):
        add(f"pruned, {share:.0%}", "weights", _pruned, share=share)
    for name, (module, _) in PACKAGES.items():
        if installed(module):
            add(name, "weights", _packaged, by=name)
    for scale in (0.25, 0.5, 0.75):
        of_edit(f"averaged with the unedited, {scale:.0%} edited", "weights", _merged, scale=scale)
    for scale in (1.5, 2.0):
        of_edit(f"strength {scale}", "weights", _merged, scale=scale)
    if sibling is not None:
        half = {"scale": 0.5, "sibling_scale": 0.5}
        add("averaged with a fine-tuned sibling, half each", "weights", _merged, sibling=sibling, **half)
        whole = {"scale": 1.0, "sibling_scale": 1.0}
        add("added to a fine-tuned sibling, by difference", "weights", _merged, sibling=sibling, **whole)
    if lora is not None:
        add("an ordinary LoRA loaded", "weights", _with_lora, lora=lora)
    add("DDIM, 25 steps", "sampler", _sampled, sampler="DDIMScheduler", changes={"steps": 25})
    add("Euler, 15 steps", "sampler", _sampled, sampler="EulerDiscreteScheduler", changes={"steps": 15})
    for guidance in (1.0, 7.5):
        add(f"guidance {guidance:g}", "sampler", _sampled, changes={"guidance": guidance})
    for at in sorted({1, number // 5, 2 * number // 5, 3 * number // 5} - {0}):
        of_edit(f"first {at} of {number} steps unedited", "handover", _handed_over, at=at, first="unedited")
    for at in sorted({2 * number // 5, 4 * number // 5} - {0}):
        name = f"first {at} of {number} steps edited, the rest not"
        of_edit(name, "handover", _handed_over, at=at, first="edited")
    for name, form in (("plural", "{}s"), ("capitals", "upper"), ("cute", "cute {}"), ("possessive", "{}'s")):
        add(f"spelled otherwise: {name}", "prompt", _reworded, phrases=phrases, form=form)
    for factor in (1.5, 2.0):
        add(f"weighted by {factor}", "prompt", _weighted, phrases=phrases, factor=factor)
    add(f"blended with {neighbour}, half", "prompt", _blended, phrases=phrases, other=neighbour, share=0.5)
    add(f"negative prompt: {neighbour}", "prompt", _negative, negative=neighbour)
    of_edit("unedited negative branch", "prompt", _spared)
    if word is not None:
        add("a word learned on the unedited model", "prompt", _learned, phrases=phrases, rows=word)
    for strength in (0.3, 0.5, 0.7):
        add(f"from a picture of it, strength {strength}", "picture", _from_picture, strength=strength)
    add("half of a picture of it painted anew", "picture", _from_picture, strength=1.0, mask=True)
    return {AS_IT_IS: None} | {step.name: step for step in made}


def handover(
    model: DiffusionModel,
    edit: Edit,
    protocol: Protocol,
    *,
    at: Sequence[int] | None = None,
    progress: bool = False,
    **where,
) -> pd.DataFrame:
    """At which step is the concept decided? One row for each handover and order: first ("unedited" or "edited"), at
    (steps by the first), rate of the protocol's first measure with its interval, text.

    at: 0 to the protocol's number of steps when None. where: `folder` of `runs.run`. Near the noise the unedited model
    decides what is drawn where "unedited first" brings the concept back within few steps.
    """
    rows = []
    for first in ("unedited", "edited"):
        for k in range(protocol.steps + 1) if at is None else at:
            step = Step(f"handover, {first} first, {k}", "handover", _handed_over, {"at": k, "first": first})
            found = runs.run(model, edit, protocol, step=step, progress=progress, **where).measured()
            value = found[protocol.measures[0].name]
            rows.append({"first": first, "at": k, **value, "text": metrics.text(value)})
    return pd.DataFrame(rows)
