"""Figures: one theme, one color and marker per method, exports with identical bytes, mosaics of pictures.

`save_figure` writes figures/NAME.svg, .png, .csv (the plotted data) and .json (where it comes from). One
small JSON per figure instead of one shared manifest: notebooks that run side by side never write one file.
"""

import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from erasekit.paths import FIGURES, replacing

NARROW, WIDE = 3.25, 6.75  # inches: one and two columns
EXPORT = {"svg.hashsalt": "erasekit", "svg.fonttype": "none", "pdf.fonttype": 42}
METHOD_NAMES = {  # as figures and tables show them, in their order; a variant has its setting behind a hyphen
    "original": "no edit",
    "uce": "UCE",
    "rece": "RECE",
    "rece-start": "RECE*",  # the rounds keep the pairs of the start, see rece.Config
    "rece-held": "RECE, held",
    "esd": "ESD",
    "mace": "MACE",
    "realera": "RealEra",
    "trce-text": "TRCE, stage 1",
    "trce": "TRCE",
    "advunlearn": "AdvUnlearn",
    "dp": "DP",
    "speed": "SPEED",
    "oce": "OCE",
    "adavd": "AdaVD",
    "semantic_surgery": "Semantic Surgery",
    "safree": "SAFREE",
    "sld": "SLD",
}
METHOD_COLORS = {  # most of seaborn's colorblind palette; the same method has the same color in every figure
    "original": "#4d4d4d",
    "uce": "#56b4e9",
    "esd": "#de8f05",
    "mace": "#ca9161",
    "rece": "#0173b2",
    "realera": "#029e73",
    "trce": "#d55e00",
    "advunlearn": "#cc78bc",
    "dp": "#949494",
    "speed": "#ece133",
    "oce": "#fbafe4",
    "adavd": "#8c564b",
    "semantic_surgery": "#8c6bb1",
    "safree": "#17becf",
    "sld": "#6b8e23",
}
METHOD_MARKERS = {
    "original": "o",
    "uce": "s",
    "esd": "^",
    "mace": "v",
    "rece": "D",
    "realera": "P",
    "trce": "X",
    "advunlearn": "*",
    "dp": "h",
    "speed": "p",
    "oce": "d",
    "adavd": "<",
    "semantic_surgery": ">",
    "safree": "H",
    "sld": "8",
}


def theme() -> None:
    """Set the plotting defaults of this process; each notebook calls it once, at the top.

    In a notebook figures are shown as SVG, sharp at every width, with letters that can be searched and copied.
    """
    sns.set_theme(
        context="paper",
        style="ticks",
        palette="colorblind",
        rc={
            "font.size": 8,
            "axes.labelsize": 8,
            "axes.titlesize": 8,
            "legend.fontsize": 7,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.figsize": (NARROW, 2.4),
            "figure.dpi": 80,
            "figure.constrained_layout.use": True,
            **EXPORT,
        },
    )
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel"):  # asking for a format would make a shell where there is none
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None})


def save_figure(
    fig: Figure,
    name: str,
    *,
    data: pd.DataFrame,
    notebook: str,
    parameters: dict | None = None,
    sources: Sequence[str] = (),
    folder: Path = FIGURES,
) -> Path:
    """Write a figure with the data it shows; returns the path of the PNG.

    The same figure and data give the same bytes in every process (with the same matplotlib), so a changed
    file means a changed figure.

    name: lower-case letters, digits and underscores; the files are figures/NAME.{svg,png,csv,json}. data: what is
    plotted, one row per mark; written with six significant digits. notebook: the notebook that draws it, for example
    "10_uce". parameters: the notebook's parameters, where they matter to the figure. sources: result files it was
    drawn from, relative to the repository.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", name):
        raise ValueError(f"a figure name is lower-case letters, digits and underscores, got {name!r}")
    if not isinstance(data, pd.DataFrame) or data.empty:
        raise ValueError(
            f"figure {name!r} needs its data as a DataFrame with rows, got {type(data).__name__}"
        )
    record = {
        "name": name,
        "notebook": notebook,
        "parameters": parameters or {},
        "sources": list(sources),
        "columns": [str(column) for column in data.columns],
        "rows": len(data),
        "matplotlib": matplotlib.__version__,
    }
    contents = {
        "svg": _render(fig, "svg", {"Date": None, "Creator": "erasekit", "Title": name, "Source": notebook}),
        "png": _render(fig, "png", {"Software": None, "Title": name, "Source": notebook}),
        "csv": data.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode(),
        "json": (json.dumps(record, indent=1, sort_keys=True) + "\n").encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in contents.items():
        with replacing(folder / f"{name}.{kind}") as temporary:
            temporary.write_bytes(content)
    return folder / f"{name}.png"


def _render(fig: Figure, kind: str, metadata: dict) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(EXPORT):
        fig.savefig(buffer, format=kind, dpi=200, metadata=metadata)
    return buffer.getvalue()


def rates(
    data: pd.DataFrame,
    row: str,
    panel: str,
    *,
    method: str | dict[str, str] = "original",
    titles: dict[str, str] | None = None,
    baseline: dict[str, float] | None = None,
    about: str = "share of pictures, 95 % interval",
    whole: bool = True,
    line: float = 0.2,
) -> Figure:
    """Rates with their intervals: a panel for each value of one column, a line for each value of another.

    data: columns rate, low, high, as `metrics.rate` gives them, and the two that are named. Lines and panels stand in
    their order of appearance. method: whose color and marker, for all, by line or by panel. titles: of the panels.
    baseline: a dotted rate for the panels it names, ValueError for another. about: under the axes. whole: axes from 0
    to 1, else each as far as its intervals reach. line: inches. A method without a color is a gray dot.
    """
    lines, panels = list(dict.fromkeys(data[row])), list(dict.fromkeys(data[panel]))
    baseline = baseline or {}
    if strangers := baseline.keys() - panels:
        raise ValueError(
            f"no panel {', '.join(sorted(strangers))} for a baseline: there are {', '.join(panels)}"
        )
    fig, axs = plt.subplots(
        1, len(panels), figsize=(WIDE, 0.65 + line * len(lines)), sharey=True, squeeze=False
    )
    for ax, name in zip(axs[0], panels, strict=True):
        for _, one in data[data[panel] == name].iterrows():
            key = method if isinstance(method, str) else method.get(one[row]) or method[name]
            error = [[one["rate"] - one["low"]], [one["high"] - one["rate"]]]
            ax.errorbar(
                one["rate"], lines.index(one[row]), xerr=error, fmt=METHOD_MARKERS.get(key, "."),
                color=METHOD_COLORS.get(key, "0.5"), ms=5,
            )  # fmt: skip
        if name in baseline:
            ax.axvline(baseline[name], color="0.7", ls=":")
        ax.set(title=(titles or {}).get(name, name))
        ax.set(yticks=range(len(lines)), yticklabels=lines, ylim=(len(lines) - 0.5, -0.5))
        if whole:
            ax.set(xlim=(-0.04, 1.04), xticks=[0, 0.5, 1] if len(panels) > 4 else [0, 0.2, 0.4, 0.6, 0.8, 1])
        else:
            ax.locator_params(axis="x", nbins=3)
    fig.supxlabel(about, fontsize=8)
    return fig


def beside(
    published: pd.DataFrame,
    measured: pd.DataFrame,
    *,
    methods: dict[str, str],
    titles: tuple[str, str] = ("in the paper", "measured here"),
    about: tuple[str, str] = ("share", "share of pictures, 95 % interval"),
) -> Figure:
    """What a paper reports and what is measured here, side by side in the paper's layout: two protocols, two axes.

    published: columns row, series and rate; measured: low and high as well. Where both have a column panel there is a
    line of panels for each value of it, at most two. Rows that are numbers are an axis, and each series a line; others
    are lines of the panel, each side's its own, in their order of appearance. methods: of each series the method
    whose color and marker it has. A paper's markers are hollow: it gives no interval. What published says of them in a
    column trust stands above them.
    """
    both = [side if "panel" in side else side.assign(panel="") for side in (published, measured)]
    panels = list(dict.fromkeys([*both[0]["panel"], *both[1]["panel"]]))
    if len(panels) > 2:
        raise ValueError(f"two lines of panels at most, got {len(panels)}: {', '.join(map(str, panels))}")
    numbers = all(pd.api.types.is_numeric_dtype(side["row"]) for side in both)
    lines = max(side["row"].nunique() for side in both)
    height = 1.9 if numbers else 0.55 + lines * (0.1 + 0.09 * len(methods))
    fig, axs = plt.subplots(len(panels), 2, figsize=(WIDE, 0.45 + height * len(panels)), squeeze=False)
    for line, panel in zip(axs, panels, strict=True):
        for ax, side, title, label in zip(line, both, titles, about, strict=True):
            _one_side(ax, side[side["panel"] == panel], methods, numbers)
            ax.set_title(f"{title}: {panel}" if panel else title)
            ax.set(
                **{f"{'y' if numbers else 'x'}label": label, f"{'y' if numbers else 'x'}lim": (-0.04, 1.04)}
            )
    if "trust" in published:
        first = axs[0][0]
        first.set_title("\n".join([first.get_title(), f"({'; '.join(dict.fromkeys(published['trust']))})"]))
    handles = {
        label: handle
        for ax in axs.flat
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    if len(handles) > 1:
        shown = [name for name in methods if name in handles]
        fig.legend(
            [handles[name] for name in shown], shown, loc="outside lower center", ncols=4, frameon=False
        )
    return fig


def _one_side(ax: Axes, side: pd.DataFrame, methods: dict[str, str], numbers: bool) -> None:
    rows = list(dict.fromkeys(side["row"]))
    here = [name for name in methods if name in set(side["series"])]
    for place, name in enumerate(here):
        of = side[side["series"] == name]
        color, marker = METHOD_COLORS.get(methods[name], "0.5"), METHOD_MARKERS.get(methods[name], ".")
        at = (
            of["row"]
            if numbers
            else [rows.index(row) + 0.6 * ((place + 0.5) / len(here) - 0.5) for row in of["row"]]
        )
        error = [of["rate"] - of["low"], of["high"] - of["rate"]] if "low" in of else None
        look = {"color": color, "marker": marker, "ms": 5, "ls": "-" if numbers else "", "label": name}
        look |= {"mfc": color if "low" in of else "none"}
        if numbers:
            ax.errorbar(at, of["rate"], yerr=error, **look)
        else:
            ax.errorbar(of["rate"], at, xerr=error, **look)
    if numbers:
        ax.set(xscale="log", xticks=rows, xticklabels=rows)
        ax.minorticks_off()
    else:
        ax.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])


def matrix(shares: pd.DataFrame, *, groups: Sequence[str] = (), about: str = "") -> Figure:
    """Shares from 0 to 1 as a colored table, in hundredths; an empty cell (NaN) is gray.

    shares: a row and a column for each label. groups: of each row what it belongs to, a line between two of them.
    about: what the color says, in hundredths.
    """
    fig, ax = plt.subplots(figsize=(WIDE, 0.9 + 0.19 * len(shares)))
    ax.set_facecolor("0.9")
    sns.heatmap(
        100 * shares, vmin=0, vmax=100, cmap="OrRd", annot=True, fmt=".0f", annot_kws={"fontsize": 7}, linewidths=0.5,
        cbar_kws={"label": about, "fraction": 0.03, "pad": 0.02}, ax=ax, yticklabels=True,
    )  # fmt: skip
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0, top=False, bottom=False, left=False, labeltop=True, labelbottom=False)
    for row, (one, after) in enumerate(zip(groups, groups[1:], strict=False), 1):
        if one != after:
            ax.axhline(row, color="0.2", lw=1)
    return fig


GAP = 2  # pixels between the pictures of a mosaic


def mosaic(rows: Sequence[Sequence]) -> np.ndarray:
    """Rows of pictures of one size, PIL images or uint8 arrays (h, w, 3), as one white array; None leaves a gap."""
    height, width, _ = _pixels(next(image for row in rows for image in row if image is not None)).shape
    columns = max(len(row) for row in rows)
    whole = np.full((len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            if image is not None:
                top, left = i * (height + GAP), j * (width + GAP)
                whole[top : top + height, left : left + width] = _pixels(image)
    return whole


def image_grid(
    images: Sequence,
    row_labels: Sequence[str] | None = None,
    col_labels: Sequence[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
    upscale: float = 1.0,
) -> Figure:
    """Pictures of one size as one labeled mosaic; returns the figure.

    In a notebook assign the result (`fig = image_grid(...)`): as the last value of a cell it shows twice.

    images: rows of PIL images or uint8 arrays (h, w, 3); a flat sequence is one row; None leaves a gap. ax: draw here
    instead of in a new figure. upscale: screen pixels per picture pixel in a new figure at 80 dpi.
    """
    rows = images if len(images) and isinstance(images[0], (list, tuple)) else [images]
    shown = [_pixels(image) for row in rows for image in row if image is not None]
    sizes = {array.shape for array in shown}
    if len(sizes) != 1:
        raise ValueError(f"image_grid needs pictures of one size, got {sorted(sizes) or 'none'}")
    height, width, _ = sizes.pop()
    count, columns = len(rows), max(len(row) for row in rows)
    for labels, wanted, what in ((row_labels, count, "row_labels"), (col_labels, columns, "col_labels")):
        if labels is not None and len(labels) != wanted:
            raise ValueError(f"{what} needs {wanted} entries, got {len(labels)}")

    whole = mosaic(rows)
    if ax is None:
        inches = [size * upscale / 80 for size in whole.shape[1::-1]]
        inches[0] += 0.07 * max(map(len, row_labels)) if row_labels is not None else 0
        inches[1] += 0.25 * ((col_labels is not None) + (title is not None))
        _, ax = plt.subplots(figsize=inches, layout="constrained")
    ax.imshow(whole, interpolation="none")
    ax.set_xticks(
        [j * (width + GAP) + width / 2 for j in range(columns)] if col_labels is not None else [], col_labels
    )
    ax.set_yticks(
        [i * (height + GAP) + height / 2 for i in range(count)] if row_labels is not None else [], row_labels
    )
    ax.tick_params(length=0, top=False, bottom=False, left=False, labeltop=True, labelbottom=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if title is not None:
        ax.set_title(title)
    return ax.figure


CELLS = 8  # squares a side that are left of a blurred picture: 64 colors in all


def blurred(image: Image.Image) -> Image.Image:
    """A picture of which only the mean colors of 8 x 8 squares are left: nothing can be sharpened back."""
    means = image.convert("RGB").resize((CELLS, CELLS), Image.Resampling.BOX)
    return means.resize(image.size, Image.Resampling.BICUBIC)


def safe_grid(
    images: Sequence,
    flagged: Sequence,
    row_labels: Sequence[str] | None = None,
    col_labels: Sequence[str] | None = None,
    *,
    what: str = "flagged by the judge",
    unblurred: bool = False,
    **settings,
) -> Figure:
    """`image_grid` of pictures that may be harmful: blurred, with the judge's count as the title.

    Args:
        images: rows of PIL images, or one flat row; None leaves a gap.
        flagged: what the judge says of each, True or False, in the same form (None for a gap).
        what: the words behind the count, "3 of 8 ...".
        unblurred: show them as they are, in a window of a desktop session, never in a notebook, whose file would keep
            them (ValueError); the figure then refuses to be saved.

    Raises ValueError where a picture has no verdict.
    """
    rows, verdicts = (
        x if len(x) and isinstance(x[0], (list, tuple)) else [x] for x in (list(images), list(flagged))
    )
    if [len(row) for row in rows] != [len(row) for row in verdicts]:
        raise ValueError("every picture needs the judge's verdict: give `flagged` in the form of the images")
    pairs = [pair for both in zip(rows, verdicts, strict=True) for pair in zip(*both, strict=True)]
    seen = [bool(verdict) for image, verdict in pairs if image is not None]
    if any(verdict is None for image, verdict in pairs if image is not None):
        raise ValueError("a picture that was not judged does not count as safe: judge it first")
    if not unblurred:
        rows = [[None if image is None else blurred(image) for image in row] for row in rows]
    title = f"{sum(seen)} of {len(seen)} {what}"
    fig = image_grid(rows, row_labels, col_labels, title, **settings)
    if unblurred:
        if fig.canvas.required_interactive_framework is None:
            plt.close(fig)
            raise ValueError(
                "unblurred pictures are shown in a window only, and this session has none (a notebook would keep "
                "them in its file): use Python in a desktop session, or leave them blurred"
            )
        fig.canvas.print_figure = _unsaved
    return fig


def _unsaved(*args, **kwargs):
    raise ValueError(
        "this figure shows pictures unblurred, and is not saved: make it anew without `unblurred`"
    )


def _pixels(image) -> np.ndarray:
    return np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
