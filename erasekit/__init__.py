"""erasekit: a laboratory for concept erasure in text-to-image diffusion models.

A model, an edit of it, and the model with the edit:

    import erasekit as ek

    model = ek.load("emoji")
    edit = ek.uce.fit(model, erase="church", preserve=["castle", "house"])
    with edit.applied(model):
        after = model.generate(["a church in flat style"], seeds=[0])
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from erasekit import attacks, closed_form, evaluate, experiments
    from erasekit.concepts import Concept
    from erasekit.edits import Edit
    from erasekit.methods import (
        adavd,
        advunlearn,
        dp,
        esd,
        mace,
        oce,
        realera,
        rece,
        safree,
        semantic_surgery,
        sld,
        speed,
        trce,
        uce,
    )
    from erasekit.models import DiffusionModel, load

try:
    __version__ = version("erasekit")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "unknown"

__all__ = [
    "load",
    "DiffusionModel",
    "Concept",
    "Edit",
    "attacks",
    "closed_form",
    "evaluate",
    "experiments",
    "uce",
    "esd",
    "mace",
    "rece",
    "realera",
    "trce",
    "advunlearn",
    "dp",
    "speed",
    "oce",
    "adavd",
    "semantic_surgery",
    "safree",
    "sld",
]

# Loaded on first use, so that the command line and the notebook runner start without torch.
_HOME = {
    "load": "erasekit.models",
    "DiffusionModel": "erasekit.models",
    "Concept": "erasekit.concepts",
    "Edit": "erasekit.edits",
    "uce": "erasekit.methods",
    "esd": "erasekit.methods",
    "rece": "erasekit.methods",
    "trce": "erasekit.methods",
    "mace": "erasekit.methods",
    "realera": "erasekit.methods",
    "advunlearn": "erasekit.methods",
    "dp": "erasekit.methods",
    "speed": "erasekit.methods",
    "oce": "erasekit.methods",
    "adavd": "erasekit.methods",
    "semantic_surgery": "erasekit.methods",
    "safree": "erasekit.methods",
    "sld": "erasekit.methods",
}


def __getattr__(name: str):
    if name in ("attacks", "closed_form", "evaluate", "experiments"):
        return import_module(f"erasekit.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"erasekit has no {name!r}; its public names are {', '.join(__all__)}")


def __dir__():
    return __all__
