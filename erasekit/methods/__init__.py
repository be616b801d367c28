"""One paper, one file. A method is a module with `Config`, `PRESETS` and `fit`."""

from erasekit.methods import rece, uce

METHODS = {"uce": uce, "rece": rece}

__all__ = ["METHODS", "rece", "uce"]
