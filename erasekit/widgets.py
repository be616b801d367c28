"""One drawing function, two presentations: sliders in a live notebook, small multiples everywhere else."""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure


def explore(draw: Callable, *, interactive: bool, **choices: Sequence) -> Figure | None:
    """Show `draw` over one or two named lists of values.

    `draw(lam=0.1, ax=ax)` gets each choice by name and draws into `ax`. Without `interactive` every value is
    one panel (two choices: rows by columns) and the figure is returned; with it, each choice is a slider and
    a panel is drawn on demand. The static branch never imports ipywidgets.

        fig = explore(draw, interactive=interactive, lam=[0.01, 0.1, 1.0])
    """
    import matplotlib.pyplot as plt

    if not 1 <= len(choices) <= 2 or not all(len(values) for values in choices.values()):
        raise ValueError(f"explore shows one or two choices, each with values, got {choices or 'none'}")
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
