"""One way down: what a file of the package may import."""

import ast
from pathlib import Path

import pytest

from erasekit.paths import ROOT

# From the ground up: a file or folder imports from those before it and from its own; methods and attacks are neighbors.
FLOORS = (
    "paths concepts conditioning layers sampling closed_form filters training tokens worlds pipelines checkpoints "
    "miniatures models text_entries edits prompt_rows retained settings states recorded tuning "
    "emoji evaluate methods|attacks experiments figures card exercises drawings studio widgets notebooks __init__ "
    "cli_methods cli __main__"
).split()
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor.split("|")}
# Papers that build on another one, and attacks on another one or what all share
BUILDS_ON = {
    "methods.rece": {"methods.uce"},
    "methods.realera": {"methods.mace"},
    "attacks.concept_vector": {"attacks.ring_a_bell"},
}
SHARED = {"attacks.common"}
ABOVE_EXPERIMENTS = {"cli", "cli_methods", "__init__"}


def imported(file: Path) -> set[str]:
    """Modules of the package that a file imports anywhere in it, such as "methods.esd"; "__init__" for the package."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            package, _, inside = (node.module or "").partition(".")
            if node.level:
                raise ValueError(f"{file.name} has a relative import, which these rules do not read")
            names = {name.name for name in node.names} - {"__version__"}
            for name in names if package == "erasekit" else ():
                whole = f"{inside}.{name}".strip(".")
                path = ROOT / "erasekit" / whole.replace(".", "/")
                found.add(whole if path.with_suffix(".py").exists() or path.is_dir() else inside)
        elif isinstance(node, ast.Import):
            names = [name.name.partition(".") for name in node.names]
            found |= {inside for package, _, inside in names if package == "erasekit"}
    return {name or "__init__" for name in found}


def broken(importer: str, module: str) -> str | None:
    """The rule that an import breaks, if it breaks one. importer, module: such as "methods.esd"."""
    floor, _, own = importer.partition(".")
    to, _, _ = module.partition(".")
    if to == "experiments" and floor not in ABOVE_EXPERIMENTS | {"experiments"}:
        return "only the command line imports experiments"
    if (floor, to) in {("methods", "evaluate"), ("methods", "emoji")}:
        return "a method sees no judge and no world"
    if floor == to:
        alone = floor in ("methods", "attacks") and own != "__init__"
        if alone and module not in BUILDS_ON.get(importer, set()) | SHARED:
            return "a paper imports another only where it builds on it"
        return None
    return None if HEIGHT[to] < HEIGHT[floor] else "imports go down"


def wrong(package: Path) -> dict[str, str]:
    """{"file -> module": rule} for every import that breaks a rule."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        name = ".".join(file.relative_to(package).with_suffix("").parts)
        if name == "__init__":  # the public names, for type checkers
            continue
        for module in imported(file):
            if rule := broken(name, module):
                found[f"{name} -> {module}"] = rule
    return found


def test_every_file_has_a_floor():
    package = ROOT / "erasekit"
    there = {path.stem for path in package.glob("*.py")}
    there |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert there == HEIGHT.keys()


def test_every_import_goes_down():
    assert wrong(ROOT / "erasekit") == {}


@pytest.mark.parametrize(
    ("file", "line", "rule"),
    [
        ("concepts.py", "from erasekit.models import load", "imports go down"),
        ("models.py", "from erasekit.emoji import data", "imports go down"),
        ("models.py", "import erasekit as ek", "imports go down"),
        ("models.py", "from erasekit import load", "imports go down"),
        ("states.py", "from erasekit.evaluate import runs", "imports go down"),
        ("settings.py", "from erasekit import methods", "imports go down"),
        ("emoji/judge.py", "import erasekit.evaluate.metrics", "imports go down"),
        ("evaluate/runs.py", "from erasekit.attacks.common import Attempt", "imports go down"),
        ("evaluate/world.py", "from erasekit.methods import METHODS", "imports go down"),
        ("methods/esd.py", "from erasekit.attacks import common", "imports go down"),
        ("attacks/p4d.py", "from erasekit.methods import uce", "imports go down"),
        ("experiments/tables.py", "from erasekit import cli_methods", "imports go down"),
        ("methods/trce.py", "from erasekit.methods.esd import fit", "a paper imports another only"),
        ("attacks/p4d.py", "from erasekit.attacks import mma", "a paper imports another only"),
        ("methods/esd.py", "from erasekit.evaluate import judges", "a method sees no judge"),
        ("methods/esd.py", "from erasekit.emoji import data", "a method sees no judge"),
        ("evaluate/runs.py", "from erasekit.experiments import tables", "only the command line"),
        ("widgets.py", "from erasekit import experiments", "only the command line"),
    ],
)
def test_each_rule_sees_what_breaks_it(tmp_path, file, line, rule):
    """An import that is hidden in a function, of an otherwise empty package."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"def later():\n    {line}\n")
    (found,) = wrong(tmp_path).values()
    assert found.startswith(rule)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("methods/rece.py", "from erasekit.methods import uce"),
        ("attacks/p4d.py", "from erasekit.attacks import common"),
        ("attacks/p4d.py", "from erasekit.evaluate import judges"),
        ("methods/esd.py", "from erasekit import closed_form"),
        ("cli.py", "from erasekit.experiments import promotion"),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"{line}\n")
    assert wrong(tmp_path) == {}
    assert imported(tmp_path / file)


def test_papers_that_build_on_another_import_it():
    """A permission that nobody uses is taken back."""
    for importer, modules in BUILDS_ON.items():
        assert modules <= imported(ROOT / "erasekit" / f"{importer.replace('.', '/')}.py")
