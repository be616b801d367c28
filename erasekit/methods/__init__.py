"""One paper, one file. A method is a module with `Config`, `PRESETS` and `fit`."""

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

METHODS = {"uce": uce, "esd": esd, "mace": mace, "rece": rece, "realera": realera, "trce": trce,
           "advunlearn": advunlearn, "dp": dp, "speed": speed, "oce": oce,
           "adavd": adavd, "semantic_surgery": semantic_surgery, "safree": safree, "sld": sld}  # fmt: skip

__all__ = ["METHODS", *METHODS]
