"""One paper, one file. A method is a module with `Config`, `PRESETS` and `fit`."""

from erasekit.methods import uce

METHODS = {"uce": uce}

__all__ = ["METHODS", "uce"]
