"""One drawing before and after an edit, seen step by step: what is estimated, where attention goes, what a judge sees.

`watch` draws one picture and keeps its steps; `studio` shows two of them side by side. It does not import ipywidgets
unless it is live.
"""

import asyncio
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from erasekit.concepts import token_ids
from erasekit.edits import Edit, applied
from erasekit.evaluate.judges import JUDGES, checked
from erasekit.figures import METHOD_COLORS, METHOD_NAMES
from erasekit.layers import attention_with_gradient, grid_of
from erasekit.methods import METHODS
from erasekit.models import DiffusionModel

if TYPE_CHECKING:
    from ipywidgets import VBox

LIVE = ("uce", "rece", "dp", "speed", "oce", "adavd", "semantic_surgery")  # fitted in about a second
AS_IT_IS, SURE = "no edit", 0.5
PICTURE = 256  # screen pixels of a small picture


@dataclass(frozen=True, eq=False)
class Drawing:
    """One picture and its way. estimates: of every step the clean picture that its prediction stands for, and at the
    end the picture itself. tokens: of the prompt, start and end among them. maps: cross-attention of every step,
    (steps, tokens, height, width), mean over layers and heads; None where it could not be recorded, `why`.
    """

    estimates: tuple[Image.Image, ...]
    tokens: tuple[str, ...]
    maps: Tensor | None
    why: str = ""

    def map_of(self, token: int, step: int) -> Image.Image:
        """The map of a token as a grey picture, white where it is largest in all steps; after the last step its own."""
        of = self.maps[:, token]
        level = of[min(step, len(of) - 1)] / of.max()
        return Image.fromarray((255 * level).round().byte().numpy())


def estimated(model: DiffusionModel, state: dict, guidance: float) -> Tensor:
    """x_0 as the prediction of a step of `sampling.walk` has it, latents (n, channels, height, width):
    (x_t - sqrt(1 - abar) eps) / sqrt(abar), and for v, sqrt(abar) x_t - sqrt(1 - abar) v.
    """
    text, uncond = state["text"], state["uncond"]
    said = text if uncond is None else uncond + guidance * (text - uncond)
    share = model.scheduler.alphas_cumprod[state["timestep"]].to(said)
    if model.scheduler.config.prediction_type == "v_prediction":
        return share.sqrt() * state["sample"] - (1 - share).sqrt() * said
    return (state["sample"] - (1 - share).sqrt() * said) / share.sqrt()


def watch(
    model: DiffusionModel,
    edit: Edit | None,
    prompt: str,
    seed: int = 0,
    *,
    strength: float = 1.0,
    steps: int | None = None,
    guidance: float = 3.0,
) -> Drawing:
    """Draw one prompt under an edit (None: the model as it is) and keep every step. The picture is the one that
    `generate` gives. ValueError for a family that its own pipeline draws, and as in `Edit.applied`.
    """
    model.check_drawn()
    if model._active:
        raise ValueError("an edit is applied to this model: leave its `with` block first")
    # an attention filter leaves maps of one kind of processor alone: then the picture is drawn without them
    filtered = edit is not None and edit.kind == "attention_filter"
    latents, maps = [], []
    with nullcontext({}) if filtered else attention_with_gradient(model.unet) as seen:

        def note(state: dict) -> None:
            latents.append(estimated(model, state, guidance))
            if seen:
                maps.append(_averaged(seen, latents[-1].shape[-2:]))

        with applied(edit, model, strength):
            (picture,) = model.generate([prompt], [seed], steps, guidance, batch_size=1, callback=note)
    ids = token_ids(model.tokenizer, [prompt])[0].tolist()
    count = min(len(ids), ids.index(model.tokenizer.eos_token_id) + 1)
    names = [model.tokenizer.decode([one]).strip() or "?" for one in ids[1 : count - 1]]
    return Drawing(
        (*model.decode(torch.cat(latents)), picture),
        ("start", *names, "end"),
        torch.stack(maps)[:, :count] if maps else None,
        "an edit that filters attention is drawn without maps" if filtered else "",
    )


def _averaged(seen: Mapping[str, Tensor], size: Sequence[int]) -> Tensor:
    """(tokens, height, width) of what `attention_with_gradient` saw of one picture, guided or not."""
    found = []
    for probabilities in seen.values():
        one = probabilities[-1].detach().float().mean(0)  # (pixels, tokens); guidance puts the prompt last
        grid = one.T.unflatten(1, grid_of(len(one), tuple(size)))
        found.append(F.interpolate(grid[None], tuple(size), mode="bilinear", align_corners=False)[0])
    return torch.stack(found).mean(0).cpu()


def verdict(model: DiffusionModel, pictures: Sequence[Image.Image]) -> list[str]:
    """What the world's judge sees on each picture: a name with its probability, or "none" where no name has half of
    it. Empty texts for a model without a world of its own.
    """
    if not model.everything:
        return [""] * len(pictures)
    said = []
    for record in checked(JUDGES["emoji-object"](), pictures, [""] * len(pictures)):
        name = max(record, key=record.get)
        shown = name if record[name] >= SURE else f"none, at most {name}"
        said.append(f"{shown} {record[name]:.2f}")
    return said


def studio(
    model: DiffusionModel,
    concept: str | None = None,
    *,
    edits: Mapping[str, Edit] | None = None,
    interactive: bool = True,
    prompt: str | None = None,
    preserve: Sequence[str] = (),
    method: str = "uce",
    seed: int = 0,
    steps: int | None = None,
    guidance: float = 3.0,
) -> "VBox | Figure":
    """Erase something and watch it being drawn, before and after, from the same noise.

    As the last value of a cell the result shows itself:

        studio(model, "dog", preserve=["cat"], interactive=interactive)

    With `interactive` it is a panel: concept, method, strength, what is preserved, prompt and seed; a slider through
    the steps, the cross-attention of a chosen token beside each picture, and what the world's judge sees on the
    finished ones, "none" where it is not sure. Methods that take about a second are fitted there (`LIVE`) and kept;
    `edits` {label: Edit} adds what was trained before. What cannot be done is said in the panel. Without
    `interactive`, one figure of the same for the first settings.

    concept, prompt: when None, the first concept of the model's world, and "a" with its name. Raises ValueError for a
    model without a world where neither is given, for a method that is not live, and for edits of another model.
    """
    edits = dict(edits or {})
    for label, edit in edits.items():
        if not isinstance(edit, Edit):
            raise ValueError(f"edits[{label!r}] is a {type(edit).__name__}: expected what fit returned")
        edit._check_base(model)
    if method not in (*LIVE, *edits):
        raise ValueError(f"method must be one of {', '.join((*LIVE, *edits))}, got {method!r}")
    if concept is None:
        if not model.everything:
            raise ValueError("this model has no world of its own: say which concept to erase")
        concept = model.everything[0].name
    prompt = f"a {concept}" if prompt is None else prompt

    @lru_cache(maxsize=32)
    def fitted(name: str, about: str, kept: tuple[str, ...]) -> Edit:
        return edits[name] if name in edits else METHODS[name].fit(model, about, list(kept))

    @lru_cache(maxsize=32)
    def drawn(edit: Edit | None, strength: float, text: str, number: int) -> Drawing:
        return watch(model, edit, text, number, strength=strength, steps=steps, guidance=guidance)

    def both(name: str, about: str, kept: tuple[str, ...], strength: float, text: str, number: int):
        before = drawn(None, 1.0, text, number)
        if name == AS_IT_IS or not strength:
            return before, before
        return before, drawn(fitted(name, about, kept), strength, text, number)

    first = (method, concept, tuple(preserve), 1.0, prompt, seed)
    if interactive:
        return _panel(model, list(edits), both, first)
    return _figure(model, *both(*first), prompt, METHOD_NAMES.get(method, method), concept)


def _figure(
    model: DiffusionModel, before: Drawing, after: Drawing, prompt: str, name: str, concept: str
) -> Figure:
    import matplotlib.pyplot as plt

    last = len(before.estimates) - 1
    at = sorted({round(part * last) for part in (0, 0.25, 0.5, 0.75, 1)})
    token = _token_of(before.tokens, concept)
    fig, axs = plt.subplots(2, len(at) + 1, figsize=(1.25 * (len(at) + 1), 2.9), layout="constrained")
    seen = verdict(model, [before.estimates[-1], after.estimates[-1]])
    for row, (label, way, judged) in enumerate(zip(("before", name), (before, after), seen, strict=True)):
        for ax, step in zip(axs[row], at, strict=False):
            ax.imshow(way.estimates[step])
            ax.set_title("the picture" if step == last else f"step {step + 1} of {last}", fontsize=7)
        if way.maps is not None:
            axs[row, -1].imshow(way.map_of(token, last // 2), cmap="magma")
            axs[row, -1].set_title(f"attention to\n{way.tokens[token]!r}, step {last // 2 + 1}", fontsize=7)
        axs[row, 0].set_ylabel(label, fontsize=8)
        axs[row, -2].set_xlabel(textwrap.fill(f"judge: {judged}" if judged else "", 16), fontsize=7)
    for ax in axs.flat:
        ax.set(xticks=[], yticks=[])
        ax.set_frame_on(False)
    fig.suptitle(f'"{prompt}": the clean picture as each step estimates it', fontsize=8)
    plt.close(fig)  # shown as the value of the cell, not a second time at its end
    return fig


def _token_of(tokens: Sequence[str], concept: str) -> int:
    """The last token that is part of the concept's name, else the last word."""
    inside = [i for i, one in enumerate(tokens[1:-1], 1) if one in concept.lower()]
    return inside[-1] if inside else max(1, len(tokens) - 2)


def enlarged(picture: Image.Image, size: int = PICTURE) -> bytes:
    """A picture as PNG, a small one enlarged by a whole factor, so that its pixels stay sharp squares."""
    factor = max(1, size // picture.width)
    stream = io.BytesIO()
    picture.resize([factor * side for side in picture.size], Image.Resampling.NEAREST).save(stream, "PNG")
    return stream.getvalue()


def _panel(model: DiffusionModel, trained: list[str], both, first: tuple) -> "VBox":
    import ipywidgets as ui

    method, concept, preserve, strength, prompt, seed = first
    wide = lambda basis: ui.Layout(flex=f"1 1 {basis}", width="auto")
    names = [(METHOD_NAMES[one], one) for one in LIVE] + [(label, label) for label in trained]
    controls = {
        "Concept": ui.Combobox(
            value=concept, options=[one.name for one in model.everything], continuous_update=False, layout=wide("15em")
        ),
        "Method": ui.Dropdown(options=[(AS_IT_IS, AS_IT_IS), *names], value=method, layout=wide("15em")),
        "Strength": ui.FloatSlider(
            strength, min=0.0, max=1.5, step=0.05, continuous_update=False, layout=wide("18em"),
            tooltip="0: the model as it is; 1: the edit as fitted",
        ),
        "Preserve": ui.Text(
            ", ".join(preserve), continuous_update=False, layout=wide("15em"), placeholder="names, with commas"
        ),
        "Prompt": ui.Text(prompt, continuous_update=False, layout=wide("15em")),
        "Seed": ui.IntText(seed, layout=ui.Layout(width="12em"), tooltip="The noise of both pictures"),
    }  # fmt: skip
    for name, one in controls.items():
        one.description = name
    step = ui.IntSlider(0, min=0, max=1, description="Step", layout=wide("24em"), readout=False)
    token = ui.Dropdown(description="Token", layout=wide("15em"), tooltip="Whose attention is shown")
    status, said = ui.HTML(), [ui.HTML(), ui.HTML()]
    pictures = [ui.Image(format="png", layout=ui.Layout(max_width="100%")) for _ in "abcd"]
    attended, top = [ui.HTML(), ui.HTML()], ui.Layout(flex_flow="row wrap", align_items="flex-start")
    side = lambda i: ui.HBox([pictures[2 * i], ui.VBox([pictures[2 * i + 1], attended[i]])], layout=top)
    sides = ui.HBox(
        [ui.VBox([said[i], side(i)], layout=ui.Layout(flex="0 1 auto", margin="0 8px 0 0")) for i in (0, 1)],
        layout=top,
    )
    loop, shown = running_loop(), {}

    def tell(text: str, color: str = "inherit") -> None:
        status.value = f'<b style="color: {color}">{html.escape(text)}</b>'

    def settings() -> tuple:
        kept = tuple(one.strip() for one in controls["Preserve"].value.split(",") if one.strip())
        value = {name: one.value for name, one in controls.items()}
        return (
            value["Method"], value["Concept"].strip(), kept, value["Strength"], value["Prompt"], value["Seed"],
        )  # fmt: skip

    def look(_=None) -> None:
        """Show the chosen step and token of the two drawings that there are."""
        if not shown:
            return
        at, last = step.value, step.max
        for i, way in enumerate(shown["ways"]):
            pictures[2 * i].value = enlarged(way.estimates[at])
            mapped = way.maps is not None and token.value is not None
            for one in (pictures[2 * i + 1], attended[i]):
                one.layout.display = None if mapped else "none"
            if mapped:
                pictures[2 * i + 1].value = enlarged(way.map_of(token.value, at), PICTURE // 2)
                attended[i].value = f"attention to<br><b>{html.escape(way.tokens[token.value])}</b>"
            color = METHOD_COLORS.get(
                controls["Method"].value if i else "original", METHOD_COLORS["original"]
            )
            judged = f"; the judge sees <b>{html.escape(shown['seen'][i])}</b>" if shown["seen"][i] else ""
            name = ("Before", "After")[i]
            said[i].value = f'<b style="color: {color}">{name}</b>{judged}'
        where = (
            "the finished picture"
            if at == last
            else f"step {at + 1} of {last}: the clean picture it estimates"
        )
        why = next((way.why for way in shown["ways"] if way.why), "")
        tell(where + (f"; {why}" if why else ""))

    def draw_now() -> None:
        wanted = settings()
        try:
            ways = both(*wanted)
            seen = verdict(model, [way.estimates[-1] for way in ways])
        except Exception as error:  # bad input, or memory that ran out: said in the panel, where it is seen
            shown.clear()
            for picture in pictures:
                picture.value = b""
            return tell(str(error) or type(error).__name__, "#b00020")
        if settings() != wanted:  # changed meanwhile, by a front end that does not wait
            return request()
        shown.update(ways=ways, seen=seen)
        last, was_last = len(ways[0].estimates) - 1, step.value == step.max
        options = [(f"{i} {name}", i) for i, name in enumerate(ways[0].tokens)]
        step.max = last
        step.value = last if was_last or not step.value else min(step.value, last)
        if tuple(options) != token.options:
            token.options = options
            token.value = _token_of(ways[0].tokens, wanted[1])
        look()

    def request(_=None) -> None:
        """Draw between two cells, never beside one: some front ends set widgets in a thread of their own."""
        tell("Drawing …")
        if loop is None:
            draw_now()
        else:
            loop.call_soon_threadsafe(draw_now)

    for control in controls.values():
        control.observe(request, "value")
    for control in (step, token):
        control.observe(look, "value")
    step.value = step.max
    request()
    row = ui.Layout(flex_flow="row wrap", align_items="center")
    rows = [
        [controls[name] for name in part]
        for part in (("Concept", "Method"), ("Strength", "Preserve"), ("Prompt", "Seed"))
    ]
    return ui.VBox(
        [*(ui.HBox(part, layout=row) for part in rows), ui.HBox([step, token], layout=row), status, sides],
        layout=ui.Layout(width="860px", max_width="100%", border="1px solid #dddddd", padding="8px 12px"),
    )


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop of the kernel, None outside of one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
