"""The settings of a method, searched on classes that no table is about; and one training with several seeds.

    python -m erasekit.experiments.search uce --out data/results/search_uce.json
    python -m erasekit.experiments.search uce --setting "lam 1" --out data/results/search_ten_uce.json
    python -m erasekit.experiments.search esd --seeds dog --out data/results/search_seeds_esd.json

Every method but two has a budget of six settings of `SEARCHED`, first the preset "emoji" as it stood before the
search, and the authors' where they are known and can be paid, on each class of `ERASED` by `protocols.quick`. RECE has
eight: its authors have three, which begin with their UCE and make one, two and three rounds. UCE has seven: the last,
with the weight of keeping that its authors' code of 2023 takes by itself, was added when every table stood, and the
preset is what was chosen before (`KEPT`). `RULE`, which stands in the file, chooses one. Where that is told better
than what stood before (p, adjusted, at most 0.05) it is the preset now (but for `KEPT`). What makes a paper is no
setting: how many rounds RECE makes (but for those of its authors) and how AdvUnlearn's attacker works is not seen by
H_o, and a search by it would choose none. (DP's authors differ from the preset for names of several tokens alone.)

A lion and a bus were searched first, and chose the presets. The category (meals, beside other food) came when weapons
had shown that two classes alone do not see what a setting costs beside a category. It changed no preset; with it
SPEED's "all tokens" is not told better any more, which had been an exception because of the ten classes. UCE was the
other exception: all tokens and the authors' settings were told better than ours, which stayed. For it the rule got its
second half, when the ten classes had been measured too. For no other method does that half choose another setting.

With --setting what stood before and these settings are measured on the ten classes instead. With --seeds a class of
the ten is erased by the preset, trained anew with generators 0, 1 and 2, and measured by `protocols.quick` with 100
pictures of each kind. What is done is kept: an interrupted call goes on.
"""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from erasekit.evaluate import metrics, runs, world
from erasekit.evaluate.protocols import CIFAR, DEVELOPMENT, Protocol, quick
from erasekit.evaluate.records import (
    EditMade,
    Measurement,
    Result,
    by_picture,
    measurements,
    plain,
    read,
    save,
)
from erasekit.experiments.ablation import EQUAL, OWN_UCE, VARIANTS
from erasekit.methods import METHODS
from erasekit.models import DiffusionModel, load
from erasekit.paths import BUILD
from erasekit.settings import EMOJI_CAPTIONS

ERASED = ("lion", "bus", "meals")  # an animal and a vehicle, as the ten are, and a category
RULE = (
    "the highest mean H_o, of equals the one listed first; but the authors' where they are told better than what "
    "stood before and the highest is not told better than they are"
)
KEEPS = ("uce", "rece", "dp", "speed", "oce")  # are told the other classes, as on the ten
TRAINED = ("esd", "mace", "realera", "trce", "advunlearn")
SEEDS = (0, 1, 2)
RATES = ("Acc_e", "Acc_s", "Acc_g")
LEVEL = 0.05
BEFORE = {
    "uce": OWN_UCE,
    "adavd": {"b": 0.67},
    "semantic_surgery": {"beta": 0.35},
    "safree": {"alpha": 0.2},
}
# a preset that the rule would change, and why it stands: the setting was added when every table had been made with it
KEPT = {"uce": "of the authors"}  # chosen then, "all tokens" having the highest H_o
OWN_CAPTIONS = ("templates", "steer_templates", "keep_templates", "preserve_templates")  # of the emoji world


def before(method: str):
    """The Config of the preset "emoji" as it stood when its settings were searched."""
    return replace(METHODS[method].PRESETS["emoji"], **BEFORE.get(method, {}))


def of_authors(method: str, preset: str, *left_out: str, **more) -> dict:
    """What a preset of the authors has in which `before` differs, without the fields `left_out`, and with `more`."""
    own, found = before(method), METHODS[method].PRESETS[preset]
    values = {one.name: getattr(found, one.name) for one in fields(found)}
    return {k: v for k, v in values.items() if v != getattr(own, k) and k not in left_out} | more


SEARCHED: dict[str, dict[str, dict]] = {
    "uce": {
        "before": {},
        "of the authors": of_authors("uce", "sd14-object"),
        "lam 0.01": {"lam": 0.01},
        "lam 1": {"lam": 1.0},
        "all tokens": {"tokens": "all"},
        "preserve_scale 0.1": {"preserve_scale": 0.1},
        # the weight that the code of 2023 takes by itself where nine concepts or more are kept
        "of the authors, preserve_scale 0.1": of_authors("uce", "sd14-object", preserve_scale=0.1),
    },
    "rece": {
        "before": {},
        "of the authors": VARIANTS["rece"]["settings of the code"],
        "of the authors, unsafe": of_authors("rece", "sd14-unsafe"),
        "of the authors, nudity": of_authors("rece", "sd14-nudity"),
        "pairs of the start": {"pairs": "start"},
        "lam 0.01": {"lam": 0.01},
        "lam 1": {"lam": 1.0},
        "lambda_1 1": {"lambda_1": 1.0},
    },
    "dp": {
        "before": {},
        "of the authors": {"joint": False},  # the same but for names of several tokens
        "captions kept": {"preserve_templates": EMOJI_CAPTIONS},
        "captions erased, ridge 0.001": {"templates": EMOJI_CAPTIONS, "ridge": 1e-3},
        "empty prompt kept": {"preserve_null": True},
        "captions erased, in turn": {"templates": EMOJI_CAPTIONS, "joint": False},
    },
    "speed": {
        "before": {},
        "of the authors": of_authors("speed", "sd14-object"),
        "without IPF": {"ipf": False},
        "keys too": {"projections": "both"},
        "cut 0.01": {"cut": 0.01},
        "all tokens": {"tokens": "all"},
    },
    "oce": {
        "before": {},
        "of the authors": of_authors("oce", "sd14-object"),
        "e 200": {"e": 200.0},
        "e 20000": {"e": 20_000.0},
        "p 100": {"p": 100.0},
        "p2 10": {"p2": 10.0},
    },
    "adavd": {
        "before": {},
        "of the authors": of_authors("adavd", "sd14-object"),
        "b 0.8": {"b": 0.8},
        "b 0.6": {"b": 0.6},
        "b 0.5": {"b": 0.5},
        "c 1": {"c": 1.0},
    },
    "semantic_surgery": {
        "before": {},
        "of the authors": of_authors("semantic_surgery", "sd14-object"),
        "beta 0.25": {"beta": 0.25},
        "beta 0.45": {"beta": 0.45},
        "strength 0.5": {"strength": 0.5},
        "strength 2": {"strength": 2.0},
    },
    "safree": {
        "before": {},
        "of the authors": of_authors("safree", "sd14-object"),
        "alpha 0.1": {"alpha": 0.1},
        "alpha 0.5": {"alpha": 0.5},
        "captions": {"templates": EMOJI_CAPTIONS},
        "alpha 0.01, captions": {"alpha": 0.01, "templates": EMOJI_CAPTIONS},
    },
    "sld": {  # delta: the authors' share of 50 steps, of ten steps here
        "before": {},
        "medium of the authors": of_authors("sld", "sd14-medium", delta=2),
        "strong of the authors": of_authors("sld", "sd14-strong", delta=1),
        "max of the authors": of_authors("sld", "sd14-max"),
        "lam 0.1": {"lam": 0.1},
        "s_s 5000": {"s_s": 5000.0},
    },
    "esd": {
        "before": {},
        "of the authors, 2025": VARIANTS["esd"]["settings of 2025"],
        "eta 3": {"eta": 3.0},
        "lr 3e-4": {"lr": 3e-4},
        "ESD-u": {"parameters": "u"},
        "keys and values": {"parameters": "x-strict"},
    },
    "mace": {
        "before": {},
        "of the authors, captions ours": of_authors("mace", "sd14-object", *OWN_CAPTIONS, squared=False),
        "lambda_1 0.1": {"lambda_1": 0.1},
        "lr 3e-3": {"lr": 3e-3},
        "lr 3e-4": {"lr": 3e-4},
        "rank 4": {"rank": 4},
    },
    "realera": {  # the authors' are not known
        "before": {},
        "beyond weighs as neighbours": EQUAL,
        "lr 3e-4": {"lr": 3e-4},
        "lr 3e-3": {"lr": 3e-3},
        "cosine 0.7 to 0.95": {"s_low": 0.7, "s_high": 0.95},
        "n 20, m 12": {"n": 20, "m": 12},
    },
    "trce": {  # ways: 490 prompts five times, as the authors have it, take hours
        "before": {},
        "of the authors, captions ours, fewer ways": of_authors(
            "trce", "sd14-object", *OWN_CAPTIONS, "noises", "calm"
        ),
        "lr 1e-4": {"lr": 1e-4},
        "lr 1e-3": {"lr": 1e-3},
        "weight 1": {"weight": 1.0},
        "eta 1": {"eta": 1.0},
    },
    "advunlearn": {  # 45 minutes of a core; the authors' take hours for a class: notebook 23 has them on "dog"
        "before": {},
        "gamma 0.2": {"gamma": 0.2},
        "gamma 2": {"gamma": 2.0},
        "lr 3e-5": {"lr": 3e-5},
        "lr 3e-4": {"lr": 3e-4},
        "eta 3": {"eta": 3.0},
    },
}


@dataclass(frozen=True)
class Trial:
    """One edit of a file: setting, its Config, class (or category) and what it keeps, the seed of its training, its
    protocol.
    """

    setting: str
    config: object
    what: str
    kept: tuple[str, ...]
    seed: int
    protocol: Protocol

    @property
    def label(self) -> str:
        return f"{self.setting}, {self.what}"

    @property
    def erased(self) -> tuple[str, ...]:
        return self.protocol.erased


def trials(method: str, settings: Sequence[str] = (), seeds: str | None = None) -> list[Trial]:
    """Everything that one file holds. settings: these and what stood before on the ten classes; seeds: the preset on
    this class; without either the search.
    """
    base = before(method)
    others = lambda asked: tuple(dict.fromkeys(p.concept for p in asked.prompts if p.role == "other"))
    kept = lambda asked: others(asked) if method in KEEPS else ()
    if seeds:
        asked = quick(seeds, 100)
        preset = METHODS[method].PRESETS["emoji"]
        return [Trial(f"seed {seed}", preset, seeds, kept(asked), seed, asked) for seed in SEEDS]
    named = dict.fromkeys(("before", *settings)) if settings else SEARCHED[method]
    protocols = {one: quick(one) for one in (CIFAR if settings else ERASED)}
    return [
        Trial(setting, replace(base, **SEARCHED[method][setting]), one, kept(asked), 0, asked)
        for setting in named
        for one, asked in protocols.items()
    ]


def measure(
    model: DiffusionModel, method: str, trial: Trial, *, training: Path, pictures: Path = runs.RUNS
) -> tuple[EditMade, list[Measurement], dict]:
    """What was made, its measurements, and the verdict of every picture. training, pictures: folders."""
    own = {"folder": training} if method in TRAINED else {}
    generator = torch.Generator().manual_seed(trial.seed)
    edit = METHODS[method].fit(
        model, trial.erased, trial.kept, config=trial.config, generator=generator, **own
    )
    done = runs.run(model, edit, trial.protocol, folder=pictures)
    found = measurements(done.measured(), trial.protocol, trial.label, machine=runs.machine())
    return EditMade.of(edit, before(method)), found, done.verdicts()


def table(result: Result) -> pd.DataFrame:
    """One row for each setting (or seed) of a file, the first of which the others are compared with.

    setting; Acc_e, Acc_s, Acc_g ({k, n, rate, low, high}, classes added up); H_o (mean of the classes' own, so it does
    not follow from these); right: the mean over classes and kinds of picture of the share that came out as it should;
    difference of right to the first row, low, high and p (pairs, prompts resampled; Holm over the rows; NaN in the
    first), raw (p before Holm); chosen: by the file's rule, in a search alone. ValueError for a file that is not whole.
    """
    classes = list(dict.fromkeys(label.rpartition(", ")[2] for label in result.edits))
    settings = list(dict.fromkeys(label.rpartition(", ")[0] for label in result.edits))
    if short := [f"{s}, {c}" for s in settings for c in classes if f"{s}, {c}" not in result.edits]:
        raise ValueError(f"not measured: {'; '.join(short)}. Run it again, it goes on: {result.command}")
    rows, right = [], {}
    for setting in settings:
        values = [result.values(f"{setting}, {one}") for one in classes]
        counts = {name: [sum(one[name][key] for one in values) for key in "kn"] for name in RATES}
        row = {name: metrics.rate(*counts[name]) for name in RATES}
        rows.append(row | {"H_o": float(np.mean([one["H_o"]["harmonic_mean"] for one in values]))})
        verdicts = {one: result.details["verdicts"][f"{setting}, {one}"] for one in classes}
        right[setting] = _right(verdicts)
        assert len(right[setting]) == sum(n for _, n in counts.values())
    frame = pd.DataFrame(rows)
    frame.insert(0, "setting", settings)
    frame["right"] = [_mean(of) for of in right.values()]
    compared = [_paired(right[settings[0]], right[one]) for one in settings[1:]]
    for name in ("difference", "low", "high", "p"):
        frame[name] = [np.nan, *(one[name] for one in compared)]
    frame["raw"] = frame["p"]
    if compared:
        frame.loc[1:, "p"] = metrics.holm(frame["p"][1:])
    if "rule" in result.details:
        frame["chosen"] = frame.index == _chosen(frame, right)
    return frame


def _chosen(frame: pd.DataFrame, right: dict[str, pd.Series]) -> int:
    """The row that `RULE` chooses."""
    highest, theirs = frame["H_o"].idxmax(), frame["setting"].str.contains("of the authors")
    better = frame[theirs & frame["difference"].gt(0) & frame["p"].le(LEVEL)]
    for row in better.sort_values("H_o", ascending=False).itertuples():
        more = _paired(right[row.setting], right[frame["setting"][highest]])
        if more["difference"] <= 0 or more["p"] > LEVEL:
            return row.Index
    return highest


def _right(verdicts: dict[str, dict]) -> pd.Series:
    """1 where the picture shows what it should, of the erased anything else; by class, measure, prompt and seed.
    verdicts: of each class, as `Run.verdicts` gives them.
    """
    found = {
        (one, name, *picture): float(seen == (name == "Acc_s"))
        for one, of in verdicts.items()
        for name in RATES
        for picture, seen in by_picture(of[name]).items()
    }
    index = pd.MultiIndex.from_tuples(found, names=["class", "measure", "prompt", "seed"])
    return pd.Series(list(found.values()), index)


def _mean(right: pd.Series) -> float:
    return float(right.groupby(level=["class", "measure"]).mean().mean())


def _paired(a: pd.Series, b: pd.Series) -> dict:
    """{difference, low, high, p} of `_mean`, b - a, prompts resampled within each class and measure, so that every
    resample has the same mixture; as many pictures may differ unseen as Wilson's bound of 0 of all allows.
    """
    differences, generator = b - a, np.random.default_rng(0)
    parts = [
        metrics.clustered(part.to_numpy(), [part.index.get_level_values("prompt")], generator)
        for _, part in differences.groupby(level=["class", "measure"], sort=False)
    ]
    resampled = np.mean(parts, axis=0)
    low, high = np.quantile(resampled, [0.025, 0.975])
    if not differences.any():
        high = metrics.rate(0, len(differences))["high"]
        low = -high
    about = {"difference": _mean(differences), "low": float(low), "high": float(high)}
    return about | {"p": metrics.two_sided(resampled)}


def still_true(old: Result, new: Result, trial: Trial) -> bool:
    """Whether a file's trial was of the same model, edit and protocol."""
    made = old.edits.get(trial.label)
    same = made is not None and (old.fingerprint, old.vae) == (new.fingerprint, new.vae)
    same = same and (made.config, made.erased) == (plain(trial.config), trial.erased)
    # a trained method names all that it keeps
    same = same and (not trial.kept or made.preserved == trial.kept)
    return same and any((m.edit, m.hash) == (trial.label, trial.protocol.hash) for m in old.measurements)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=SEARCHED)
    parser.add_argument("--setting", action="append", default=[], help="on the ten classes; repeat for more")
    parser.add_argument(
        "--seeds", choices=CIFAR, metavar="CLASS", help="train the preset with seeds 0, 1 and 2"
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.seeds and given.method not in TRAINED:
        parser.error(f"{given.method} is not trained: a seed changes nothing")
    if unknown := set(given.setting) - set(SEARCHED[given.method]):
        parser.error(
            f"no setting {', '.join(sorted(unknown))}: there are {'; '.join(SEARCHED[given.method])}"
        )
    if given.seeds and given.setting:
        parser.error("give settings or seeds, not both")
    model = load("emoji")
    words = given.method + "".join(f" --setting {shlex.quote(one)}" for one in given.setting)
    words += f" --seeds {given.seeds}" if given.seeds else ""
    wanted = trials(given.method, given.setting, given.seeds)
    told = (
        {"seeds": SEEDS} if given.seeds else {} if given.setting else {"rule": RULE, "classes": DEVELOPMENT}
    )
    whole = Result(
        f"python -m erasekit.experiments.search {words} --out {given.out.as_posix()}",
        "search",
        **world.subject(model),
        erased=tuple(dict.fromkeys(name for trial in wanted for name in trial.erased)),
        machine=runs.machine(),
        details=plain(told | {"verdicts": {}}),
    )
    old = read(given.out) if given.out.exists() else whole
    asked = lambda one: one.command.partition(" --")[0]
    if asked(old) != asked(whole) or old.edits.keys() - {trial.label for trial in wanted}:
        parser.error(f"{given.out} answers another question ({old.command}): choose another name")
    done = {
        one.label: (
            old.edits[one.label],
            [m for m in old.measurements if m.edit == one.label],
            old.details["verdicts"][one.label],
        )
        for one in wanted
        if still_true(old, whole, one)
    }
    training = BUILD / "training" / given.out.stem  # of its own: an edit elsewhere may be training alike
    for trial in wanted:
        if trial.label not in done:
            done[trial.label] = measure(model, given.method, trial, training=training)
        labels = [one.label for one in wanted if one.label in done]
        whole = replace(
            whole,
            edits={label: done[label][0] for label in labels},
            measurements=tuple(m for label in labels for m in done[label][1]),
            details=whole.details | {"verdicts": {label: done[label][2] for label in labels}},
        )
        save(whole, given.out)
        print(trial.label, whole.value("H_o", trial.label), flush=True)


if __name__ == "__main__":
    main()
