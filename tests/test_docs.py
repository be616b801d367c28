"""The site names every module, and what the front pages and notebooks point to is there. Nothing is built here."""

import json
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from erasekit.paths import NOTEBOOKS, ROOT

API = sorted((ROOT / "docs" / "api").glob("*.md"))


def public_modules(folder: Path) -> set[str]:
    """Dotted names of the modules below a package whose names do not begin with an underscore."""
    parts = [path.relative_to(folder.parent).with_suffix("").parts for path in folder.rglob("*.py")]
    parts = [p[:-1] if p[-1] == "__init__" else p for p in parts]
    return {".".join(p) for p in parts if not any(name.startswith("_") for name in p)}


def documented() -> list[str]:
    return [name for page in API for name in re.findall(r"automodule:: (\S+)", page.read_text())]


def test_every_public_module_is_documented_once():
    assert sorted(documented()) == sorted(public_modules(ROOT / "erasekit"))


def test_a_new_module_would_be_noticed(tmp_path):
    package = tmp_path / "erasekit"
    (package / "methods").mkdir(parents=True)
    for name in (
        "__init__.py",
        "__main__.py",
        "methods/__init__.py",
        "methods/made_up.py",
        "methods/_own.py",
    ):
        (package / name).touch()
    assert public_modules(package) - set(documented()) == {"erasekit.methods.made_up"}


def test_every_page_is_in_the_contents():
    contents = (ROOT / "docs" / "contents.md").read_text()
    for page in API:
        assert f"\ndocs/api/{page.stem}\n" in contents, page.name


# Links


def markdown(path: Path) -> str:
    """The text of a page without code, or of a notebook's Markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", markdown(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*\]\([^`\n]*`", "", markdown(path))  # a link inside code is none
    return re.findall(r"\]\(<?([^)\s>]+)[^)]*\)", text) + re.findall(r"""(?:src|href)=["']([^"']+)""", text)


def broken(path: Path) -> list[str]:
    """Relative links of a page that lead to no file or no heading."""
    found = []
    for link in links(path):
        if re.match(r"[a-z]+:", link):  # elsewhere: `make links`
            continue
        target, _, anchor = unquote(link).partition("#")
        goal = (path.parent / target).resolve() if target else path
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            found.append(link)
    return found


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "docs/models.md",
    *sorted((ROOT / "data").rglob("*.md")),
    *API,
]
PAGES += sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(path):
    assert broken(path) == []


def test_readme_lists_every_notebook():
    listed = [link for link in links(ROOT / "README.md") if link.endswith(".ipynb")]
    assert listed == [f"notebooks/{path.name}" for path in sorted(NOTEBOOKS.glob("*.ipynb"))]


def test_broken_links_are_found(tmp_path):
    (tmp_path / "there.md").write_text("# One heading, with `code`\n")
    (tmp_path / "page.md").write_text(
        "[good](there.md) [good](there.md#one-heading-with-code) [far](https://example.org/x) `[no](link)`\n"
        "[bad](gone.md), ![bad](gone.png 'title') and [bad](there.md#other) <img src='gone.svg'>\n\n"
        "```\n[code](gone.txt)\n```\n"
    )
    bad = ["gone.md", "gone.png", "there.md#other", "gone.svg"]
    assert broken(tmp_path / "page.md") == bad
    cells = [{"cell_type": "markdown", "source": [(tmp_path / "page.md").read_text()]}]
    cells.append({"cell_type": "code", "source": ["# [code](gone.txt)"]})
    (tmp_path / "page.ipynb").write_text(json.dumps({"cells": cells}))
    assert broken(tmp_path / "page.ipynb") == bad


# Names in code font: paths of the repository, notebooks, make targets


def missing_names(text: str) -> list[str]:
    """What code in a text names as a path, notebook or make target and is not there; NAME stands for any name."""
    spans = re.findall(r"`([^`\n]+)`", text)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    notebooks = {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"build"}
    found = []
    for span in spans:
        if re.fullmatch(r"make [a-z]+", span):
            wrong = span.split()[1] not in targets
        elif re.fullmatch(r"\d\d_\w+", span):
            wrong = span not in notebooks
        elif "NAME" not in span and re.fullmatch(r"[\w.-]+/[\w./-]*", span) and span.split("/")[0] in folders:
            wrong = not (ROOT / span).exists()
        elif re.fullmatch(r"\w+\.(md|toml|lock|yml)", span):
            wrong = not (ROOT / span).exists()
        else:
            wrong = False
        if wrong:
            found.append(span)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_named_paths_exist(path):
    assert missing_names(markdown(path)) == []


def test_missing_names_are_found():
    good = "`make test`, `10_uce`, `erasekit/cli.py`, `erasekit/methods/NAME.py`, `build/docs`, `README.md`, `and/or`"
    assert missing_names(good) == []
    for bad in ("make nothing", "99_no_such", "erasekit/no_such.py", "NOTHING.md"):
        assert missing_names(good + f" and `{bad}`") == [bad]


def test_the_minutes_of_the_readme_are_those_of_the_notebooks():
    words = {"Under a": 1, "One": 1, "Two": 2, "Three": 3, "Four": 4}
    table = re.findall(
        r"^\| \[`(\w+)`\].*\| (\d+) / (\d+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(table) == len(list(NOTEBOOKS.glob("*.ipynb")))
    for name, run, read in table:
        cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells[:4]
        said = " ".join(" ".join(cell.source for cell in cells).split())
        number, told, reading = re.search(
            r"(Under a|[A-Z][a-z]+)(?: (\d+))? minutes? to run on two CPU cores, (\d+)", said
        ).groups()
        assert (run, read) == (told or str(words[number]), reading), name
