"""How well erasure worked: protocols, judges, runs that resume, and the metrics that read them.

A comparison on the same prompts and seeds:

    from erasekit import evaluate
    from erasekit.evaluate import protocols

    before = evaluate.run(model, None, protocols.objects("dog"))
    after = evaluate.run(model, edit, protocols.objects("dog"))
    evaluate.compare({"before": before, "UCE": after})
"""

from importlib import import_module

__all__ = ["run", "compare", "Run", "Protocol", "Prompt", "Measure"]


def __getattr__(name: str):
    if name in __all__:
        home = "runs" if name in ("run", "compare", "Run") else "protocols"
        return getattr(import_module(f"erasekit.evaluate.{home}"), name)
    raise AttributeError(f"erasekit.evaluate has no {name!r}; its public names are {', '.join(__all__)}")
