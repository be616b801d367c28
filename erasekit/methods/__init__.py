"""One paper, one file. A method is a module with `Config`, `PRESETS` and `fit`."""

from erasekit.methods import advunlearn, esd, rece, trce, uce

METHODS = {"uce": uce, "esd": esd, "rece": rece, "trce": trce, "advunlearn": advunlearn}

__all__ = ["METHODS", "advunlearn", "esd", "rece", "trce", "uce"]
