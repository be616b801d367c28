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


def locked() -> dict[str, str]:
    lines = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")
    ]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_lock_is_plain_pins():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line), line


@pytest.mark.parametrize(
    "line", PROJECT["dependencies"] + EXTRAS["notebooks"] + EXTRAS["nudity"] + EXTRAS["test"]
)
def test_lock_satisfies_pyproject(line):
    wanted = Requirement(line)
    version = locked().get(canonicalize_name(wanted.name))
    assert version is not None, f"{wanted.name} is not in requirements.lock"
    assert wanted.specifier.contains(version), (
        f"requirements.lock pins {wanted.name} {version}, outside {line}"
    )


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


def test_every_make_target_is_documented():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"\.PHONY: (.*)", text)[1].split())
    assert {"figures", "test", "notebooks", "refresh", "clean", "help"} <= phony
    assert phony == set(re.findall(r"^([a-z]+):.*##", text, re.MULTILINE))
