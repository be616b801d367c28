"""Erase something and watch it being drawn, before and after: a panel in a live notebook, one figure elsewhere.

It does not import ipywidgets unless it is live.
"""

import asyncio
import html
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from PIL import Image

from erasekit.drawings import Drawing, check_watched, heat, token_of, verdicts, watch
from erasekit.edits import Edit
from erasekit.figures import METHOD_COLORS, METHOD_NAMES
from erasekit.methods import METHODS
from erasekit.models import DiffusionModel

if TYPE_CHECKING:
    from ipywidgets import VBox

LIVE = ("uce", "rece", "dp", "speed", "oce", "adavd", "semantic_surgery")  # fitted in about a second
AS_IT_IS = "no edit"
ETAS = (1.0, 2.0, 3.0)  # of the attack; those of `attacks.concept_vector`
SIDE, LARGEST = 192, 256  # screen pixels of a small picture, about, and of a large one
STALE = "<style>.erasekit-stale img { opacity: 0.3 }</style>"


@dataclass(frozen=True)
class Asked:
    """What is set in the panel. eta: of the attack, 0 for none."""

    method: str
    concept: str
    preserve: tuple[str, ...]
    prompt: str
    seed: int
    strength: float = 1.0
    eta: float = 0.0


@dataclass(frozen=True, eq=False)
class Row:
    """One drawing with its heading. verdicts: of every estimate, and last of the picture; empty without a judge."""

    name: str
    what: str
    color: str
    drawing: Drawing
    verdicts: Sequence[str]


def studio(
    model: DiffusionModel,
    concept: str | None = None,
    *,
    edits: Mapping[str, Edit] | None = None,
    interactive: bool = True,
    prompt: str | None = None,
    preserve: str | Sequence[str] = (),
    method: str = "uce",
    seed: int = 0,
    eta: float = 0.0,
    steps: int | None = None,
    guidance: float = 3.0,
    on_change: bool = True,
) -> "VBox | Figure":
    """Erase something and watch it being drawn, before and after, from the same noise.

    As the last value of a cell the result shows itself:

        studio(model, "dog", preserve=["cat"], interactive=interactive)

    With `interactive` it is a panel: concept, method, strength, what is preserved, prompt and seed; a slider through
    the steps with the clean picture that each estimates, the cross-attention of a chosen token there, and what the
    world's judge sees on each picture, "none" where it is not sure. One more row shows the edited model under attack:
    with eta times the concept's direction added to the prompt's embedding (`watch`). The methods of `LIVE` are fitted
    there, in about a second, and kept; `edits` {label: Edit} adds what was trained before. What cannot be done is said
    in the panel. Without `interactive`, a figure of the same for the first settings: four steps, attention below.

    Args:
        concept: when None, the first one of the model's world.
        prompt: when None, "a" with the concept's name.
        method: one of `LIVE`, or a label of `edits`.
        eta: strength of the attack, 0 for none.
        steps: the model's own when None.
        on_change: draw at every change; False waits for the button "Draw", for a model that takes long.

    Raises ValueError for other models than Stable Diffusion 1 and 2, for an unknown concept, for a model without a
    world where none is named, for a method that is not live, and for edits of another model.
    """
    edits = dict(edits or {})
    if not isinstance(model, DiffusionModel):
        raise ValueError(f"studio needs a model that load() gave, got {type(model).__name__}")
    check_watched(model)
    check_edits(model, edits)
    if taken := edits.keys() & {AS_IT_IS, *LIVE}:
        raise ValueError(f"{min(taken)!r} already means something in the panel: give that edit another label")
    if method not in (*LIVE, *edits):
        raise ValueError(f"method must be one of {', '.join((*LIVE, *edits))}, got {method!r}")
    if concept is None:
        if not model.everything:
            raise ValueError("this model has no world of its own: say which concept to erase")
        concept = model.everything[0].name
    model.concepts(concept)
    prompt = f"a {concept}" if prompt is None else prompt
    kept = (preserve,) if isinstance(preserve, str) else tuple(preserve)
    first = Asked(method, concept, kept, prompt, seed, eta=float(eta))

    @lru_cache(maxsize=32)
    def fitted(name: str, about: str, kept: tuple[str, ...]) -> Edit:
        return METHODS[name].fit(model, about, list(kept))

    @lru_cache(maxsize=24)
    def drawn(edit: Edit | None, strength: float, text: str, number: int, attack=None) -> tuple:
        drawing = watch(
            model, edit, text, number, strength=strength, steps=steps, guidance=guidance, attack=attack
        )
        return drawing, verdicts(model, [*drawing.estimates, drawing.picture])

    def rows(asked: Asked) -> list[Row]:
        """Fit and draw what is not yet there."""
        edit, what = None, "no edit"
        if asked.method != AS_IT_IS and asked.strength:
            edit = edits.get(asked.method) or fitted(asked.method, asked.concept, asked.preserve)
        if asked.method != AS_IT_IS:
            what = f"{METHOD_NAMES.get(asked.method, asked.method)}, strength {asked.strength:.2f}"
            what += "; attention shows where it goes, this edit changes what it brings there" * (
                edit is not None and edit.kind == "attention_filter"
            )
        strength = asked.strength if edit else 1.0
        color = METHOD_COLORS.get(asked.method, METHOD_COLORS["rece"])
        found = [
            Row("Before", "the model as it is", METHOD_COLORS["original"], *drawn(None, 1.0, asked.prompt, asked.seed)),
            Row("After", what, color, *drawn(edit, strength, asked.prompt, asked.seed)),
        ]  # fmt: skip
        if asked.eta:
            attack = asked.concept, asked.eta
            under = f"After, with {asked.eta:g} times the direction of “{asked.concept}” in its prompt"
            found.append(
                Row("Attacked", under, color, *drawn(edit, strength, asked.prompt, asked.seed, attack))
            )
        return found

    if interactive:
        return _panel(model, list(edits), rows, first, on_change)
    return _figure(rows(first), first)


def check_edits(model: DiffusionModel, edits: Mapping[str, Edit]) -> None:
    """ValueError unless every one is an Edit of this model, under a label that says something."""
    for label, edit in edits.items():
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"the label of an edit is text, got {label!r}")
        if not isinstance(edit, Edit):
            raise ValueError(
                f"edits[{label!r}] is a {type(edit).__name__}: expected what fit returned or Edit.load read"
            )
        try:
            edit._check_base(model)
        except ValueError as error:
            raise ValueError(f"edits[{label!r}]: {error}") from error


def _top(rows: Sequence[Row], token: int) -> float:
    """The largest attention to a token in any row and step, so that all its maps have one scale."""
    seen = [row.drawing.maps[:, token] for row in rows if row.drawing.maps is not None]
    return max((float(one.max()) for one in seen), default=0.0)


def _figure(rows: Sequence[Row], asked: Asked) -> Figure:
    import matplotlib.pyplot as plt

    count = len(rows[0].drawing.estimates)
    at = sorted({round(part * (count - 1) / 3) for part in range(4)})
    token = token_of(rows[0].drawing.tokens, asked.concept)
    top = _top(rows, token)
    size = 2 * len(rows), len(at) + 1
    fig, axs = plt.subplots(*size, figsize=(1.35 * size[1], 1.45 * size[0]), layout="constrained")
    for (above, below), row in zip(axs.reshape(len(rows), 2, -1), rows, strict=True):
        way = row.drawing
        for ax, step in zip(above, at, strict=False):
            ax.imshow(way.estimates[step], interpolation="none")
            ax.set_xlabel(textwrap.fill(row.verdicts[step], 18), fontsize=7)
        above[-1].imshow(way.picture, interpolation="none")
        above[-1].set_xlabel(textwrap.fill(row.verdicts[-1], 18), fontsize=7, fontweight="bold")
        name = row.name if row.name != "After" else f"After {row.what.split(',')[0]}"
        above[0].set_ylabel(textwrap.fill(name, 16), fontsize=8, fontweight="bold")
        if way.maps is None:
            below[0].set_title("attention could not be recorded", fontsize=7, loc="left")
            continue
        for ax, step in zip(below, at, strict=False):
            ax.imshow(heat(way.maps[step, token], top), interpolation="none")
        below[0].set_ylabel(f"attention to\n“{way.tokens[token]}”", fontsize=8)
    for ax, step in zip(axs[0], at, strict=False):
        ax.set_title(f"estimate at step\n{step + 1} of {count}", fontsize=8)
    axs[0, -1].set_title("the picture", fontsize=8)
    for ax in axs.flat:
        ax.set(xticks=[], yticks=[])
        ax.set_frame_on(False)
    judged = "; below each, what the judge sees" if rows[0].verdicts[-1] else ""
    scale = f"Attention: black 0, yellow {top:.2f}" if top else ""
    fig.suptitle(textwrap.fill(f"“{asked.prompt}”, seed {asked.seed}{judged}. {scale}", 96), fontsize=8)
    plt.close(fig)  # shown as the value of the cell, not a second time at its end
    return fig


def enlarged(picture: Image.Image, size: int = 256) -> bytes:
    """A picture as PNG, a small one enlarged by a whole factor, so that its pixels stay sharp squares."""
    factor = max(1, size // picture.width)
    stream = io.BytesIO()
    picture.resize([factor * side for side in picture.size], Image.Resampling.NEAREST).save(stream, "PNG")
    return stream.getvalue()


def _side(picture: Image.Image) -> int:
    """Screen pixels of a picture: a whole multiple of its own where that is small."""
    width = picture.width
    return width * max(1, round(SIDE / width)) if width <= LARGEST else LARGEST


def _controls(model: DiffusionModel, trained: Sequence[str], first: Asked) -> dict:
    import ipywidgets as ui

    wide = lambda basis: ui.Layout(flex=f"1 1 {basis}", width="auto")
    names = [one.name for one in model.everything]
    methods = [(METHOD_NAMES[one], one) for one in LIVE] + [(label, label) for label in trained]
    etas = sorted({0.0, *ETAS, first.eta})
    attacks = [(f"concept vector × {eta:g}" if eta else "none", eta) for eta in etas]
    controls = {
        "Concept": ui.Dropdown(
            value=first.concept, options=list(dict.fromkeys([*names, first.concept])), layout=wide("15em")
        ) if names else ui.Text(first.concept, continuous_update=False, layout=wide("15em")),
        "Method": ui.Dropdown(
            value=first.method, options=[(AS_IT_IS, AS_IT_IS), *methods], layout=wide("15em")
        ),
        "Preserve": ui.Text(
            ", ".join(first.preserve), continuous_update=False, layout=wide("15em"), placeholder="names, with commas"
        ),
        "Strength": ui.FloatSlider(
            first.strength, min=0.0, max=1.5, step=0.05, continuous_update=False, layout=wide("15em"),
            tooltip="0: the model as it is; 1: the edit as fitted",
        ),
        "Prompt": ui.Text(first.prompt, continuous_update=False, layout=wide("15em")),
        "Seed": ui.IntText(first.seed, layout=ui.Layout(width="10em"), tooltip="The noise of all pictures"),
        "Attack": ui.Dropdown(
            value=first.eta, options=attacks, layout=wide("15em"),
            tooltip="Of the edited model: the concept's direction is added to the embedding of the prompt",
        ),
        "Step": ui.IntSlider(1, min=1, max=1, layout=wide("15em"), tooltip="A denoising step; nothing is drawn anew"),
        "Token": ui.Dropdown(layout=wide("15em"), tooltip="Whose attention is shown"),
    }  # fmt: skip
    for name, one in controls.items():
        one.description = name
    return controls


class _Sheet:
    """A grid of three columns: of each row a heading, the picture, an estimate, a map of attention, their captions."""

    def __init__(self):
        import ipywidgets as ui

        whole = {"grid_area": "auto / 1 / auto / -1"}
        line, text = lambda: ui.HTML(layout=ui.Layout(**whole)), lambda: ui.HTML()
        self.heads = [text() for _ in range(3)]
        image = lambda: ui.Image(format="png", layout=ui.Layout(max_width="100%"))
        self.rows = [(line(), [image() for _ in range(3)], [text() for _ in range(3)]) for _ in range(3)]
        cells = [cell for line, images, captions in self.rows for cell in (line, *images, *captions)]
        self.box = ui.GridBox(
            [*self.heads, *cells], layout=ui.Layout(grid_gap="0 12px", justify_items="flex-start")
        )

    def show(self, rows: Sequence[Row], step: int, token: int) -> None:
        """step: from 0."""
        side, top = _side(rows[0].drawing.picture), _top(rows, token)
        self.box.layout.grid_template_columns = f"repeat(3, {side}px)"
        tokens, count = rows[0].drawing.tokens, len(rows[0].drawing.estimates)
        self.heads[0].value = "the picture"
        self.heads[1].value = f"estimate at step {step + 1} of {count}"
        self.heads[2].value = f"attention to <b>{html.escape(tokens[token])}</b>"
        for i, (heading, images, captions) in enumerate(self.rows):
            for cell in (heading, *images, *captions):
                cell.layout.display = None if i < len(rows) else "none"
            if i >= len(rows):
                continue
            row, way = rows[i], rows[i].drawing
            heading.value = f'<b style="color: {row.color}">{row.name}</b>: {html.escape(row.what)}'
            shown = [way.picture, way.estimates[step]]
            said = [_judged(row.verdicts[-1]), _judged(row.verdicts[step])]
            if way.maps is None:
                images[2].layout.display, said = "none", [*said, "could not be recorded"]
            else:
                shown.append(heat(way.maps[step, token], top))
                said.append(f"black 0, yellow {top:.2f}")
            for image, picture in zip(images, shown, strict=False):
                image.value, image.layout.width = enlarged(picture, side), f"{side}px"
            for caption, text in zip(captions, said, strict=True):
                caption.value = f'<div style="line-height: 1.3; padding-bottom: 4px">{text}</div>'


def _judged(verdict: str) -> str:
    return f"judge: <b>{html.escape(verdict)}</b>" if verdict else ""


def _panel(
    model: DiffusionModel, trained: list[str], rows: Callable, first: Asked, on_change: bool
) -> "VBox":
    import ipywidgets as ui

    controls, sheet, status = _controls(model, trained, first), _Sheet(), ui.HTML()
    now = ui.Button(description="Draw", button_style="primary", layout=ui.Layout(width="6em"))
    step, token = controls["Step"], controls["Token"]
    shown = []

    def tell(text: str, *, stale: bool = False, color: str = "inherit") -> None:
        status.value = f'{STALE}<b style="color: {color}">{html.escape(text)}</b>'
        (sheet.box.add_class if stale else sheet.box.remove_class)("erasekit-stale")

    def asked() -> Asked:
        value = {name: one.value for name, one in controls.items()}
        kept = tuple(one.strip() for one in value["Preserve"].split(",") if one.strip())
        return Asked(
            value["Method"], value["Concept"].strip(), kept, value["Prompt"], value["Seed"], value["Strength"],
            value["Attack"],
        )  # fmt: skip

    def look(_=None) -> None:
        """Show the chosen step and token of the drawings that there are."""
        if shown and token.value is not None:
            sheet.show(shown, step.value - 1, token.value)

    def draw_now() -> None:
        nonlocal shown
        wanted = asked()
        try:
            found = rows(wanted)
        except Exception as error:  # bad input, or memory that ran out: said in the panel, where it is seen
            shown, sheet.box.layout.display = [], "none"
            return tell(str(error).partition("\n")[0] or type(error).__name__, color="#b00020")
        if asked() != wanted:  # changed meanwhile, by a front end that does not wait
            return changed()
        shown = []  # the slider and the tokens are set first, and would show these at once
        count, options = len(found[0].drawing.estimates), found[0].drawing.tokens
        last = step.value == step.max
        step.max = count
        step.value = count if last else min(step.value, count)
        options = [(f"{i} {name}", i) for i, name in enumerate(options)]
        if tuple(options) != tuple(token.options):
            token.options = options
            token.value = token_of(found[0].drawing.tokens, wanted.concept)
        shown = found
        look()
        sheet.box.layout.display = None
        tell(f"“{wanted.prompt}” from the same noise, seed {wanted.seed}; Step moves through the denoising")

    def request(_=None) -> None:
        tell("Fitting and drawing …", stale=True)
        soon()

    def changed(_=None) -> None:
        controls["Strength"].disabled = controls["Method"].value == AS_IT_IS
        controls["Preserve"].disabled = controls["Method"].value in (AS_IT_IS, *trained)
        if on_change:
            request()
        else:
            tell("Press Draw to see these settings.", stale=True)

    soon = between_cells(draw_now)
    for name, control in controls.items():
        control.observe(look if name in ("Step", "Token") else changed, "value")
    now.on_click(request)
    sheet.box.layout.display = "none"
    changed()
    line = lambda *names: ui.HBox(
        [controls[name] for name in names], layout=ui.Layout(flex_flow="row wrap", align_items="center")
    )
    last = line("Prompt", "Seed", "Attack")
    if not on_change:
        last.children += (now,)
    lines = line("Concept", "Method"), line("Preserve", "Strength"), last, line("Step", "Token")
    return ui.VBox(
        [*lines, status, sheet.box],
        layout=ui.Layout(width="820px", max_width="100%", border="1px solid #dddddd", padding="8px 12px"),
    )


def between_cells(draw: Callable[[], None]) -> Callable[[], None]:
    """A call that has `draw` done between two cells of a kernel, never beside one; at once outside of a kernel.

    Some front ends set widgets in a thread of their own; drawing there would put an edit into the model while a cell
    uses it.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return draw
    return lambda: loop.call_soon_threadsafe(draw)
