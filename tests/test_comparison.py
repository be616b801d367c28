"""The table of all results, dominance and ranks."""

import json

import numpy as np
import pandas.testing
import pytest

from erasekit import exercises
from erasekit.evaluate import records
from erasekit.evaluate.metrics import rate
from erasekit.evaluate.protocols import CIFAR
from erasekit.experiments import comparison
from erasekit.figures import METHOD_NAMES
from erasekit.methods import METHODS
from erasekit.paths import RESULTS, ROOT


@pytest.fixture(scope="module")
def table():
    return comparison.gathered()


def test_every_result_of_an_edit_is_in_the_table_but_courses_and_searches(table):
    left = {path.stem for path in RESULTS.glob("*.json")} - {
        name.removesuffix(".json") for name in table["file"]
    }
    kinds = {stem: records.read(stem).kind for stem in left if not stem.startswith("base_")}
    assert set(kinds.values()) == {"ablation", "benchmark", "deployment", "regeneration", "search"}


def test_one_method_one_protocol_one_measure_one_row(table):
    key = ["method", "concept", "protocol", "hash", "measure", "kept"]
    edited = table[table["method"] != records.ORIGINAL]
    assert not edited.duplicated(key).any()


def test_rows_agree_with_their_files(table):
    row = table[(table["file"] == "attack_unlearndiff_uce_dog.json") & (table["measure"] == "attack")].iloc[0]
    found = json.loads((RESULTS / row["file"]).read_text())
    (attack,) = (m for m in found["measurements"] if m["measure"] == "attack")
    assert (row["k"], row["n"]) == (attack["value"]["k"], attack["value"]["n"])
    assert row["kept"] == len(found["edits"]["uce"]["preserved"])


def test_a_files_name_says_nothing(table, tmp_path):
    """What a row is about stands in the file: under other names the same table comes out."""
    for i, path in enumerate(sorted(RESULTS.glob("*.json"))):
        (tmp_path / f"{i:04}.json").write_bytes(path.read_bytes())
    pandas.testing.assert_frame_equal(
        comparison.gathered(tmp_path).drop(columns="file"), table.drop(columns="file")
    )


def test_methods_are_known_or_no_edit(table):
    names = {name.partition("-")[0] for name in table["method"]}
    assert names <= {*METHODS, records.ORIGINAL, "no text"}


def test_a_protocol_has_one_hash_for_a_concept_unless_its_prompts_differ(table):
    objects = table[table["protocol"] == "emoji-objects"]
    assert objects.groupby("concept")["hash"].nunique().eq(1).all()


def test_ten_objects_are_ten_cells_of_one_method_and_keep_the_counts(table):
    rows = comparison.ten_objects(table)
    assert not rows.duplicated(["method", "concept", "measure"]).any()
    newer = ("dp", "speed", "oce", "adavd", "semantic_surgery", "sld")
    for method in ("original", "uce", "rece", "rece-start", "mace", "realera", *newer):
        assert set(rows[rows["method"] == method]["concept"]) == set(CIFAR)
    added = comparison.pooled(rows).set_index(["method", "measure"])
    own = rows[(rows["method"] == "rece-start") & (rows["measure"] == "Acc_g")]
    counts = added.loc[("rece-start", "Acc_g"), ["k", "n", "cells"]].tolist()
    assert counts == [own["k"].sum(), own["n"].sum(), 10]
    assert "H_o" in set(rows["measure"]) and "H_o" not in {measure for _, measure in added.index}


def test_nobody_dominates_a_point_of_the_front_and_somebody_every_other():
    x, y = np.random.default_rng(0).random((2, 60))
    front = comparison.pareto(x, y)
    for i in range(60):
        dominated = any(x[j] >= x[i] and y[j] >= y[i] and (x[j], y[j]) != (x[i], y[i]) for j in range(60))
        assert front[i] == (not dominated)
    assert 0 < front.sum() < 60


def test_the_exercise_accepts_pareto_and_refuses_the_best_sum():
    exercises.check_pareto(comparison.pareto)
    with pytest.raises(AssertionError):
        exercises.check_pareto(lambda x, y: np.add(x, y) == np.add(x, y).max())


def test_ranks_are_sure_when_the_rates_are_far_apart_and_not_when_they_are_equal():
    generator = np.random.default_rng(0)
    sure = comparison.ranks({"a": rate(0, 200), "b": rate(100, 200), "c": rate(200, 200)}, "low", generator)
    assert list(sure.index) == ["a", "b", "c"]
    assert (sure["low"] == sure["high"]).all() and sure.loc["a", "best"] == 1
    even = comparison.ranks({"a": rate(5, 50), "b": rate(5, 50)}, "low", generator)
    assert (even["low"] == 1).all() and (even["high"] == 2).all()
    assert abs(even.loc["a", "best"] - 0.5) < 0.03


def test_ranks_turn_round_with_the_goal():
    rates = {"a": rate(3, 50), "b": rate(40, 50)}
    low, high = (comparison.ranks(rates, goal, np.random.default_rng(0)) for goal in ("low", "high"))
    assert list(low.index) == ["a", "b"] and list(high.index) == ["b", "a"]


def test_readme_has_the_numbers_of_the_comparison(table):
    """Of every method: by name, by synonym, searched, others right; over ten objects by name and synonym."""
    ten = comparison.pooled(comparison.ten_objects(table))
    ten = ten[ten["cells"].eq(10)].set_index(["method", "measure"])[["k", "n"]]
    hundred = table["hash"].eq(
        records.read("unlearndiff_uce_dog_100").protocol("attack", "uce").partition("-")[2]
    )
    dog = table[table["concept"].eq("dog") & (table["protocol"].eq("emoji-objects") | hundred)]
    dog = dog[
        ~dog["kept"].eq(9).fillna(False)
    ]  # the edits that were attacked; nine are kept for the ten objects
    lines = (ROOT / "README.md").read_text().splitlines()
    for key in METHODS:
        own = dog[dog["method"] == key]
        searched = own[own["protocol"].eq("UnlearnDiffAtk")]
        own = own[own["protocol"].eq("emoji-objects")].set_index("measure")[["k", "n"]]
        said = [
            f"{one['k']}/{one['n']}" for one in searched[searched["measure"].eq("attack")].to_dict("records")
        ]
        counts = own.loc["Acc_e"], own.loc["Acc_g"], own.loc["Acc_s"] + own.loc["elsewhere"]
        by_name, by_synonym, right = (f"{one['k']}/{one['n']}" for one in counts)
        of_ten = "{k:,}/{n:,}".format(**(ten.loc[(key, "Acc_e")] + ten.loc[(key, "Acc_g")]))
        told = " | ".join([by_name, by_synonym, *said, right, of_ten])
        assert any(line.startswith(f"| {METHOD_NAMES[key]} | {told} |") for line in lines), (key, told)


def test_every_measure_has_a_goal(table):
    assert table["goal"].isin(["low", "high"]).all()
