"""Settings searched on development classes: one budget, one rule, and no class of a table among them."""

from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest

from erasekit.emoji import data
from erasekit.evaluate import protocols, records, runs
from erasekit.evaluate.metrics import rate
from erasekit.evaluate.protocols import CIFAR, DEVELOPMENT, FOODS, MEALS
from erasekit.experiments import search
from erasekit.methods import METHODS
from erasekit.models import load
from erasekit.paths import RESULTS

FILES = {path.stem: records.read(path) for path in sorted(RESULTS.glob("search_*.json"))}


def test_nothing_that_a_table_is_about_is_searched_on():
    """Erased alone in no file of another kind; benchmarks erase up to a hundred concepts at once."""
    harmful = {c.name for c in data.concepts() if c.weapon or c.group == "characters"}
    chosen_on = {*DEVELOPMENT, *MEALS, *FOODS}
    assert not chosen_on & {*CIFAR, *protocols.TOOLS, *harmful}
    assert {*search.ERASED} <= {*DEVELOPMENT, "meals"} and not {*MEALS} & {*FOODS}
    assert {*MEALS, *FOODS} < {c.name for c in data.concepts() if c.group == "food"}
    kinds = ("run", "protocol", "attack", "regeneration", "ablation", "deployment")
    measured = {name for one in records.all_of(*kinds).values() for name in one.erased}
    assert not measured & chosen_on and measured > {*CIFAR, "rocket", "pizza"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_budget_and_what_stood_before_first(method):
    base, settings = search.before(method), search.SEARCHED[method]
    configs = [replace(base, **changes) for changes in settings.values()]
    assert list(settings)[0] == "before" and configs[0] == base
    budget = {"rece": 8, "uce": 7}.get(method, 6)  # more of their authors'
    assert len(set(map(repr, configs))) == len(configs) == budget and search.SEARCHED.keys() == METHODS.keys()
    labels = Counter(trial.label for trial in search.trials(method))
    assert len(labels) == budget * len(search.ERASED) and {*labels.values()} == {1}


@pytest.mark.parametrize(
    "method, setting, preset, but",
    [
        ("speed", "of the authors", "sd14-object", ()),
        ("oce", "of the authors", "sd14-object", ()),
        ("adavd", "of the authors", "sd14-object", ()),
        ("semantic_surgery", "of the authors", "sd14-object", ()),
        ("safree", "of the authors", "sd14-object", ()),
        ("sld", "medium of the authors", "sd14-medium", ("delta",)),
        ("sld", "strong of the authors", "sd14-strong", ("delta",)),
        ("sld", "max of the authors", "sd14-max", ()),
        ("uce", "of the authors", "sd14-object", ()),
        ("rece", "of the authors", "sd14-object", ()),
        ("rece", "of the authors, unsafe", "sd14-unsafe", ()),
        ("rece", "of the authors, nudity", "sd14-nudity", ()),
        ("esd", "of the authors, 2025", "sd14-2025", ()),
        ("mace", "of the authors, captions ours", "sd14-object", ("squared", *search.OWN_CAPTIONS)),
        ("trce", "of the authors, captions ours, fewer ways", "sd14-object",
         ("noises", "calm", *search.OWN_CAPTIONS)),
    ],
)  # fmt: skip
def test_a_setting_of_the_authors_is_theirs(method, setting, preset, but):
    module = METHODS[method]
    tried = asdict(replace(search.before(method), **search.SEARCHED[method][setting]))
    theirs = asdict(module.PRESETS[preset])
    assert {name for name in theirs if tried[name] != theirs[name]} <= {*but}
    assert tried != asdict(search.before(method))  # the control


def test_what_the_paper_is_about_is_no_setting():
    """H_o sees no attack: a search over these by it would choose none. RECE's rounds are those of its authors."""
    attacker = {"attack_steps", "k", "alpha", "rule", "placement", "start"}
    assert not any(attacker & changes.keys() for changes in search.SEARCHED["advunlearn"].values())
    rounds = {
        name: changes["epochs"] for name, changes in search.SEARCHED["rece"].items() if "epochs" in changes
    }
    assert rounds == {"of the authors": 1, "of the authors, unsafe": 2}  # three as in ours for nudity
    steps = protocols.quick("lion").steps
    assert all(changes.get("delta", 0) < steps / 4 for changes in search.SEARCHED["sld"].values())


def test_the_quick_protocol_asks_as_the_object_protocol_does():
    for erased, classes, synonyms in (("dog", CIFAR, 25), ("bus", DEVELOPMENT, 20)):
        quick = protocols.quick(erased)
        assert {p.concept for p in quick.prompts} == {*classes}
        assert Counter(p.role for p in quick.prompts) == {"target": 20, "other": 45, "synonym": synonyms}
        assert sorted(p.seed for p in quick.prompts) == list(range(len(quick.prompts)))
    meals = protocols.quick("meals")
    assert Counter(p.role for p in meals.prompts) == {"target": 25, "other": 60, "synonym": 50}
    assert {p.concept: p.role for p in meals.prompts if p.role != "synonym"} == (
        dict.fromkeys(MEALS, "target") | dict.fromkeys(FOODS, "other")
    )
    sentences = [p for p in meals.prompts if p.role == "synonym"]
    assert not any(name in p.text for p in sentences for c in data.concepts() if c.name in MEALS
                   for name in (c.name, *c.synonyms))  # fmt: skip
    assert {m.labels for m in meals.measures if m.goal == "low"} == {MEALS} == {meals.erased}
    assert {m.labels for m in protocols.quick("bus").measures} == {None}
    own, whole = protocols.quick("dog"), protocols.objects("dog")
    assert {(p.text, p.role) for p in own.prompts} < {(p.text, p.role) for p in whole.prompts}
    assert {m.name for m in own.measures} == {"Acc_e", "Acc_s", "Acc_g"} and own.summary == "H_o"
    with pytest.raises(ValueError, match="'church' is no class of this protocol"):
        protocols.quick("church")


ROLES = {"target": "Acc_e", "other": "Acc_s", "synonym": "Acc_g"}


def made_up(seen, settings=("before", "another"), rule=True) -> records.Result:
    """A file of all concepts with the real prompts. seen(setting, class, role, i): whether the judge sees what picture
    i of the role asks for.
    """
    edits, rows, kept = {}, [], {}
    for setting in settings:
        for one in search.ERASED:
            asked, label = protocols.quick(one), f"{setting}, {one}"
            edits[label] = records.EditMade("uce", "", {}, (one,))
            verdicts = {name: {} for name in ROLES.values()}
            count = Counter()
            for shot in runs.shots(asked):
                role = shot.prompt.role
                of = verdicts[ROLES[role]].setdefault(shot.prompt.text, {"seeds": [], "seen": ""})
                of["seeds"].append(shot.seed)
                of["seen"] += str(int(seen(setting, one, role, count[role])))
                count[role] += 1
            bits = {name: "".join(one["seen"] for one in of.values()) for name, of in verdicts.items()}
            values = {name: rate(text.count("1"), len(text)) for name, text in bits.items()}
            good = [values["Acc_s"]["rate"], 1 - values["Acc_e"]["rate"], 1 - values["Acc_g"]["rate"]]
            rows += records.measurements(
                values | {"H_o": {"harmonic_mean": float(np.prod(good))}}, asked, label
            )
            kept[label] = verdicts
    details = {"verdicts": kept} | ({"rule": search.RULE} if rule else {})
    return records.Result("COMMAND", "search", edits=edits, measurements=tuple(rows), details=details)


def test_the_rule_chooses_and_pairs_say_whether_it_is_told():
    """By name nothing is left after both; by synonym what stood before leaves all, and a third setting one less."""
    seen = lambda setting, one, role, i: (
        role == "other" or role == "synonym" and (setting == "before" or setting == "luck" and i > 0)
    )
    found = search.table(made_up(seen, ("before", "better", "luck")))
    assert found["setting"].tolist() == ["before", "better", "luck"]
    assert found["chosen"].tolist() == [False, True, False]
    assert (
        found["Acc_s"][0] == rate(150, 150)
        and found["Acc_e"][0] == rate(0, 65)
        and found["Acc_g"][0] == rate(90, 90)
    )
    one_less = (1 / 20 + 1 / 20 + 1 / 50) / 9
    assert found["right"].tolist() == pytest.approx([2 / 3, 1, 2 / 3 + one_less])
    assert found["difference"][1:].tolist() == pytest.approx([1 / 3, one_less], abs=1e-4)
    assert np.isnan(found["p"][0]) and found["p"][1] < 0.01 < 0.05 < found["p"][2]


@pytest.mark.parametrize("lost", search.ERASED)
def test_what_is_lost_of_one_class_is_seen(lost):
    """Lion and bus share the prompts of other classes, which are counted for each."""
    seen = lambda setting, one, role, i: role == "other" and not (setting == "another" and one == lost)
    found = search.table(made_up(seen))
    assert found["difference"][1] == pytest.approx(-1 / 9, abs=1e-4) and found["p"][1] < 0.01
    assert found["Acc_s"][1] == rate(150 - (60 if lost == "meals" else 45), 150)
    assert found["chosen"].tolist() == [True, False]


@pytest.mark.parametrize(
    "left, chosen",
    [(1, "of the authors"), (10, "all"), (50, "all")],
    ids=["not told from the highest", "the highest is told better", "no better than before"],
)
def test_the_authors_go_before_what_is_not_told_better(left, chosen):
    """By synonym all is left of what stood before, `left` pictures of each class of the authors', none of "all"."""
    kept = {"before": 50, "of the authors": left, "all": 0}
    found = search.table(
        made_up(
            lambda setting, one, role, i: role == "other" or role == "synonym" and i < kept[setting], kept
        )
    )
    assert found["setting"][found["H_o"].idxmax()] == "all"
    assert found["setting"][found["chosen"]].tolist() == [chosen]


def test_of_equals_the_first_is_chosen():
    found = search.table(made_up(lambda setting, one, role, i: role == "other"))
    assert found["chosen"].tolist() == [True, False] and found["p"][1] == 1


def test_where_nothing_is_searched_nothing_is_chosen():
    good = lambda setting, one, role, i: role == "other"
    alone = search.table(made_up(good, ("before",), rule=False))
    assert "chosen" not in alone and alone["H_o"].tolist() == [1]
    whole = made_up(good)
    part = replace(whole, edits={k: v for k, v in whole.edits.items() if k != "another, bus"})
    with pytest.raises(ValueError, match="not measured: another, bus. Run it again, it goes on: COMMAND"):
        search.table(part)


def test_a_search_goes_on(tmp_path, monkeypatch, capsys):
    done, limit = [], 3

    def measured(model, method, trial, training):
        if len(done) == limit:
            raise KeyboardInterrupt
        done.append(trial.label)
        told = records.plain(asdict(trial.config))
        values = {name: rate(1, 2) for name in search.RATES} | {"H_o": {"harmonic_mean": 0.5}}
        made = records.EditMade(method, "", told, trial.erased, trial.kept)
        return made, records.measurements(values, trial.protocol, trial.label), {}

    monkeypatch.setattr(search, "measure", measured)
    arguments = ["uce", "--out", str(tmp_path / "a.json")]
    labels = [trial.label for trial in search.trials("uce")]
    with pytest.raises(KeyboardInterrupt):
        search.main(arguments)
    assert list(records.read(tmp_path / "a.json").edits) == labels[:3]
    limit = 100
    search.main(arguments)
    assert list(records.read(tmp_path / "a.json").edits) == labels == done  # none was measured twice

    changed = search.SEARCHED["uce"] | {"lam 0.01": {"lam": 0.02}}
    monkeypatch.setitem(search.SEARCHED, "uce", changed)
    limit = len(done) + 1
    with pytest.raises(KeyboardInterrupt):  # one of the two that changed is done, and nothing else is lost
        search.main(arguments)
    found = records.read(tmp_path / "a.json")
    assert done[len(labels) :] == ["lam 0.01, lion"]
    assert found.edits.keys() == {*labels} - {"lam 0.01, bus", "lam 0.01, meals"}
    assert found.edits["lam 0.01, lion"].config["lam"] == 0.02
    limit = 100
    search.main(arguments)
    assert done[len(labels) + 1 :] == ["lam 0.01, bus", "lam 0.01, meals"]
    assert list(records.read(tmp_path / "a.json").edits) == labels
    with pytest.raises(SystemExit):  # another question: nothing is written over
        search.main([*arguments, "--setting", "lam 1"])
    assert "answers another question" in capsys.readouterr().err
    assert list(records.read(tmp_path / "a.json").edits) == labels
    search.main(["uce", "--setting", "lam 1", "--out", str(tmp_path / "b.json")])
    ten = [f"{setting}, {name}" for setting in ("before", "lam 1") for name in CIFAR]
    assert list(records.read(tmp_path / "b.json").edits) == ten == done[len(labels) + 3 :]


def test_no_row_of_another_question_is_dropped(tmp_path, monkeypatch, capsys):
    """Labels are shared: "before, dog" by settings, "seed 0, dog" by methods. A further setting adds its rows."""

    def measured(model, method, trial, training):
        values = {name: rate(1, 2) for name in search.RATES} | {"H_o": {"harmonic_mean": 0.5}}
        made = records.EditMade(method, "", records.plain(asdict(trial.config)), trial.erased, trial.kept)
        return made, records.measurements(values, trial.protocol, trial.label), {}

    model = load("emoji")
    monkeypatch.setattr(search, "load", lambda name: model)
    monkeypatch.setattr(search, "measure", measured)
    ten, seeds = str(tmp_path / "ten.json"), str(tmp_path / "seeds.json")
    search.main(["uce", "--setting", "lam 0.01", "--out", ten])
    search.main(["esd", "--seeds", "dog", "--out", seeds])
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    for line in (
        ["uce", "--setting", "lam 1", "--out", ten],
        ["rece", "--setting", "lam 0.01", "--out", ten],
        ["mace", "--seeds", "dog", "--out", seeds],
    ):
        with pytest.raises(SystemExit):
            search.main(line)
        assert "answers another question" in capsys.readouterr().err
        assert {path: path.read_text() for path in tmp_path.iterdir()} == before
    search.main(["uce", "--setting", "lam 0.01", "--setting", "lam 1", "--out", ten])
    assert len(records.read(tmp_path / "ten.json").edits) == 3 * len(CIFAR)


def test_what_is_the_same_everywhere_has_no_width():
    """Nothing but the pictures by name differs, and all of these do: no resample has another mixture of kinds."""
    seen = lambda setting, one, role, i: role == "other" or role == "target" and setting == "before"
    found = search.table(made_up(seen)).iloc[1]
    assert found["difference"] == pytest.approx(1 / 3)
    assert (found["low"], found["high"]) == pytest.approx((1 / 3, 1 / 3)) and found["p"] < 0.01


def test_an_old_trial_counts_where_nothing_it_depends_on_changed():
    trial = search.trials("uce")[0]
    told = records.plain(asdict(trial.config))
    made = records.EditMade("uce", "", told, trial.erased, trial.kept)
    rows = records.measurements({"Acc_e": rate(1, 2)}, trial.protocol, trial.label)
    old = records.Result("", "search", "model", "vae", edits={trial.label: made}, measurements=tuple(rows))
    assert search.still_true(old, old, trial)
    for other in (replace(old, fingerprint="another"), replace(old, vae="another")):
        assert not search.still_true(old, other, trial)
    for changed in (
        replace(trial, kept=trial.kept[1:]),
        replace(trial, protocol=protocols.quick(trial.what, 40)),
        replace(trial, config=replace(trial.config, lam=7.0)),
        replace(trial, setting="another"),
    ):
        assert not search.still_true(old, old, changed)


@pytest.mark.parametrize("method", ["esd", "uce"])
def test_a_training_has_a_folder_and_a_seed_of_its_own(method, monkeypatch, tmp_path):
    asked = {}

    def fit(model, erase, preserve, **given):
        asked.update(given, erase=erase, preserve=preserve)
        raise KeyboardInterrupt

    monkeypatch.setattr(METHODS[method], "fit", fit)
    trial = replace(search.trials(method)[0], seed=7)
    with pytest.raises(KeyboardInterrupt):
        search.measure(None, method, trial, training=tmp_path)
    assert asked["generator"].initial_seed() == 7 and asked["config"] == trial.config
    assert (asked["erase"], asked["preserve"]) == (trial.erased, trial.kept)
    assert asked.get("folder") == (tmp_path if method == "esd" else None)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["uce", "--seeds", "dog"], "uce is not trained"),
        (["uce", "--setting", "lam 7"], "no setting lam 7: there are before; "),
        (["esd", "--seeds", "dog", "--setting", "before"], "settings or seeds"),
    ],
)
def test_what_cannot_be_searched_is_refused(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        search.main([*arguments, "--out", str(tmp_path / "a.json")])
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_committed_searches_are_whole_and_of_today_s_settings(name):
    found = FILES[name]
    method, told = next(iter(found.edits.values())).method, search.table(found)
    on_ten, seeds = (), None
    if "seeds" in found.details:
        assert tuple(found.details["seeds"]) == search.SEEDS
        seeds = found.erased[0]
    elif "rule" in found.details:
        assert found.details["rule"] == search.RULE and tuple(found.details["classes"]) == DEVELOPMENT
    else:  # on the ten classes: what stood before, what has the highest H_o, and what the rule chose
        searched = search.table(FILES[f"search_{method}"])
        highest = searched["setting"][searched["H_o"].idxmax()]
        earlier = ("all tokens", search.KEPT[method]) if method in search.KEPT else ()
        on_ten = ("before", *earlier, highest, *searched["setting"][searched["chosen"]])
        assert told["setting"].tolist() == list(dict.fromkeys(on_ten))
    trials = search.trials(method, on_ten, seeds)
    assert {label: made.config for label, made in found.edits.items()} == {
        trial.label: records.plain(trial.config) for trial in trials
    }
    assert {(m.edit, m.hash) for m in found.measurements} == {
        (one.label, one.protocol.hash) for one in trials
    }


@pytest.mark.parametrize("method", [name for name in METHODS if f"search_{name}" in FILES])
def test_a_preset_is_what_the_search_chose_and_told_better(method):
    """The control: what stood before is another setting wherever the preset was changed, and there alone."""
    found = search.table(FILES[f"search_{method}"])
    chosen = found[found["chosen"]].iloc[0]
    if method in search.KEPT:
        assert chosen["setting"] != search.KEPT[method]
        chosen = found[found["setting"] == search.KEPT[method]].iloc[0]
    better = chosen["p"] <= 0.05 and chosen["difference"] > 0  # p of what stood before is NaN
    changes = search.SEARCHED[method][chosen["setting"]] if better else {}
    preset, before = METHODS[method].PRESETS["emoji"], search.before(method)
    assert preset == replace(before, **changes) and bool(changes) == (method in search.BEFORE)


@pytest.mark.parametrize(
    "path", sorted((records.RESULTS / "before").glob("*.json")), ids=lambda path: path.stem
)
def test_a_file_of_before_has_the_preset_of_before_and_the_protocol_of_today(path):
    old, new = records.read(path), records.read(path.stem)
    (method,) = {made.method for made in old.edits.values()}
    for found, config in ((old, search.before(method)), (new, METHODS[method].PRESETS["emoji"])):
        told = records.plain(asdict(config))  # a field may be younger than a file
        assert all(made.config == {k: told[k] for k in made.config} for made in found.edits.values())
    # hashes are so short in old files
    asked = lambda found: {(m.measure, m.protocol, m.hash[:8]) for m in found.measurements}
    digests = lambda found: {made.digest for made in found.edits.values() if made.digest}
    assert asked(old) == asked(new) and not digests(old) & digests(new)


UNTRAINED = [method for method in METHODS if method not in search.TRAINED]


@pytest.mark.slow
@pytest.mark.parametrize("method", UNTRAINED)
def test_every_setting_can_be_fitted(method):
    model = load("emoji")
    first = [trial for trial in search.trials(method) if trial.what == search.ERASED[0]]
    edits = [METHODS[method].fit(model, one.erased, one.kept, config=one.config) for one in first]
    # to DP one token in turn is the same as all at once
    assert len({edit.digest for edit in edits}) == len(first) - (method == "dp")


@pytest.mark.slow
def test_a_setting_is_measured_on_the_model(tmp_path):
    """The edit, its rates and every verdict, over a fifth of the pictures."""
    trial = next(one for one in search.trials("uce") if one.label == "lam 1, bus")
    few = replace(trial.protocol, prompts=trial.protocol.prompts[::5])
    part = replace(trial, protocol=few)
    made, rows, verdicts = search.measure(load("emoji"), "uce", part, training=tmp_path, pictures=tmp_path)
    assert made.variant == "lam=1.0" and made.erased == ("bus",) and len(made.preserved) == 9
    assert sum(len(of["seen"]) for name in search.RATES for of in verdicts[name].values()) == len(few.prompts)
    assert {m.measure for m in rows} == {*search.RATES, "H_o"} and all(m.edit == part.label for m in rows)
