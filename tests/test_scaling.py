"""The benchmark of many concepts: nested sets, one kept set for all, rates and their harmonic mean."""

import pytest
from conftest import benchmark_script

from erasekit.evaluate.metrics import harmonic_mean, rate
from erasekit.evaluate.records import read
from erasekit.paths import RESULTS


@pytest.fixture(scope="module")
def scaling():
    with benchmark_script("scaling") as module:
        yield module


def test_no_kept_concept_is_ever_erased_and_none_is_forgotten(scaling):
    from erasekit.emoji import data

    everything = {c.name for c in data.concepts()}
    for erased, kept in ((scaling.HALF, scaling.REST), (scaling.ERASED, scaling.FOUR)):
        assert not set(erased) & set(kept) and everything == {*erased, *kept}
        assert kept == scaling.kept(len(erased))
    assert len(scaling.HALF) == max(scaling.SIZES) and len(scaling.ERASED) == 100
    assert scaling.ERASED[: len(scaling.HALF)] == scaling.HALF


@pytest.mark.parametrize("count", (1, 5, 50, 100))
def test_a_hundred_pictures_of_the_erased_and_the_same_of_the_kept_for_every_size(scaling, count):
    kept = scaling.kept(count)
    protocol = scaling.protocol(scaling.ERASED[:count], kept)
    asked = {role: [p for p in protocol.prompts if p.role == role] for role in ("target", "other")}
    assert {p.concept for p in asked["target"]} == set(scaling.ERASED[:count])
    assert 100 <= len(asked["target"]) < 100 + count
    one = scaling.protocol(scaling.ERASED[:1], kept)
    assert asked["other"] == [p for p in one.prompts if p.role == "other"] and len(asked["other"]) >= 100
    shots = {(p.text, p.seed) for p in protocol.prompts}
    assert len(shots) == len(protocol.prompts), "no picture counts twice"


MADE = [path for stem in ("scaling", "hundred") for path in sorted(RESULTS.glob(f"benchmark_{stem}_*.json"))]


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
def test_rows_are_rates_of_nested_sets(scaling, path):
    found = read(path)
    hundred = path.stem.startswith("benchmark_hundred")
    sets = (scaling.ERASED, scaling.FOUR) if hundred else (scaling.HALF, scaling.REST)
    assert (list(found.erased), found.details["kept"]) == sets
    sizes = [int(label) for label in found.edits]
    assert sizes == ([100] if hundred else list(scaling.SIZES[: len(sizes)]))
    for label, made in found.edits.items():
        assert list(made.erased) == scaling.ERASED[: int(label)]
        row = found.values(label)
        for name in ("Acc_e", "Acc_s"):
            assert row[name] == rate(row[name]["k"], row[name]["n"])
        expected = harmonic_mean([1 - row["Acc_e"]["rate"], row["Acc_s"]["rate"]])
        assert row["H"]["harmonic_mean"] == pytest.approx(expected, abs=1e-4)
