"""What stands on methods and attacks: the runs behind data/results/, the papers' tables, and what reads them.

    from erasekit.experiments import comparison

    comparison.pooled(comparison.gathered())     # every committed result, counts added up

Nothing below imports these modules. Some are commands: `python -m erasekit.experiments.ablation`, `.search`,
`.deployment`, `.regeneration` and `.report`; `erasekit attack` and `erasekit promote` use the others.
"""

from importlib import import_module

__all__ = [
    "ablation",
    "comparison",
    "deployment",
    "promotion",
    "regeneration",
    "report",
    "search",
    "stages",
    "tables",
]


def __getattr__(name: str):
    if name in __all__:
        return import_module(f"erasekit.experiments.{name}")
    raise AttributeError(f"erasekit.experiments has no {name!r}; its public names are {', '.join(__all__)}")
