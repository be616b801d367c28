"""Exports with identical bytes, the data beside each figure, and the two presentations of `vary`."""

import io
import json
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

from erasekit import figures  # noqa: E402
from erasekit.paths import ROOT  # noqa: E402
from erasekit.widgets import vary  # noqa: E402

KINDS = ("csv", "json", "png", "svg")
DRAW = """
import sys, matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt, pandas as pd, pathlib
from erasekit import figures
figures.theme()
data = pd.DataFrame({"lam": [0.1, 1.0, 10.0], "rate": [1 / 3, float(sys.argv[2]), 0.9]})
fig, ax = plt.subplots()
ax.plot("lam", "rate", data=data, color=figures.METHOD_COLORS["rece"], marker="D", label="RECE")
ax.legend()
figures.save_figure(fig, "curve", data=data, notebook="20_rece", folder=pathlib.Path(sys.argv[1]))
"""


def draw(folder, value="0.5"):
    subprocess.run([sys.executable, "-c", DRAW, str(folder), value], check=True, cwd=ROOT)
    return {path.suffix[1:]: path.read_bytes() for path in folder.iterdir()}


def test_same_figure_same_bytes_in_two_processes(tmp_path):
    first, second, other = (
        draw(tmp_path / name, value) for name, value in (("a", "0.5"), ("b", "0.5"), ("c", "0.6"))
    )
    assert sorted(first) == sorted(KINDS), "one file of each kind and no temporary file left"
    assert first == second
    for kind in ("csv", "png", "svg"):
        assert first[kind] != other[kind], f"{kind} does not show the data"


def test_csv_holds_the_plotted_data_and_json_its_origin(tmp_path):
    files = draw(tmp_path)
    data = pd.read_csv(io.BytesIO(files["csv"]))
    assert data["lam"].tolist() == [0.1, 1.0, 10.0]
    np.testing.assert_allclose(data["rate"], [1 / 3, 0.5, 0.9], rtol=1e-5)
    record = json.loads(files["json"])
    assert (record["notebook"], record["columns"], record["rows"]) == ("20_rece", ["lam", "rate"], 3)


@pytest.mark.parametrize(
    "name, data",
    [
        ("Bad Name", pd.DataFrame({"x": [1]})),
        ("../up", pd.DataFrame({"x": [1]})),
        ("empty", pd.DataFrame({"x": []})),
        ("listed", [1, 2]),
    ],
)
def test_bad_figures_are_refused_and_leave_nothing(tmp_path, name, data):
    fig, _ = plt.subplots()
    with pytest.raises(ValueError):
        figures.save_figure(fig, name, data=data, notebook="test", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_method_has_its_own_color_and_marker():
    assert figures.METHOD_COLORS.keys() == figures.METHOD_MARKERS.keys()
    assert len(set(figures.METHOD_COLORS.values())) == len(figures.METHOD_COLORS)
    assert len(set(figures.METHOD_MARKERS.values())) == len(figures.METHOD_MARKERS)
    assert {"uce", "rece", "esd", "mace", "realera", "trce", "advunlearn"} <= figures.METHOD_COLORS.keys()
    assert figures.METHOD_COLORS.keys() == {key.partition("-")[0] for key in figures.METHOD_NAMES}


def picture(value):
    return Image.new("RGB", (6, 4), (value, 0, 0))


MEASURED = pd.DataFrame([
    {"words": words, "model": model, "rate": rate, "low": rate - 0.02, "high": rate + 0.05}
    for words, model, rate in (("by name", "UCE", 0.1), ("by synonym", "UCE", 0.2),
                               ("by name", "RECE", 0.3), ("by synonym", "RECE", 0.4))
])  # fmt: skip


def drawn_rates(ax):
    """Of each line: what the mark shows, where its interval ends, and its color."""
    marks = {}
    for bars in ax.containers:
        ((rate, line),) = bars[0].get_xydata()
        (interval,) = bars[2][0].get_segments()
        marks[int(line)] = rate, *interval[:, 0], matplotlib.colors.to_hex(bars[0].get_color())
    return marks


@pytest.mark.parametrize("by", ["all", "line", "panel"])
def test_rates_draw_each_rate_on_its_line_in_its_panel_in_the_methods_color(by):
    lines = {"by name": "mace", "by synonym": "trce"}
    panels = {"UCE": "uce", "RECE": "rece"}
    fig = figures.rates(MEASURED, "words", "model", method={"all": "esd", "line": lines, "panel": panels}[by])
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == list(lines)
    for ax, panel in zip(fig.axes, panels, strict=True):
        assert ax.get_title() == panel and ax.get_xlim() == (-0.04, 1.04)
        marks = drawn_rates(ax)
        for i, row in enumerate(MEASURED[MEASURED["model"] == panel].to_dict("records")):
            key = {"all": "esd", "line": lines[row["words"]], "panel": panels[panel]}[by]
            *numbers, color = marks[i]
            assert numbers == pytest.approx([row["rate"], row["low"], row["high"]])
            assert color == figures.METHOD_COLORS[key]


def test_rates_show_no_more_of_the_axes_than_needed_when_asked():
    fig = figures.rates(MEASURED, "words", "model", whole=False)
    for ax, panel in zip(fig.axes, ("UCE", "RECE"), strict=True):
        part = MEASURED[MEASURED["model"] == panel]
        left, right = ax.get_xlim()
        assert left < part["low"].min() and part["high"].max() < right and right - left < 0.25
    assert fig.axes[0].get_xlim() != fig.axes[1].get_xlim()


def test_rates_have_titles_a_dotted_baseline_in_each_panel_and_a_line_beneath():
    base = {"UCE": 0.5, "RECE": 0.7}
    fig = figures.rates(MEASURED, "words", "model", titles={"UCE": "first"}, baseline=base, about="counted")
    assert [ax.get_title() for ax in fig.axes] == ["first", "RECE"] and fig.get_supxlabel() == "counted"
    for ax, at in zip(fig.axes, base.values(), strict=True):
        (dotted,) = [line for line in ax.get_lines() if line.get_linestyle() == ":"]
        assert set(dotted.get_xdata()) == {at}
    one = figures.rates(MEASURED, "words", "model", baseline={"RECE": 0.7})
    assert [sum(line.get_linestyle() == ":" for line in ax.get_lines()) for ax in one.axes] == [0, 1]
    with pytest.raises(ValueError, match="no panel ESD for a baseline: there are UCE, RECE"):
        figures.rates(MEASURED, "words", "model", baseline={"ESD": 0.7})


def test_a_matrix_shows_each_share_in_hundredths_and_lines_between_groups():
    shares = pd.DataFrame({"UCE": [0.0, 0.5, 1.0], "ESD": [0.25, np.nan, 0.126]}, index=["a", "b", "c"])
    fig = figures.matrix(shares, groups=["x", "x", "y"], about="dogs")
    ax = fig.axes[0]
    assert [text.get_text() for text in ax.texts] == ["0", "25", "50", "100", "13"]  # none for the empty cell
    assert [label.get_text() for label in ax.get_xticklabels()] == ["UCE", "ESD"]
    assert [line.get_ydata()[0] for line in ax.lines] == [2]
    plt.close(fig)


def test_image_grid_puts_each_picture_in_its_place():
    fig = figures.image_grid(
        [[picture(10), picture(20)], [picture(30), None]],
        row_labels=["before", "after"],
        col_labels=["church", "castle"],
        title="UCE",
    )
    (ax,) = fig.axes
    mosaic = ax.images[0].get_array()
    assert mosaic.shape == (4 + 2 + 4, 6 + 2 + 6, 3)
    assert (
        (mosaic[:4, :6, 0] == 10).all()
        and (mosaic[:4, 8:, 0] == 20).all()
        and (mosaic[6:, :6, 0] == 30).all()
    )
    assert (mosaic[6:, 8:] == 255).all(), "a gap is white"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["before", "after"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["church", "castle"]


def test_image_grid_takes_a_flat_row_and_an_axes():
    _, ax = plt.subplots()
    fig = figures.image_grid([picture(1), picture(2), picture(3)], ax=ax)
    assert fig is ax.figure and ax.images[0].get_array().shape == (4, 22, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"images": []},
        {"images": [[None]]},
        {"images": [picture(1), Image.new("RGB", (5, 5))]},
        {"images": [picture(1)], "col_labels": ["a", "b"]},
        {"images": [picture(1)], "row_labels": ["a", "b"]},
    ],
)
def test_image_grid_refuses_what_is_not_a_grid(arguments):
    with pytest.raises(ValueError):
        figures.image_grid(**arguments)


def test_vary_draws_every_value_without_widgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # importing it would now fail
    seen = []
    fig = vary(lambda lam, ax: seen.append((lam, ax)), interactive=False, lam=[0.1, 1.0, 10.0])
    assert [lam for lam, _ in seen] == [0.1, 1.0, 10.0]
    assert [ax.get_title() for ax in fig.axes] == ["lam = 0.1", "lam = 1.0", "lam = 10.0"]
    assert [ax for _, ax in seen] == fig.axes


def test_vary_crosses_two_choices_as_rows_and_columns():
    seen = []
    fig = vary(
        lambda concept, lam, ax: seen.append((concept, lam)),
        interactive=False,
        concept=["church", "dog"],
        lam=[1, 2, 3],
    )
    assert seen == [(concept, lam) for concept in ("church", "dog") for lam in (1, 2, 3)]
    assert fig.axes[0].get_gridspec().get_geometry() == (2, 3)


def test_vary_live_uses_the_same_function():
    seen = []
    assert vary(lambda lam, ax: seen.append((lam, ax is not None)), interactive=True, lam=[0.1, 1.0]) is None
    assert seen[:1] == [(0.1, True)]


@pytest.mark.parametrize("choices", [{}, {"lam": []}, {"a": [1], "b": [1], "c": [1]}])
def test_vary_refuses_what_it_cannot_show(choices):
    with pytest.raises(ValueError):
        vary(print, interactive=False, **choices)


def checkers(size, turned=False):
    """Black and white squares of one pixel: the mean of every larger square is the same grey, turned or not."""
    pixels = (np.indices((size, size)).sum(0) % 2 == turned) * np.uint8(255)
    return Image.fromarray(np.repeat(pixels[..., None], 3, 2))


def test_a_blurred_picture_does_not_depend_on_what_is_in_its_squares():
    """Two pictures that differ in every pixel and agree in 64 means are one picture after it: nothing to sharpen."""
    one, other = checkers(64), checkers(64, turned=True)
    assert (np.asarray(one) != np.asarray(other)).all()
    assert figures.blurred(one).tobytes() == figures.blurred(other).tobytes()
    brighter = Image.fromarray(np.asarray(one) // 2)
    assert figures.blurred(brighter).tobytes() != figures.blurred(one).tobytes()  # control: the means do show
    assert figures.blurred(one).size == one.size


def rendered(fig):
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def test_the_safe_grid_is_blurred_counts_and_needs_a_verdict_for_each_picture(tmp_path):
    safe = figures.safe_grid([checkers(64), checkers(64)], [True, False])
    assert safe.axes[0].get_title() == "1 of 2 flagged by the judge"
    turned = figures.safe_grid([checkers(64, True), checkers(64, True)], [True, False])
    plain = [figures.image_grid([checkers(64, t)] * 2, title="x") for t in (False, True)]
    assert rendered(safe) == rendered(turned)
    assert rendered(plain[0]) != rendered(plain[1])  # control: unblurred, the pictures differ in the file
    figures.save_figure(safe, "safe", data=pd.DataFrame({"flagged": [1, 0]}), notebook="x", folder=tmp_path)
    gap = figures.safe_grid([[checkers(64), None]], [[False, None]], ["row"], what="show it")
    assert gap.axes[0].get_title() == "0 of 1 show it"
    for flagged in ([True], [True, None]):
        with pytest.raises(ValueError, match="judge"):
            figures.safe_grid([checkers(64)] * 2, flagged)


def test_unblurred_pictures_need_a_window_and_never_reach_a_file(tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with pytest.raises(ValueError, match="in a window only"):
        figures.safe_grid([checkers(64)], [True], unblurred=True)
    assert not plt.get_fignums(), "the refused figure is closed"
    monkeypatch.setattr(FigureCanvasAgg, "required_interactive_framework", "a desktop")
    fig = figures.safe_grid([checkers(64)], [True], unblurred=True)
    shown = np.asarray(fig.axes[0].get_images()[0].get_array())
    assert np.array_equal(shown, np.asarray(checkers(64)))
    data = pd.DataFrame({"flagged": [1]})
    for save in (
        lambda: fig.savefig(tmp_path / "picture.png"),
        lambda: fig.savefig(tmp_path / "picture.svg"),
        lambda: figures.save_figure(fig, "picture", data=data, notebook="x", folder=tmp_path),
    ):
        with pytest.raises(ValueError, match="not saved"):
            save()
    assert not list(tmp_path.iterdir())
