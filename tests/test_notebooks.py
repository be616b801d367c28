"""The committed notebooks are executed, canonical and strict in their parameters; nothing runs here."""

import base64
from pathlib import PurePosixPath

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbval.plugin import get_sanitize_patterns

from erasekit import exercises, notebooks
from erasekit.paths import NOTEBOOKS

COMMITTED = sorted(NOTEBOOKS.glob("*.ipynb"))


def test_the_first_notebooks_exist():
    numbers = {path.stem.split("_")[0] for path in COMMITTED}
    assert {
        "00",
        "01",
        "02",
        "03",
        "10",
        "11",
        "12",
        "13",
        "20",
        "21",
        "22",
        "23",
        "30",
        "40",
        "90",
    } <= numbers


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebook(path):
    assert notebooks.problems(path) == []


EXERCISES = [path for path in COMMITTED if "exercises.check_" in path.read_text()]


def test_every_chapter_has_an_exercise():
    without = {path.stem for path in COMMITTED} - {path.stem for path in EXERCISES}
    assert without == {"14_null_spaces", "15_at_inference", "90_stable_diffusion", "91_on_a_gpu"}


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.stem)
def test_a_stub_does_not_pass_and_its_solution_does(path, capsys):
    cells = nbformat.read(path, 4).cells
    at = next(i for i, cell in enumerate(cells) if "exercises.check_" in cell.source)
    stubs, folded = cells[at].source, cells[at + 1].source
    assert folded.startswith("<details>") and folded.endswith("</details>")
    solution = folded.partition("```python\n")[2].partition("```")[0]
    checks = stubs[stubs.index("exercises.check_") :]
    exec(stubs, {"exercises": exercises})
    said = capsys.readouterr().out
    assert said.count("not solved yet") == len(checks.splitlines()) and "passed" not in said
    exec(solution + checks, {"exercises": exercises, "torch": torch})
    assert capsys.readouterr().out.count("all tests passed") == len(checks.splitlines())


def test_a_wrong_answer_is_told_what_is_wrong():
    with pytest.raises(AssertionError, match="eta 0 should give the unconditional prediction"):
        exercises.check_esd_target(lambda uncond, text, eta: text)


def test_sanitize_file_loads_every_rule_it_contains():
    text = (NOTEBOOKS / "sanitize.cfg").read_text()
    assert len(get_sanitize_patterns(text)) == text.count("regex:") > 0


# Each rule catches what it is for: a good notebook, broken in one place, is reported for that place.

PARAMETERS = "seed: int = 0  # noise\ninteractive: bool = False\nrun_gpu: bool = False"


def good_notebook(paper=False):
    headings = [new_markdown_cell(f"## {heading}") for heading in notebooks.PAPER_HEADINGS] if paper else []
    checked = [
        new_code_cell(f"# NBVAL_CHECK_OUTPUT\nprint({i})", outputs=[new_output("stream", text=f"{i}\n")])
        for i in range(3)
    ]
    cells = [
        new_markdown_cell("# Title"),
        *headings,
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        *checked,
        new_code_cell("x = 1"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return number(new_notebook(cells=cells, metadata={"kernelspec": kernel}))


def number(notebook):
    for i, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.execution_count = i
    return notebook


def add(source="", *outputs, **metadata):
    def change(notebook):
        notebook.cells.append(new_code_cell(source, outputs=list(outputs), metadata=metadata))
        number(notebook)

    return change


def change_last(**fields):
    return lambda notebook: notebook.cells[-1].update(fields)


def set_parameters(source):
    return lambda notebook: next(c for c in notebook.cells if c.metadata.get("tags")).update(source=source)


def text(value):
    return new_output("stream", text=value)


def shown(kind, data):
    return new_output("display_data", {kind: data})


def table(rows, columns):
    line = "<tr><th>row</th>" + "<td>1</td>" * columns + "</tr>"
    return "<table><tr>" + "<th>head</th>" * (columns + 1) + "</tr>" + line * rows + "</table>"


def test_a_table_that_can_be_read_and_a_folded_one_pass():
    folded = f"<details><summary>all</summary>{table(50, 20)}</details>"
    assert list(notebooks._open_tables(table(15, 7) + folded)) == [(7, 15)]


PNG = shown("image/png", base64.b64encode(b"picture").decode())
BROKEN = {
    "gap in counts": (change_last(execution_count=9), "execution counts"),
    "never executed": (change_last(execution_count=None), "execution counts"),
    "old format": (lambda nb: nb.update(nbformat_minor=4), "not 4.5|not a valid"),
    "other kernel": (lambda nb: nb.metadata.kernelspec.update(name="conda-env"), "kernelspec"),
    "no parameters": (lambda nb: [cell.metadata.pop("tags", 0) for cell in nb.cells], "exactly one cell"),
    "two parameter cells": (add("n: int = 1", tags=["parameters"]), "exactly one cell"),
    "computed parameter": (set_parameters(PARAMETERS + "\ntwice = seed * 2"), "must be a literal"),
    "no seed": (set_parameters(PARAMETERS.partition("\n")[2]), "lacks seed"),
    "too few checks": (lambda nb: nb.cells[-2].update(source="print(2)"), "2 cells marked"),
    "skipped cell": (add("# NBVAL_SKIP\n1"), "exempt"),
    "expected failure": (add("1", tags=["raises-exception"]), "exempt"),
    "installs": (add("!pip install x"), "installs packages"),
    "not Python": (add("for"), "not Python"),
    "class": (add("class A: pass"), "defines class A"),
    "long function": (add("def f():\n" + "    x = 1\n" * 10), "defines f, longer"),
    "figure never saved": (add("save_figure(fig, 'no_such_figure', data=d)"), "no_such_figure"),
    "stderr": (add("1", new_output("stream", name="stderr", text="warning")), "stderr output"),
    "error": (add("1", new_output("error", ename="E", evalue="", traceback=[])), "error output"),
    "widget": (add("1", shown("application/vnd.jupyter.widget-view+json", {"model_id": "a"})), "live widget"),
    "long table": (add("1", shown("text/html", table(16, 2))), "16 rows"),
    "wide table": (add("1", shown("text/html", table(2, 8))), "8 columns"),
    "timing metadata": (add("1", papermill={"duration": 1}), "canonical"),
    "absolute path": (
        add("1", text(f"saved {PurePosixPath('/', 'home', 'someone', 'x.png')}")),
        "path or name",
    ),
    "huge output": (add("1", text("x" * 200_001)), "output over"),
    "huge file": (lambda nb: nb.cells[0].update(source="x" * 1_000_001), "bytes, more than"),
    "same picture twice": (add("1", PNG, PNG), "picture twice"),
}


def written(notebook, folder, name="00_good"):
    path = folder / f"{name}.ipynb"
    path.write_text(nbformat.writes(notebook) + "\n")
    return path


@pytest.mark.parametrize("name, paper", [("00_good", False), ("10_paper", True)])
def test_a_good_notebook_passes(tmp_path, name, paper):
    assert notebooks.problems(written(good_notebook(paper), tmp_path, name)) == []


@pytest.mark.parametrize("case", BROKEN)
def test_each_rule_catches_its_fault(tmp_path, case):
    change, expected = BROKEN[case]
    notebook = good_notebook()
    change(notebook)
    found = notebooks.problems(written(notebook, tmp_path))
    assert any(part in problem for problem in found for part in expected.split("|")), found


@pytest.mark.filterwarnings("ignore::nbformat.warnings.DuplicateCellId")
def test_double_ids_are_caught(tmp_path):
    notebook = good_notebook()
    path = written(notebook, tmp_path)
    path.write_text(path.read_text().replace(notebook.cells[-1].id, notebook.cells[0].id))
    assert "cell ids are not unique" in notebooks.problems(path)


def test_harmless_text_is_not_a_machine_path(tmp_path):
    notebook = good_notebook()
    page, relative = "/".join(["https:", "", "example.org", "home", "page"]), PurePosixPath("..", "tmp", "x")
    add("1", text(f"data/emoji/model, 3/4, {page}, {relative}"))(notebook)
    assert notebooks.problems(written(notebook, tmp_path)) == []


def test_paper_notebooks_need_the_headings_in_order(tmp_path):
    assert any(
        "headings" in problem for problem in notebooks.problems(written(good_notebook(), tmp_path, "10_uce"))
    )
    notebook = good_notebook(paper=True)
    notebook.cells[1], notebook.cells[2] = notebook.cells[2], notebook.cells[1]
    assert any(
        "headings" in problem for problem in notebooks.problems(written(notebook, tmp_path, "20_rece"))
    )


def test_figures_are_looked_for(tmp_path):
    notebook = good_notebook()
    add("figures.save_figure(fig, name='curve', data=d)\nsave_figure(fig, 'grid', data=d)")(notebook)
    path = written(notebook, tmp_path)
    assert notebooks.figure_names(path) == ["curve", "grid"]
    for name in ("curve", "grid"):
        for kind in notebooks.FIGURE_FILES:
            (tmp_path / f"{name}.{kind}").touch()
    assert notebooks.problems(path, figures=tmp_path) == []
    (tmp_path / "grid.csv").unlink()
    assert notebooks.problems(path, figures=tmp_path) == [
        f"save_figure('grid') has no csv in {tmp_path.name}/"
    ]
