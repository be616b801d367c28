"""pyproject.toml is the one place a dependency is named; the lock and environment.yml only follow it."""

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from erasekit.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def locked(file: str = "requirements.lock") -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-docs.lock"])
def test_lock_is_plain_pins(file):
    for line in (ROOT / file).read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line), line


def assert_locked(line, file):
    wanted = Requirement(line)
    version = locked(file).get(canonicalize_name(wanted.name))
    assert version is not None, f"{wanted.name} is not in {file}"
    assert wanted.specifier.contains(version), f"{file} pins {wanted.name} {version}, outside {line}"


@pytest.mark.parametrize(
    "line",
    PROJECT["dependencies"]
    + [
        line
        for name in ("notebooks", "nudity", "imagenet", "test", "browser", "workflow")
        for line in EXTRAS[name]
    ],
)
def test_lock_satisfies_pyproject(line):
    assert_locked(line, "requirements.lock")


@pytest.mark.parametrize("line", EXTRAS["docs"])
def test_docs_lock_satisfies_pyproject(line):
    assert_locked(line, "requirements-docs.lock")


def test_no_package_is_in_both_locks():
    assert not locked().keys() & locked("requirements-docs.lock").keys()


def test_lock_has_the_torch_that_was_tested():
    assert locked()["torch"] == "2.13.0"


def test_environment_names_nothing_of_its_own():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    python = next(entry for entry in conda if entry.startswith("python="))
    assert sorted(entry.split("=")[0] for entry in conda) == ["pip", "python"]
    assert Requirement("python" + PROJECT["requires-python"]).specifier.contains(python.split("=")[1])
    reference, project = pip["pip"]
    assert reference == "-r requirements.lock"
    extras = re.fullmatch(r"-e \.\[([a-z,]+)\]", project)[1].split(",")
    assert set(extras) <= set(EXTRAS)


def test_console_script_exists():
    from erasekit import cli

    assert PROJECT["scripts"]["erasekit"] == "erasekit.cli:main" and callable(cli.main)


# Continuous integration


def commands(workflow: dict) -> list[str]:
    """The lines that the steps of a workflow run."""
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    return [line for step in steps for line in step.get("run", "").splitlines()]


def unknown(lines: list[str]) -> list[str]:
    """Commands that are neither `make` with targets of the Makefile nor `bash` with a script of the repository."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = lambda words: (
        len(words) > 1
        and (
            (words[0] == "make" and set(words[1:]) <= targets)
            or (words[0] == "bash" and (ROOT / words[1]).is_file())
        )
    )
    return [line for line in lines if not known(line.split())]


WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def test_workflow_runs_what_is_there():
    assert unknown(commands(WORKFLOW)) == []
    assert commands(WORKFLOW) == ["bash .ci/run", "make figures", "make docs"]
    run = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("exec ")]
    assert run == ["exec make test"] and unknown([line.removeprefix("exec ") for line in run]) == []


def test_unknown_commands_are_found():
    steps = [
        {"uses": "x@v1"},
        {"run": "make docs\nmake nothing"},
        {"run": "bash no_such_script"},
        {"run": "pip install x"},
        {"run": "make"},
    ]
    assert unknown(commands({"jobs": {"a": {"steps": steps}}})) == [
        "make nothing",
        "bash no_such_script",
        "pip install x",
        "make",
    ]


@pytest.mark.parametrize("job", WORKFLOW["jobs"])
def test_every_job_has_a_limit_pinned_actions_and_the_locked_python(job):
    job = WORKFLOW["jobs"][job]
    assert 0 < job["timeout-minutes"] <= 90
    uses = {name: step for step in job["steps"] if (name := step.get("uses"))}
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+(\.\d+)*", name) for name in uses), list(uses)
    (setup,) = [step["with"] for name, step in uses.items() if name.startswith("actions/setup-python@")]
    assert f"Python {setup['python-version']}" in (ROOT / "requirements.lock").read_text().splitlines()[0]
    assert setup["cache"] == "pip" and list(ROOT.glob(setup["cache-dependency-path"]))


def test_every_make_target_is_documented():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"\.PHONY: (.*)", text)[1].split())
    assert {"figures", "test", "notebooks", "refresh", "docs", "links", "clean", "help"} <= phony
    assert phony == set(re.findall(r"^([a-z]+):.*##", text, re.MULTILINE))
