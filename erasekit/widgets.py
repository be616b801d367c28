"""The same pictures twice: controls in a live notebook, small multiples everywhere else.

`vary` takes any drawing function, `explore` a model and edits of it, `studio` a model and a concept. None imports
ipywidgets unless it is live.
"""

import html
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from PIL import Image

from erasekit.edits import Edit, applied
from erasekit.figures import METHOD_COLORS, image_grid
from erasekit.models import DiffusionModel
from erasekit.studio import STALE, between_cells, check_edits, enlarged, studio

if TYPE_CHECKING:
    from ipywidgets import VBox

__all__ = ["explore", "live", "studio", "vary"]


def live() -> bool:
    """Whether this code runs in a notebook that is open in JupyterLab, where a panel can answer a click.

    Its server names the notebook to the kernel in JPY_SESSION_NAME; papermill, nbconvert and nbval do not.
    """
    return "JPY_SESSION_NAME" in os.environ


def vary(draw: Callable, *, interactive: bool, **choices: Sequence) -> Figure | None:
    """Show `draw` over one or two named lists of values.

    `draw(lam=0.1, ax=ax)` gets each choice by name and draws into `ax`. Without `interactive` every value is
    one panel (two choices: rows by columns) and the figure is returned; with it, each choice is a slider and
    a panel is drawn on demand.

        fig = vary(draw, interactive=interactive, lam=[0.01, 0.1, 1.0])
    """
    import matplotlib.pyplot as plt

    if not 1 <= len(choices) <= 2 or not all(len(values) for values in choices.values()):
        raise ValueError(f"vary shows one or two choices, each with values, got {choices or 'none'}")
    if interactive:
        from ipywidgets import SelectionSlider, interact

        def show(**values):
            _, ax = plt.subplots(layout="constrained")
            draw(**values, ax=ax)
            plt.show()

        interact(show, **{name: SelectionSlider(options=list(values)) for name, values in choices.items()})
        return None

    (column, column_values), *rest = reversed(choices.items())
    row, row_values = rest[0] if rest else (None, [None])
    shape = len(row_values), len(column_values)
    fig, axs = plt.subplots(
        *shape, figsize=(2.2 * shape[1], 2.2 * shape[0]), squeeze=False, layout="constrained"
    )
    for row_axs, row_value in zip(axs, row_values, strict=True):
        for ax, value in zip(row_axs, column_values, strict=True):
            values = {column: value} if row is None else {row: row_value, column: value}
            draw(**values, ax=ax)
            ax.set_title(", ".join(f"{name} = {v}" for name, v in values.items()))
    return fig


def explore(
    model: DiffusionModel,
    edits: Mapping[str, Edit],
    *,
    interactive: bool = True,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    steps: int | None = None,
    guidance: float = 3.0,
    on_change: bool = True,
) -> "VBox | Figure":
    """Look at edits of a model: each picture before and after, from the same noise.

    As the last value of a cell the result shows itself:

        explore(model, {"UCE, church": edit}, interactive=interactive)

    With `interactive` it is a panel: edit, strength (0 the model as it is, 1 as fitted), seed and prompt are chosen
    there, and "Swap" exchanges the two pictures in place, so that the eye finds what moved. Without, it is a figure:
    one row before and one after each edit, one column for each prompt and seed.

    Args:
        edits: {label: Edit}, all made for `model`.
        prompts: the columns of the figure; the panel starts from the first and suggests the others. When None, up to
            three names of what the edits erase and preserve.
        seeds: the panel starts from the first.
        steps: the model's own when None.
        on_change: draw at every change; False waits for the button "Draw", for a model that takes long.

    Raises ValueError for an edit of another model and for drawing while an edit is applied to this one.
    """
    _check(model, edits)
    prompts = _names(edits) if prompts is None else [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    if not prompts or not seeds:
        raise ValueError("there is nothing to draw: give at least one prompt and one seed")

    def draw(
        label: str | None, strength: float, prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        model.check_unedited()
        with applied(None if label is None else edits[label], model, strength):
            return model.generate(prompts, seeds=seeds, steps=steps, guidance=guidance)

    if interactive:
        how = f"{model.steps if steps is None else steps} steps, guidance {guidance:g}"
        return _panel(draw, edits, prompts, seeds[0], how, on_change)
    return _multiples(draw, edits, prompts, seeds)


def _check(model: DiffusionModel, edits: Mapping[str, Edit]) -> None:
    if not isinstance(model, DiffusionModel):
        raise ValueError(f"explore needs a model that load() gave, got {type(model).__name__}")
    if not isinstance(edits, Mapping) or not edits:
        raise ValueError(f"edits is a dict {{label: Edit}} with at least one edit, got {edits!r}")
    check_edits(model, edits)


def _names(edits: Mapping[str, Edit]) -> list[str]:
    """What the edits erase, then what they preserve, without repeats; at most three names."""
    concepts = [edit.metadata.get("concepts", {}) for edit in edits.values()]
    names = [name for key in ("erase", "preserve") for one in concepts for name in one.get(key, ())]
    return [name for name in dict.fromkeys(names) if name.strip()][:3]


def _multiples(draw: Callable, edits: Mapping[str, Edit], prompts: list[str], seeds: list[int]) -> Figure:
    import matplotlib.pyplot as plt

    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    rows = [draw(label, 1.0, *map(list, zip(*pairs, strict=True))) for label in (None, *edits)]
    heads = [f"{textwrap.fill(prompt, 18)}\nseed {seed}" for prompt, seed in pairs]
    fig = image_grid(
        rows, row_labels=["before", *edits], col_labels=heads, upscale=max(0.2, 96 / rows[0][0].width)
    )
    fig.set_figheight(fig.get_figheight() + 0.13 * max(head.count("\n") for head in heads))
    plt.close(fig)  # shown as the value of the cell, not a second time at its end
    return fig


def _panel(
    draw: Callable, edits: Mapping[str, Edit], prompts: list[str], first_seed: int, how: str, on_change: bool
) -> "VBox":
    import ipywidgets as ui

    @lru_cache(maxsize=64)
    def png(label: str | None, strength: float, prompt: str, seed: int) -> bytes:
        """One picture, small ones enlarged by a whole factor, so that each of their pixels stays a sharp square."""
        (picture,) = draw(label, strength, [prompt], [seed])
        return enlarged(picture)

    wide = lambda basis: ui.Layout(flex=f"1 1 {basis}", width="auto")
    edit = ui.Dropdown(
        options=[("none: the model as it is", None), *((label, label) for label in edits)],
        value=next(iter(edits)),
        description="Edit",
        layout=wide("16em"),
    )
    strength = ui.FloatSlider(
        1.0,
        min=0.0,
        max=1.5,
        step=0.05,
        description="Strength",
        continuous_update=False,
        layout=wide("20em"),
        tooltip="0: the model as it is; 1: the edit as fitted",
    )
    prompt = ui.Combobox(
        value=prompts[0],
        options=prompts,
        description="Prompt",
        continuous_update=False,
        layout=wide("24em"),
    )
    seed = ui.IntText(
        first_seed, description="Seed", layout=ui.Layout(width="12em"), tooltip="The noise of both pictures"
    )
    now = ui.Button(description="Draw", button_style="primary", layout=ui.Layout(width="6em"))
    about, status = ui.HTML(), ui.HTML()
    swap = ui.ToggleButton(
        description="Swap",
        icon="exchange",
        tooltip="Exchange the two pictures in place",
        layout=ui.Layout(width="6em", margin="0 12px", flex="none"),
    )
    captions = ui.HTML(), ui.HTML()
    pictures = tuple(
        ui.Image(format="png", layout=ui.Layout(border="1px solid #bbbbbb", max_width="100%")) for _ in "ab"
    )
    left, right = (
        ui.VBox(side, layout=ui.Layout(flex="0 1 auto")) for side in zip(captions, pictures, strict=True)
    )
    sides = ui.HBox([left, swap, right], layout=ui.Layout(align_items="center"))

    shown = []

    def say(text: str, *, stale: bool = False, color: str = "inherit") -> None:
        status.value = f'{STALE}<b style="color: {color}">{html.escape(text)}</b>'
        (sides.add_class if stale else sides.remove_class)("erasekit-stale")

    def place(_=None) -> None:
        for side, (caption, picture) in enumerate(shown[::-1] if swap.value else shown):
            captions[side].value, pictures[side].value = caption, picture
        sides.layout.display = None if shown else "none"

    def settings() -> tuple[str | None, float, str, int]:
        return edit.value, strength.value, prompt.value, seed.value

    def draw_now() -> None:
        nonlocal shown
        label, scale, text, number = wanted = settings()
        what = "no edit" if label is None else f"{label}, strength {scale:.2f}"
        color = "inherit"
        try:
            before = png(None, 1.0, text, number)
            after = before if label is None else png(label, scale, text, number)
            drawn = [
                (_caption("Before", "the model as it is", METHOD_COLORS["original"]), before),
                (_caption("After", what, METHOD_COLORS["rece"]), after),
            ]
            said = f'"{text}" from the same noise, seed {number} ({how})'
        except Exception as error:  # bad input, or memory that ran out: said in the panel, where it is seen
            drawn, said, color = [], str(error) or type(error).__name__, "#b00020"
        if settings() != wanted:  # changed meanwhile, by a front end that does not wait
            return changed()
        shown = drawn
        place()
        say(said, color=color)

    def request(_=None) -> None:
        """The first drawing of a burst of changes takes the last settings, the others find it in the cache."""
        say("Drawing …", stale=True)
        soon()

    def changed(_=None) -> None:
        strength.disabled = edit.value is None
        summary = "no edit" if edit.value is None else edits[edit.value].summary()
        about.value = f'<span style="color: #757575">{html.escape(summary)}</span>'
        if on_change:
            request()
        else:
            say("Press Draw to see these settings.", stale=True)

    soon = between_cells(draw_now)
    for control in (edit, strength, prompt, seed):
        control.observe(changed, "value")
    swap.observe(place, "value")
    now.on_click(request)
    place()
    changed()
    row = ui.Layout(flex_flow="row wrap", align_items="center")
    return ui.VBox(
        [
            ui.HBox([edit, strength], layout=row),
            ui.HBox([prompt, seed] if on_change else [prompt, seed, now], layout=row),
            about,
            status,
            sides,
        ],
        layout=ui.Layout(width="720px", max_width="100%", border="1px solid #dddddd", padding="8px 12px"),
    )


def _caption(name: str, what: str, color: str) -> str:
    return f'<b style="color: {color}">{name}</b>: {html.escape(what)}'
