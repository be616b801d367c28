"""One record for every measurement: what is written is what is read, and a variant is told by its settings."""

import dataclasses
import json

import numpy as np
import pytest

import erasekit as ek
from erasekit.evaluate import records
from erasekit.evaluate.metrics import mean, rate
from erasekit.evaluate.records import EditMade, Measurement, Result
from erasekit.methods import METHODS
from erasekit.paths import RESULTS


def made(**changes) -> EditMade:
    """An edit by RECE with these settings, as a file tells of it."""
    preset = METHODS["rece"].PRESETS["emoji"]
    config = records.plain(dataclasses.asdict(dataclasses.replace(preset, **changes)))
    return EditMade("rece", records.changes(config, preset), config, ("dog",), ("cat",), 12, "d")


@pytest.fixture
def result() -> Result:
    values = {
        "target": rate(3, 50),
        "score": mean([0.1, 0.4], np.random.default_rng(0)),
        "H": {"harmonic_mean": 0.5},
    }
    rows = [Measurement(name, one, "rece", "objects", "0123456789") for name, one in values.items()]
    rows.append(Measurement("target", rate(50, 50), protocol="objects", hash="0123456789"))
    rows.append(Measurement("attack", rate(9, 50), "rece", "attacked", "ab", "UnlearnDiffAtk", seconds=1.5))
    return Result(
        "python x --out y", "run", "f", "v", {"emoji-object": "j"}, ("dog",), {"cores": 2}, {"rece": made()},
        tuple(rows), {"course": [1.0]},
    )  # fmt: skip


def test_committed_verdicts_add_up_to_the_committed_counts():
    """Of every rate whose file keeps the verdict of each picture."""
    kinds = set()
    for path in sorted(RESULTS.glob("*.json")):
        whole = records.read(path.stem, RESULTS)
        for one in whole.measurements:
            own = records.about(whole, one.edit)
            there = one.measure in (own.details.get("verdicts") or {}) or isinstance(
                own.details.get("attempts"), list
            )
            if (
                "k" not in one.value
                or not there
                or sum(m.measure == one.measure for m in own.measurements) > 1
            ):
                continue
            seen = records.verdicts(own, one.measure)
            assert (sum(seen.values()), len(seen)) == (one.value["k"], one.value["n"]), (path.stem, one)
            kinds.add(whole.kind)
    assert kinds >= {"protocol", "attack", "regeneration", "search", "ablation", "run"}


def test_a_file_gives_back_what_was_written(result, tmp_path):
    records.save(result, tmp_path / "one.json")
    assert records.read(tmp_path / "one.json") == result == records.read("one", tmp_path)
    assert records.all_of("run", folder=tmp_path) == {"one": result} and not records.all_of(
        "attack", folder=tmp_path
    )
    whole = json.loads((tmp_path / "one.json").read_text())
    (tmp_path / "one.json").write_text(json.dumps({k: v for k, v in whole.items() if k != "edits"}))
    with pytest.raises(ValueError, match="make it anew with the command"):
        records.read(tmp_path / "one.json")


@pytest.mark.parametrize("content", [b"{", b"", b"null", b"3", b"[]", b"\xff"])
def test_a_damaged_file_is_named(content, tmp_path):
    (tmp_path / "one.json").write_bytes(content)
    with pytest.raises(ValueError, match="one.json is no (result file|whole JSON).*: make it anew"):
        records.read(tmp_path / "one.json")


def test_a_number_is_found_by_measure_and_edit_or_not_at_all(result):
    assert result.value("target", "rece") == rate(3, 50) and result.value("target") == rate(50, 50)
    assert result.values("rece").keys() == {"target", "score", "H", "attack"}
    assert result.values("rece", "attacked") == {"attack": rate(9, 50)}
    for measure, edit in (("target", "uce"), ("synonyms", "rece")):
        with pytest.raises(KeyError, match="target of rece"):
            result.value(measure, edit)


def test_the_table_has_a_row_for_each_number_with_its_edit(result):
    table = result.table().set_index(["edit", "measure"])
    row = table.loc[("rece", "target")]
    assert (row["k"], row["n"], row["kept"], row["bytes"], row["text"]) == (
        3,
        50,
        1,
        12,
        "3/50 = 6.0 % [2.1, 16.2]",
    )
    assert table.loc[("rece", "score"), "rate"] == 0.25 and table.loc[("rece", "H"), "rate"] == 0.5
    assert table.loc[("original", "target"), "method"] == "original"


def test_an_edit_is_told_by_the_settings_that_are_not_the_presets():
    start = dataclasses.replace(METHODS["rece"].PRESETS["emoji"].start, lam=0.5)
    assert (made().variant, made().label) == ("", "rece")
    assert (made(pairs="start").variant, made(pairs="start").label) == ("pairs=start", "rece-start")
    assert (made(epochs=7).variant, made(epochs=7).label) == ("epochs=7", "rece")
    assert made(start=start, epochs=7).variant == "start.lam=0.5, epochs=7"


def test_what_an_edit_says_of_itself(model):
    preset = ek.uce.Config(lam=0.2)
    edit = ek.uce.fit(model, "church", ["castle"], config=preset)
    own = EditMade.of(edit, preset)
    assert (own.method, own.variant, own.erased, own.preserved) == ("uce", "", ("church",), ("castle",))
    assert (own.bytes, own.digest) == (edit.nbytes, edit.digest)
    assert EditMade.of(edit, ek.uce.Config()).variant == "lam=0.2"
    assert (
        EditMade.of(ek.Edit(edit.kind, {k: v + 1 for k, v in edit.tensors.items()}, edit.metadata), preset)
        != own
    )


def test_every_committed_file_is_a_result_and_its_numbers_stand_in_one_place():
    """Outside `measurements` no rate is told; the control finds one that is."""
    found = records.all_of()
    assert len(found) == len(list(RESULTS.glob("*.json")))
    for name, one in found.items():
        assert not list(_rates(one.details)), name
        assert {m.edit for m in one.measurements} <= {*one.edits, records.ORIGINAL, records.NO_TEXT}, name
    assert list(_rates({"rounds": [{"target": rate(1, 2)}]}))


def _rates(value):
    if isinstance(value, dict):
        if {"k", "n", "rate"} <= value.keys():
            yield value
        for one in value.values():
            yield from _rates(one)
    elif isinstance(value, list):
        for one in value:
            yield from _rates(one)
