"""The exercise of CONTRIBUTING.md: a new method is one file and one entry of METHODS."""

import importlib
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import erasekit as ek
from erasekit import figures
from erasekit.methods import METHODS

TOY = '''"""Toy: every row of a concept's prompt goes part of the way to that of the empty prompt.

    lam    -> the ridge
"""

from dataclasses import dataclass

import torch

from erasekit import closed_form
from erasekit.edits import Edit
from erasekit.settings import asked, check


@dataclass(frozen=True)
class Config:
    """Settings of Toy. alpha: how far, 0 stays and 1 goes all the way."""

    alpha: float = 1.0
    lam: float = 0.1

    def __post_init__(self):
        check(self, alpha=0, lam=0)


PRESETS = {"sd14-object": Config()}


def fit(model, erase, preserve=(), *, anchor=None, config=None, generator=None, callback=None):
    config, erased, kept, _ = asked(PRESETS, model, config, erase, preserve, anchor, generator, trains=False)
    erased, kept = ([one.name for one in side] for side in (erased, kept))
    rows, nothing, stay = (model.encode(side).flatten(0, 1) for side in (erased, [""] * len(erased), ["", *kept]))
    found = closed_form.solve(rows, torch.lerp(rows, nothing, config.alpha), stay, lam=config.lam)
    named = {"erase": erased, "anchor": [], "preserve": kept}
    return Edit.from_context_map(found, model, method="toy", config=config, concepts=named)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The method, from a file of its own, with its entry."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("toy")
    monkeypatch.setitem(METHODS, "toy", module)
    yield module
    del sys.modules["toy"]


@pytest.fixture
def commands(toy, monkeypatch):
    """The command line as a process finds it that starts with the entry."""
    monkeypatch.delitem(sys.modules, "erasekit.cli_methods", raising=False)
    return importlib.import_module("erasekit.cli_methods")


def test_it_erases_and_leaves_the_model_alone(toy, shared_model):
    draw = lambda: np.asarray(shared_model.generate(["a church"], seeds=[0], steps=2)[0]).astype(int)
    before = draw()
    edit = toy.fit(shared_model, "church", "house")
    with edit.applied(shared_model):
        changed = np.abs(draw() - before).mean()
    assert changed > 0 and np.array_equal(draw(), before)
    none = toy.fit(shared_model, "church", config=toy.Config(alpha=0.0))  # the control
    with none.applied(shared_model):
        assert np.abs(draw() - before).mean() < 0.1 * changed


def test_the_shared_beginning_refuses_for_it(toy, shared_model, monkeypatch):
    with pytest.raises(ValueError, match="nothing to erase"):
        toy.fit(shared_model, [])
    with pytest.raises(ValueError, match="alpha must be at least 0"):
        toy.Config(alpha=-1)
    # it has no preset for this world, so the other one is taken; the words are the world's
    monkeypatch.setattr(shared_model, "preset", "emoji")
    assert toy.fit(shared_model, "church").metadata["config"]["alpha"] == 1.0
    with pytest.raises(ValueError, match="unknown concept 'chruch'"):
        toy.fit(shared_model, "chruch")


def test_the_command_line_has_it_with_its_options(commands, shared_model, tmp_path, capsys):
    shared_model.save_pretrained(tmp_path / "model")
    words = ["toy", "church", "--preserve", "house", "--alpha", "0.5", "--model", str(tmp_path / "model")]
    commands.erase([*words, "--out", str(tmp_path / "toy.safetensors")], result_action="return_value")
    edit = ek.Edit.load(tmp_path / "toy.safetensors")
    assert edit.metadata["method"] == "toy" and edit.metadata["config"] == {"alpha": 0.5, "lam": 0.1}
    assert edit.metadata["concepts"] == {"erase": ["church"], "anchor": [], "preserve": ["house"]}
    capsys.readouterr()
    commands.run(["toy", "--help"], result_action="return_value")
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "how far, 0 stays and 1 goes all the way" in said and "the ridge" in said


def test_without_the_entry_there_is_no_command(monkeypatch):
    monkeypatch.delitem(sys.modules, "erasekit.cli_methods", raising=False)
    known = set(importlib.import_module("erasekit.cli_methods").erase)
    assert "toy" not in known and METHODS.keys() <= known


def test_figures_draw_it(toy):
    rates = pd.DataFrame([{"what": "dog", "when": "after", "rate": 0.5, "low": 0.4, "high": 0.6}])
    name = next(one for one, module in METHODS.items() if module is toy)
    fig = figures.rates(rates, "what", "when", method=name)
    assert len(fig.axes[0].containers) == 1
    plt.close(fig)
