"""Settings searched on development classes: one budget, one rule, and no class of a table among them."""

from collections import Counter
from dataclasses import asdict, replace
from itertools import product

import pytest

from erasekit.emoji import data
from erasekit.evaluate import protocols, records
from erasekit.evaluate.metrics import rate
from erasekit.evaluate.protocols import CIFAR, DEVELOPMENT
from erasekit.experiments import search
from erasekit.methods import METHODS
from erasekit.models import load
from erasekit.paths import RESULTS

FILES = {path.stem: records.read(path) for path in sorted(RESULTS.glob("search_*.json"))}


def test_nothing_that_a_table_is_about_is_searched_on():
    harmful = {c.name for c in data.concepts() if c.weapon or c.group == "characters"}
    assert not {*DEVELOPMENT} & {*CIFAR, *protocols.TOOLS, *harmful} and {*search.ERASED} <= {*DEVELOPMENT}
    measured = {name for one in records.all_of("run", "protocol", "attack").values() for name in one.erased}
    assert not measured & {*DEVELOPMENT} and measured > {*CIFAR}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_same_budget_and_its_preset_first(method):
    base = METHODS[method].PRESETS["emoji"]
    configs = [replace(base, **changes) for changes in search.SEARCHED[method].values()]
    assert configs[0] == base and len(set(map(repr, configs))) == len(configs) == 6
    assert search.SEARCHED.keys() == METHODS.keys()
    labels = Counter(label for label, *_ in search.asked(method))
    assert len(labels) == 6 * len(search.ERASED) and {*labels.values()} == {1}


def test_what_the_paper_is_about_is_no_setting():
    """H_o sees no attack: a search over these by it would choose none."""
    assert not any("attack_steps" in changes for changes in search.SEARCHED["advunlearn"].values())
    assert all(changes.get("epochs", 3) > 0 for changes in search.SEARCHED["rece"].values())


def test_the_quick_protocol_asks_as_the_object_protocol_does():
    for erased, classes in (("dog", CIFAR), ("rocket", DEVELOPMENT)):
        quick = protocols.quick(erased)
        assert {p.concept for p in quick.prompts} == {*classes}
        assert Counter(p.role for p in quick.prompts) == {
            "target": 20,
            "other": 45,
            "synonym": 20 if erased == "rocket" else 25,
        }
    own, whole = protocols.quick("dog"), protocols.objects("dog")
    assert {(p.text, p.role) for p in own.prompts} < {(p.text, p.role) for p in whole.prompts}
    assert {m.name for m in own.measures} == {"Acc_e", "Acc_s", "Acc_g"} and own.summary == "H_o"
    with pytest.raises(ValueError, match="'church' is no class of this protocol"):
        protocols.quick("church")


def made_up(verdicts: dict[str, tuple[str, str, str]], h: dict[str, float]) -> records.Result:
    """A file whose settings have these verdicts of Acc_e, Acc_s and Acc_g on each of two classes."""
    edits, rows, seen = {}, [], {}
    for (setting, of), one in product(verdicts.items(), search.ERASED):
        label = f"{setting}, {one}"
        edits[label] = records.EditMade("uce", "", {}, (one,))
        told = dict(zip(search.RATES, of, strict=True))
        values = {name: rate(text.count("1"), len(text)) for name, text in told.items()}
        values["H_o"] = {"harmonic_mean": h[setting]}
        rows += records.measurements(values, protocols.quick(one), label, seconds=1.0)
        seen[label] = {
            name: {f"{one} {name} {i}": {"seeds": [0], "seen": bit} for i, bit in enumerate(text)}
            for name, text in told.items()
        }
    return records.Result("", "search", edits=edits, measurements=tuple(rows), details={"verdicts": seen})


def test_the_rule_chooses_and_pairs_say_whether_it_is_told():
    bad, good, alike = (
        ("1" * 20, "1" * 20, "1" * 20),
        ("0" * 20, "1" * 20, "0" * 20),
        ("1" * 20, "1" * 20, "1" * 19 + "0"),
    )
    found = search.table(
        made_up({"preset": bad, "better": good, "luck": alike}, {"preset": 0.0, "better": 1.0, "luck": 0.0})
    )
    assert found["setting"].tolist() == ["preset", "better", "luck"]
    assert found["chosen"].tolist() == [False, True, False]
    assert found["right"].tolist() == [40, 120, 42] and set(found["pictures"]) == {120}
    assert found["difference"].tolist() == pytest.approx([0, 80 / 120, 2 / 120], abs=1e-4)
    assert found["p"][1] < 0.01 < 0.05 < found["p"][2]
    assert found["Acc_e"][1] == rate(0, 40) and found["Acc_s"][0] == rate(40, 40)


def test_of_equals_the_first_is_chosen():
    same = ("0" * 5, "1" * 5, "0" * 5)
    found = search.table(made_up({"preset": same, "other": same}, {"preset": 0.9, "other": 0.9}))
    assert found["chosen"].tolist() == [True, False] and found["p"][1] == 1


def test_a_search_goes_on(tmp_path, monkeypatch):
    done = []

    def measured(model, method, label, config, seed, protocol):
        done.append(label)
        if len(done) == 3:
            raise KeyboardInterrupt
        told = records.plain(asdict(config))
        values = {name: rate(1, 2) for name in search.RATES} | {"H_o": {"harmonic_mean": 0.5}}
        rows = records.measurements(values, protocol, label, seconds=1.0)
        return records.EditMade(method, "", told, protocol.erased), rows, {}

    monkeypatch.setattr(search, "measure", measured)
    arguments = ["uce", "--setting", "preset", "--out", str(tmp_path / "a.json")]
    with pytest.raises(KeyboardInterrupt):
        search.main(arguments)
    assert list(records.read(tmp_path / "a.json").edits) == ["preset, airplane", "preset, automobile"]
    search.main(arguments)
    found = records.read(tmp_path / "a.json")
    assert list(found.edits) == [f"preset, {name}" for name in CIFAR] and len(done) == 11
    assert found.command.startswith("python -m erasekit.experiments.search uce --setting preset --out ")
    search.main([*arguments[:2], "lam 1", *arguments[3:]])  # another question: nothing of the old file counts
    assert list(records.read(tmp_path / "a.json").edits) == [f"lam 1, {name}" for name in CIFAR]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["uce", "--seeds", "dog"], "uce is not trained"),
        (["uce", "--setting", "lam 7"], "no setting lam 7: there are preset, "),
        (["esd", "--seeds", "dog", "--setting", "preset"], "settings or seeds"),
    ],
)
def test_what_cannot_be_searched_is_refused(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        search.main([*arguments, "--out", str(tmp_path / "a.json")])
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_committed_searches_follow_the_rule_and_today_s_protocol(name):
    found, method = FILES[name], name.rpartition("_")[2] if "surgery" not in name else "semantic_surgery"
    settings = search.table(found)["setting"].tolist()
    seeds = found.erased[0] if "seeds" in name else None
    on_ten = settings if "_ten_" in name else ()
    expected = {
        label: (records.plain(config), protocol.hash)
        for label, config, _, protocol in search.asked(method, on_ten, seeds)
    }
    assert {label: made.config for label, made in found.edits.items()} == {
        label: config for label, (config, _) in expected.items()
    }
    assert {(m.edit, m.hash) for m in found.measurements} == {
        (label, one) for label, (_, one) in expected.items()
    }
    if not on_ten and not seeds:
        assert found.details["rule"] == search.RULE and tuple(found.details["classes"]) == DEVELOPMENT


@pytest.mark.slow
def test_a_setting_is_measured_on_the_model(tmp_path):
    """Two settings of one class: the edit, its rates and every verdict; a weaker ridge is another edit."""
    (label, config, seed, asked) = next(one for one in search.asked("uce") if one[0] == "lam 1, rocket")
    few = replace(asked, prompts=tuple(p for i, p in enumerate(asked.prompts) if i % 5 == 0))
    made, rows, verdicts = search.measure(load("emoji"), "uce", label, config, seed, few, tmp_path)
    assert made.variant == "lam=1.0" and made.erased == ("rocket",) and len(made.preserved) == 9
    assert sum(len(of["seen"]) for name in search.RATES for of in verdicts[name].values()) == len(few.prompts)
    assert {m.measure for m in rows} == {*search.RATES, "H_o"} and all(m.edit == label for m in rows)
