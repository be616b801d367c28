"""What the papers claim and in what order they rank methods, beside the committed results."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from erasekit.evaluate import agreement, claims, metrics, published, records
from erasekit.evaluate.metrics import rate
from erasekit.experiments import comparison

FOUR = {"realera", "rece", "trce", "advunlearn"}


@pytest.fixture(scope="module")
def tested():
    return claims.tested()


@pytest.fixture(scope="module")
def taus():
    return agreement.tau()


def test_newcombes_interval_is_the_one_that_he_printed():
    """Newcombe 1998, table II, method 10: 56/70 - 48/80, and the extremes 10/10 - 0/20 and 10/10 - 0/10."""
    found = metrics.difference(rate(56, 70), rate(48, 80))
    assert found["difference"] == 0.2
    assert (round(found["low"], 4), round(found["high"], 4)) == (0.0524, 0.3339)
    for n, low in ((20, 0.6791), (10, 0.6075)):
        found = metrics.difference(rate(10, 10), rate(0, n))
        assert (round(found["low"], 4), found["high"]) == (low, 1.0)


def test_swapped_rates_change_the_sign():
    a, b = rate(3, 40), rate(22, 35)
    there, back = metrics.difference(a, b), metrics.difference(b, a)
    assert there["difference"] == -back["difference"] and there["p"] == back["p"]
    assert (there["low"], there["high"]) == (-back["high"], -back["low"])
    assert there["low"] < there["difference"] < there["high"] < 0


def test_equal_rates_are_no_difference():
    found = metrics.difference(rate(5, 50), rate(5, 50))
    assert found["difference"] == 0 and found["low"] < 0 < found["high"] and found["p"] == pytest.approx(1)


def made_up(seen):
    """Verdicts of ten prompts with ten seeds. seen: of a prompt those of its seeds, as "0110010000"."""
    return {str(prompt): {"seeds": [*range(10)], "seen": seen(prompt)} for prompt in range(10)}


@pytest.fixture
def folder(tmp_path):
    """One made-up file: 2/100 and 60/100 with their verdicts by edit, and counts of two steps."""
    made = records.EditMade("uce", "", {}, ("dog",))
    rows = [
        records.Measurement("target", rate(2, 100), "a", "p"),
        records.Measurement("target", rate(60, 100), "b", "p"),
        records.Measurement("others", rate(10, 10), "a", "p", step="as it is"),
        records.Measurement("others", rate(4, 10), "a", "p", step="rounded"),
        records.Measurement("score", {"n": 9, "mean": 0.5, "low": 0.4, "high": 0.6}, "a", "p"),
    ]
    verdicts = {
        "a": {"target": made_up(lambda prompt: f"{int(prompt == 0)}00000000{int(prompt == 1)}")},
        "b": {"target": made_up(lambda prompt: "1" * 6 + "0" * 4)},
    }
    about = {"edits": {"a": made, "b": made}, "measurements": tuple(rows), "details": {"verdicts": verdicts}}
    one = records.Result("", "protocol", **about)
    records.save(one, tmp_path / "one.json")
    records.save(one, tmp_path / "two.json")
    return tmp_path


def rows(*cells):
    frame = pd.DataFrame(cells, columns=["a", "b", "expected"])
    return frame.assign(paper="p", claim="c", a_is="A", b_is="B", source="s", trust="t", note="")


def test_verdicts_of_made_up_records_and_the_control_that_flips_them(folder):
    low, high = "one | a | target", "one | b | target"
    found = claims.tested(
        rows(
            (low, high, "lower"),
            (low, high, "higher"),
            (high, low, "higher"),
            (low, low, "lower"),
            ("", "", "lower"),
        ),
        folder,
    )
    assert list(found["verdict"]) == [
        claims.AGREES,
        claims.DIFFERS,
        claims.AGREES,
        claims.UNSEEN,
        claims.OPEN,
    ]
    assert found.loc[0, ["k_a", "n_a", "k_b", "n_b"]].tolist() == [2, 100, 60, 100]
    assert found.loc[4, ["k_a", "p", "holm"]].isna().all()


def test_claims_are_tested_in_pairs(folder):
    """Two lists that fail on mostly the same pictures. Controls: by the counts alone no difference is seen; a file
    without verdicts is no evidence.
    """
    for name, k in (("less", 110), ("more", 120)):
        # no prompt and no seed has all that differ
        seen = {(i % 20, (i + i // 20) % 10): int(i < k) for i in range(200)}
        pictures = sorted(seen)
        of = records.kept([(str(prompt), seed) for prompt, seed in pictures], [seen[one] for one in pictures])
        row = records.Measurement("target", rate(k, 200), "original", "p", "hash")
        one = records.Result("", "protocol", measurements=(row,), details={"verdicts": {"target": of}})
        records.save(one, folder / f"{name}.json")
        records.save(replace(one, command="make less", details={}), folder / f"{name}-counted.json")
    cells = ("less | original | target", "more | original | target", "lower")
    found = claims.tested(rows(cells), folder).iloc[0]
    assert (found["difference"], found["verdict"]) == (-0.05, claims.AGREES)
    assert metrics.difference(rate(110, 200), rate(120, 200))["p"] > 0.05
    for cell in ("less-counted", "more-counted"):
        with pytest.raises(ValueError, match="no verdicts of target were kept: run it again, make less"):
            claims.tested(rows((cells[0], f"{cell} | original | target", "lower")), folder)


def test_verdicts_of_a_file_with_two_edits_are_not_paired_with_themselves(folder):
    of = {"prompt": {"seeds": [*range(100)], "seen": "01" * 50}}
    one = replace(records.read("one", folder), details={"verdicts": {"target": of}})
    records.save(one, folder / "both.json")
    with pytest.raises(
        ValueError, match="2 measurements of target in one file: its verdicts cannot be told apart"
    ):
        claims.tested(rows(("both | a | target", "both | b | target", "lower")), folder)


def test_a_file_that_keeps_its_verdicts_by_edit_is_paired_with_itself(folder):
    one = records.read("one", folder)
    assert {m.edit for m in records.about(one, "b").measurements} == {"b"}
    for edit, k in (("a", 2), ("b", 60)):
        assert sum(records.verdicts(records.about(one, edit), "target").values()) == k
    with pytest.raises(ValueError, match="cannot be told apart"):
        records.verdicts(one, "target")


def test_an_edit_whose_verdicts_were_not_kept_is_named_as_such(folder):
    """Beside another whose were."""
    one = records.read("one", folder)
    half = replace(one, command="make it", details={"verdicts": {"a": one.details["verdicts"]["a"]}})
    assert records.verdicts(records.about(half, "a"), "target")
    for old in (half, replace(half, details={})):
        with pytest.raises(ValueError, match="no verdicts of target were kept: run it again, make it"):
            records.verdicts(records.about(old, "b"), "target")


def test_two_measures_of_the_same_pictures_are_paired(folder):
    """Control: the other way round the sign is the other; of several measures on one side there are no pairs."""
    one = records.read("one", folder)
    more = replace(one.measurements[1], measure="target after", value=rate(30, 100))
    details = one.details["verdicts"]["b"] | {"target after": made_up(lambda prompt: "1" * 3 + "0" * 7)}
    verdicts = one.details["verdicts"] | {"b": details}
    two = replace(one, measurements=(*one.measurements, more), details={"verdicts": verdicts})
    records.save(two, folder / "after.json")
    cells = ["after | b | target after", "after | b | target"]
    found = claims.tested(rows((*cells, "lower"), (*cells[::-1], "lower")), folder)
    assert list(found["difference"]) == [-0.3, 0.3]
    assert found.loc[0, ["k_a", "k_b"]].tolist() == [30, 60]
    assert (found.loc[0, "low"], found.loc[0, "high"]) == (-found.loc[1, "high"], -found.loc[1, "low"])
    with pytest.raises(ValueError, match="one measure, .* has target, target after"):
        claims.tested(rows(("; ".join(cells), "after | b | target; after | b | target", "lower")), folder)


def test_a_difference_that_is_seen_alone_is_adjusted_for_the_others(folder):
    """Eight of a hundred pictures, no two of a prompt or a seed; then beside nineteen comparisons that show nothing."""
    none, eight = made_up(lambda i: "0" * 10), made_up(lambda i: f"{10**i * (i < 8):010d}")
    kept = {"a": {"target": none}, "b": {"target": eight}}
    one = replace(records.read("one", folder), details={"verdicts": kept})
    a, b = (records.about(one, edit) for edit in "ab")
    alone = records.paired(a, b, "target", resamples=metrics.MANY)["p"]
    assert 0.0025 < alone <= 0.05 and records.differ({}) == {}
    assert records.differ({"of": (a, b, "target")}) == {"of": True}
    many = records.differ({"of": (a, b, "target")} | {str(i): (a, a, "target") for i in range(19)})
    assert not any(many.values()) and len(many) == 20


def test_files_of_other_pictures_are_no_pairs(folder):
    kept = lambda seen: {"verdicts": {"target": {"prompt": {"seeds": [*range(len(seen))], "seen": seen}}}}
    row = records.Measurement("target", rate(1, 2), "original", "p", "hash")
    long, short = (
        records.Result("", "protocol", measurements=(row,), details=kept(s)) for s in ("0101", "01")
    )
    for a, b in ((long, short), (short, long)):
        with pytest.raises(ValueError, match="2 pictures are in one file alone"):
            records.paired(a, b, "target")


def test_p_is_adjusted_over_the_claims_that_are_tested(tested):
    measured = tested[tested["verdict"] != claims.OPEN]
    assert list(measured["holm"]) == metrics.holm(measured["p"])
    assert claims.verdict(-0.1, 0.04, "lower") == claims.AGREES
    assert claims.verdict(-0.1, 0.06, "lower") == claims.UNSEEN
    with pytest.raises(ValueError, match="'lower' or 'higher'"):
        claims.verdict(0.1, 0.01, "equal")


def test_counts_of_several_files_are_added_and_a_step_is_chosen(folder):
    assert claims.counted("one two | a | target", folder) == rate(4, 200)
    assert claims.counted("one | a | target; two | b | target", folder) == rate(62, 200)
    assert claims.counted("one | a | others | rounded", folder) == rate(4, 10)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("three | a | target", "there is no"),
        ("one | c | target", "0 measurements of 'target' of 'c' in one; edits there: a, b"),
        ("one | a | others", "2 measurements"),
        ("one | a", "a cell is"),
        ("one | a | score", "counts are needed"),
    ],
)
def test_a_cell_that_is_not_there_is_named(folder, cell, words):
    with pytest.raises(ValueError, match=words):
        claims.counted(cell, folder)


def test_each_paper_has_three_to_seven_claims_with_source_and_trust():
    found = claims.listed()
    assert set(found["paper"]) == FOUR and found.groupby("paper").size().between(3, 7).all()
    assert (found[["claim", "source", "trust", "note"]].map(len) > 0).all(axis=None)
    assert found["a_is"].map(bool).eq(found["a"].map(bool)).all()
    assert found["claim"].is_unique and set(found["expected"]) == {"lower", "higher"}


def test_every_cell_of_the_claims_exists(tested):
    found = claims.listed()
    for one in found.itertuples():
        assert bool(one.a) == bool(one.b), one.claim
        assert one.a or one.note.startswith("Not measured"), one.claim
    assert (tested["verdict"] == claims.OPEN).eq(found["a"] == "").all()
    assert set(tested["verdict"]) <= set(claims.VERDICTS)


def test_both_cells_of_a_claim_are_of_the_same_prompts(tested):
    """Of one protocol and one list of prompts, except where two searches or two lists are what is compared."""
    different = {"Textual inversion breaks it more often than the search of prompts"}
    for one in tested[tested["verdict"] != claims.OPEN].itertuples():
        sides = []
        for cells in (one.a, one.b):
            parts = claims.parts(cells)
            of = {(f, e, m): records.read(f) for f, e, m, _ in parts}
            sides.append(
                {(m.protocol, m.hash[:8]) for (f, e, name), result in of.items()  # old rows have eight digits
                 for m in result.measurements if (m.edit, m.measure) == (e, name)}
            )  # fmt: skip
        assert sides[0] == sides[1] or one.claim in different, one.claim


def test_ten_objects_are_those_of_the_comparison(tested):
    added = comparison.pooled(comparison.ten_objects(comparison.gathered())).set_index(["method", "measure"])
    one = tested[tested["claim"].str.contains("other words for the concept")].iloc[0]
    for side, method in (("a", "realera"), ("b", "mace")):
        assert one[[f"k_{side}", f"n_{side}"]].tolist() == added.loc[(method, "Acc_g"), ["k", "n"]].tolist()
    for row in agreement.listed().query("about == 'the same, ten objects' and metric != 'H_o'").itertuples():
        found = claims.counted(row.cells)
        assert [found["k"], found["n"]] == added.loc[(row.ours, row.metric), ["k", "n"]].tolist()


def here(*rates, generator):
    return {name: (*agreement.drawn([one], generator), "") for name, one in zip("abcd", rates, strict=False)}


def test_tau_is_one_for_equal_orders_and_minus_one_for_reversed():
    generator = np.random.default_rng(0)
    theirs = {name: (value, "") for name, value in zip("abcd", (0.1, 0.2, 0.5, 0.9), strict=True)}
    ours = here(rate(1, 100), rate(20, 100), rate(50, 100), rate(90, 100), generator=generator)
    for goals, tau in ((("low", "low"), 1), (("high", "high"), 1), (("low", "high"), -1)):
        for n in (None, 100):
            found = agreement.compare(theirs, ours, goals, n, generator)
            assert found["tau"] == tau and found["low"] <= tau <= found["high"]
            assert len(found["turned"]) == (0 if tau == 1 else found["pairs"])
    assert found["sure"] == found["pairs"] == 6
    assert found["chance"] == 1


def test_tau_of_rates_that_cannot_be_told_apart_is_wide():
    generator = np.random.default_rng(0)
    theirs = {name: (value, "") for name, value in zip("abcd", (1, 2, 3, 4), strict=True)}
    found = agreement.compare(
        theirs, here(*[rate(5, 50)] * 4, generator=generator), ("low", "low"), None, generator
    )
    assert np.isnan(found["tau"]) and found["low"] < -0.5 and found["high"] > 0.5 and not found["sure"]


def test_kendall_is_scipys_with_ties_and_in_rows():
    generator = np.random.default_rng(1)
    x, y = generator.integers(0, 4, (2, 30, 6))
    found = agreement.kendall(x, y)
    for one, a, b in zip(found, x, y, strict=True):
        expected = kendalltau(a, b, variant="b").statistic
        assert (np.isnan(one) and np.isnan(expected)) or one == pytest.approx(expected)


def test_chance_counts_the_orders():
    assert agreement.chance(np.arange(3), np.arange(3)) == pytest.approx(1 / 6)
    x, y = np.arange(4), np.array([1, 0, 2, 3])
    taus = [kendalltau(x, order).statistic for order in itertools.permutations(y)]
    assert agreement.chance(x, y) == pytest.approx(
        np.mean(np.array(taus) >= kendalltau(x, y).statistic - 1e-9)
    )


def test_every_published_method_and_every_cell_of_the_agreement_exists(taus):
    found = agreement.listed()
    for row in found.itertuples():
        assert published.rates(row.paper)["method"].eq(row.method).any()
        assert np.isfinite(agreement.published(row)["value"]), row
        for file, edit, _, _ in claims.parts(row.cells):
            result = records.read(file)
            assert edit == row.ours or result.erased == () or result.kind == "benchmark", row
    assert len(taus) == found["protocol"].nunique() and (taus["methods"] >= 3).all()
    assert (found[["group", "protocol", "about", "source"]].map(len) > 0).all(axis=None)
    inside = taus["tau"].isna() | taus["tau"].between(taus["low"] - 1e-9, taus["high"] + 1e-9)
    assert inside.all(), taus[~inside]


def test_one_protocol_has_one_reading():
    same = ["group", "metric", "source", "goal", "n", "our_goal", "about", "note"]
    assert agreement.listed().groupby("protocol")[same].nunique().eq(1).all(axis=None)


def test_a_number_that_is_not_published_is_an_error():
    row = agreement.listed().query("paper == 'trce'").iloc[0].replace({"UCE": "FMN"})
    with pytest.raises(ValueError, match="0 numbers of FMN"):
        agreement.published(row)


def test_the_lists_are_no_numbers_of_papers():
    assert not {"claims", "agreement", "dossiers"} & set(published.rates()["paper"])
