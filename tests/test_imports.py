"""One way down: what a file of the package may import."""

import ast
from pathlib import Path

from erasekit.paths import ROOT

# What methods and attacks stand on; none of these files knows a paper, a measurement or a world.
BELOW = (
    "closed_form concepts edits layers paths pipelines prompt_rows retained sampling settings states text_entries "
    "tokens training tuning"
).split()
BUILDS_ON = {"rece": {"uce"}, "realera": {"mace"}}  # papers that build on another one


def imported(file: Path) -> set[str]:
    """Modules of the package that a file imports anywhere in it, such as "methods.esd"."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "erasekit":
            inside = node.module.partition(".")[2]
            for name in node.names:
                whole = f"{inside}.{name.name}".strip(".")
                path = ROOT / "erasekit" / whole.replace(".", "/")
                found.add(whole if path.with_suffix(".py").exists() or path.is_dir() else inside)
        elif isinstance(node, ast.Import):
            found |= {name.name.partition(".")[2] for name in node.names if name.name.startswith("erasekit.")}
    return found


def wrong(package: Path) -> list[str]:
    """ "file -> module" for every import that goes up or across."""
    found = []
    for file in sorted(package.rglob("*.py")):
        name = ".".join(file.relative_to(package).with_suffix("").parts)
        floor, _, own = name.partition(".")
        for module in imported(file):
            to, _, what = module.partition(".")
            across = (
                floor == "methods"
                and own != "__init__"
                and to == "methods"
                and what not in BUILDS_ON.get(own, ())
            )
            up = (floor, to) in {("methods", "attacks"), ("attacks", "methods"), ("methods", "evaluate")}
            if across or up or (floor in BELOW and to in ("methods", "attacks", "evaluate", "emoji", "cli")):
                found.append(f"{name} -> {module}")
    return found


def test_nothing_imports_upwards(tmp_path):
    assert not wrong(ROOT / "erasekit")
    # the control: each rule sees what breaks it
    for file, line in {
        "methods/esd.py": "from erasekit.attacks import common",
        "methods/trce.py": "from erasekit.methods.esd import fit",
        "attacks/p4d.py": "from erasekit.methods import uce",
        "states.py": "from erasekit.evaluate import runs",
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(f"def later():\n    {line}\n")
    assert len(wrong(tmp_path)) == 4


def test_a_rule_for_every_file_below():
    assert all((ROOT / "erasekit" / f"{name}.py").exists() for name in BELOW)
