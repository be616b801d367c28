"""Dossiers and published numbers: all of a paper that we know of is listed, and what is named exists."""

import json
import re

import nbformat
import pandas as pd
import pytest

from erasekit import figures
from erasekit.evaluate import published
from erasekit.experiments.tables import TABLES
from erasekit.paths import FIGURES

NOTEBOOKS = {
    "uce": "10_uce",
    "esd": "11_esd",
    "mace": "12_mace",
    "rece": "20_rece",
    "realera": "21_realera",
    "trce": "22_trce",
    "advunlearn": "23_advunlearn",
}


def made(name: str) -> str:
    """The notebook that draws a figure."""
    return json.loads((FIGURES / f"{name}.json").read_text())["notebook"]


@pytest.mark.parametrize("paper", published.PAPERS)
def test_a_dossier_names_what_exists(paper):
    table = pd.read_csv(published.FOLDER / "dossiers.csv", keep_default_na=False)
    table = table[table["paper"] == paper]
    assert set(table["state"]) <= set(published.STATES) and table["item"].is_unique
    assert set(table["table"]) - {""} <= set(TABLES)
    for one in table.itertuples():
        for name in one.figures.split():
            assert made(name), f"{one.item} names a figure without a record: {name}"
        if one.state in ("measured", "analogue"):
            assert one.figures or one.note, f"{one.item} is said to be here, and nothing says where"
        if one.state == "weights":
            assert one.table or "python -m erasekit" in one.note, f"{one.item} needs a command"


@pytest.mark.parametrize("paper", published.PAPERS)
def test_two_analogues_of_each_paper_are_drawn_by_its_notebook(paper):
    found = published.dossier(paper)
    analogues = found[found["state"] == "analogue"]["figures"].str.split().explode().dropna()
    own = [name for name in analogues if made(name) == NOTEBOOKS[paper]]
    assert len(own) >= 2


@pytest.mark.parametrize("paper", published.PAPERS)
def test_a_notebook_shows_its_dossier(paper):
    source = (FIGURES.parent / "notebooks" / f"{NOTEBOOKS[paper]}.ipynb").read_text()
    assert f'published.page(\\"{paper}\\")' in source


@pytest.mark.parametrize("paper", published.PAPERS)
def test_a_citation_is_that_of_its_notebook(paper):
    entry = dict(re.findall(r"(\w+) = \{(.+)\},\n", published.citation(paper)))
    cells = nbformat.read(FIGURES.parent / "notebooks" / f"{NOTEBOOKS[paper]}.ipynb", 4).cells
    words = " ".join(" ".join(cell.source for cell in cells if cell.cell_type == "markdown").split())
    assert entry["title"] in words and f"arXiv {entry['eprint']}" in words and entry["year"] in words
    assert entry["author"].partition(",")[0] in words and entry.get("booktitle", "") in words


def test_numbers_say_where_they_come_from():
    found = published.rates()
    words = ["paper", "metric", "method", "unit", "model", "protocol", "source", "trust"]
    assert (found[words].fillna("").map(len) > 0).all(axis=None)
    assert found["rate"].notna().equals(found["unit"] == "%") and found["rate"].dropna().between(0, 1).all()
    one = found.duplicated(["paper", "metric", "method", "model", "protocol", "source"])
    assert not one.any(), found[one]


def test_a_page_has_a_line_for_each_item():
    page = published.page("advunlearn")
    assert page.count("<tr>") == len(published.dossier("advunlearn")) + 1
    assert "run_gpu=True -p table=advunlearn-object" in page and "analogue here" in page


def test_an_unknown_paper_is_told_which_there_are():
    with pytest.raises(ValueError, match="there is one of: uce"):
        published.dossier("fmn")
    with pytest.raises(ValueError, match="some of: advunlearn"):
        published.rates("fmn")


def sides(**more):
    left = pd.DataFrame({"row": ["a", "b"], "series": "UCE", "rate": [0.1, 0.9]})
    right = left.assign(low=[0.0, 0.8], high=[0.2, 1.0])
    return left.assign(**more), right.assign(**more)


def test_a_papers_markers_are_hollow_and_ours_have_intervals():
    fig = figures.beside(*sides(), methods={"UCE": "uce"})
    paper, here = fig.axes
    (mark,), (own,) = paper.containers, here.containers
    assert mark.lines[0].get_markerfacecolor() == "none" and not mark.lines[2]
    assert own.lines[0].get_markerfacecolor() == figures.METHOD_COLORS["uce"] and own.lines[2]
    assert not fig.legends  # one series needs none


def test_how_far_a_papers_numbers_can_be_trusted_stands_above_them():
    left, right = sides()
    fig = figures.beside(left.assign(trust="recalled, not confirmed"), right, methods={"UCE": "uce"})
    assert [ax.get_title() for ax in fig.axes] == ["in the paper\n(recalled, not confirmed)", "measured here"]
    assert figures.beside(left, right, methods={"UCE": "uce"}).axes[0].get_title() == "in the paper"


def test_numbers_as_rows_are_an_axis():
    left, right = sides()
    fig = figures.beside(left.assign(row=[1, 10]), right.assign(row=[1, 50]), methods={"UCE": "uce"})
    assert [ax.get_xscale() for ax in fig.axes] == ["log", "log"]
    assert [tick.get_text() for tick in fig.axes[1].get_xticklabels()] == ["1", "50"]


def test_more_than_four_panels_are_refused():
    many = [pd.concat(side.assign(panel=name) for name in "xyz") for side in sides()]
    with pytest.raises(ValueError, match="two lines of panels at most, got 3"):
        figures.beside(*many, methods={"UCE": "uce"})
