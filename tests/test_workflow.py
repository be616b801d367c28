"""The grid of workflow/: it makes the committed results by the commands that they name, and promotion guards them."""

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from threading import Thread

import pytest
import yaml

from erasekit import cli
from erasekit.cli_methods import configured
from erasekit.evaluate import records, runs
from erasekit.evaluate.metrics import rate
from erasekit.experiments import audit, promotion
from erasekit.methods import METHODS
from erasekit.paths import RESULTS, ROOT

CONFIG = yaml.safe_load((ROOT / "workflow/config.yaml").read_text())
COMMITTED = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def snakemake(folder: Path, *arguments: str) -> str:
    """Snakemake in an empty folder of its own; what it prints."""
    words = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(ROOT / "workflow/Snakefile"),
        "--directory",
    ]
    done = subprocess.run(
        [*words, str(folder), "--cores", "2", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> str:
    """What Snakemake says that it would do for everything."""
    return snakemake(tmp_path_factory.mktemp("dry"), "--dry-run", "--printshellcmds")


@pytest.fixture(scope="module")
def jobs(dry_run) -> dict[str, list[str]]:
    """{output file: the words of the command that makes it}."""
    found = re.findall(r"^    output: (.+)\n(?:    .*\n)*Shell command: (.+)", dry_run, re.MULTILINE)
    return {file: shlex.split(command) for outputs, command in found for file in outputs.split(", ")}


def test_every_committed_result_is_a_cell_or_listed_with_a_reason(jobs):
    made = {Path(file).stem for file in jobs if file.startswith("build/results/")}
    listed = {cell for rule in CONFIG.keys() - {"erase", "uncovered"} for cell in CONFIG[rule]}
    assert made == listed
    assert made | CONFIG["uncovered"].keys() == COMMITTED.keys() and not made & CONFIG["uncovered"].keys()
    assert all(CONFIG["uncovered"].values())


@pytest.mark.parametrize("name", sorted(COMMITTED.keys() - CONFIG["uncovered"].keys()))
def test_the_grid_gives_the_command_that_the_committed_file_names(jobs, name):
    """But for what commands do not record: where `run` saves the edit, variants of an ablation, a transfer's edit."""
    python, *words = jobs[f"build/results/{name}.json"]
    script = words[0].endswith(".py")
    assert python == sys.executable and script == (words[0] != "-P")
    words = ["python", *words[not script :]]
    if "&&" in words:  # the finished file is copied
        words = words[: words.index("&&")]
    words = [re.sub(r"^build/(results|ablations)/", "data/results/", word) for word in words]
    words = [word.replace(f"{ROOT}/benchmarks", "benchmarks") for word in words]
    expected = shlex.split(COMMITTED[name]["command"])
    for option, command in (("--edit", "run"), ("--only", "erasekit.experiments.ablation")):
        while command in words and option in words:
            at = words.index(option)
            del words[at : at + 2]
    if name == "benchmark_transfer":
        words[3] = "EDIT"
    assert words == expected


def test_every_command_has_one_thread_but_timings_two(dry_run):
    told = re.findall(r"^rule (\w+):\n((?:    .*\n)*)", dry_run, re.MULTILINE)
    threads = {rule: re.search(r"threads: (\d+)", said) for rule, said in told}
    assert threads.keys() >= {"run", "train", "attack", "objects", "benchmark"}
    two = {rule for rule, found in threads.items() if found}
    assert two == {"benchmark", "scaling", "hundred"} and {threads[rule][1] for rule in two} == {"2"}


@pytest.mark.parametrize("name", ["consumers", "text_entries"])
def test_a_benchmark_finds_the_script_beside_it(jobs, name, tmp_path):
    """As the grid starts it, in a folder with nothing in it."""
    python, script, *_ = jobs[f"build/results/benchmark_{name}.json"]
    subprocess.run(
        [python, script, "--help"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )


def test_ablations_have_the_variants_that_were_committed(jobs):
    for name in CONFIG["ablation"]:
        words = jobs[f"build/results/{name}.json"]
        asked = [value for option, value in zip(words, words[1:], strict=False) if option == "--only"]
        assert asked == list(COMMITTED[name]["edits"])


BEHIND_AN_EDIT = [
    name
    for name, one in COMMITTED.items()
    if one["kind"] in ("attack", "protocol", "deployment") and one["edits"]
]


@pytest.mark.parametrize("name", BEHIND_AN_EDIT)
def test_the_grid_makes_the_edits_that_were_measured(jobs, name):
    words, (made,) = jobs[f"build/results/{name}.json"], COMMITTED[name]["edits"].values()
    edit = jobs[words[words.index("--edit") + 1]]
    method, concept = edit[5:7]
    asked = {}
    for option, value in zip(edit[7::2], edit[8::2], strict=True):
        asked.setdefault(option[2:], []).append(yaml.safe_load(value))
    kept = asked.pop("preserve", None)
    given = {option: one for option, (one,) in asked.items() if option not in ("out", "edit")}
    config = json.loads(json.dumps(asdict(configured(METHODS[method].PRESETS["emoji"], given))))
    later = asdict(METHODS[method].Config())  # settings that came after the file stand at their default
    assert (method, config) == (made["method"], json.loads(json.dumps(later)) | made["config"])
    assert concept in (*made["erased"], "weapon")
    assert kept is None or kept == made["preserved"]


CELLS = {
    "build/results/base_characters_ghost.json": {"evaluate": {"base_characters_ghost": {"pictures": 1}}},
    "build/results/attack_concept-vector_uce_dog.json": {
        "attack": {"attack_concept-vector_uce_dog": {"attempts": 3}}
    },
}


@pytest.mark.slow
def test_two_cells_run_and_are_not_run_again(tmp_path):
    """Few pictures and attempts; with the edit that one of them attacks."""
    small = tmp_path / "small.json"
    small.write_text(json.dumps({rule: cells for part in CELLS.values() for rule, cells in part.items()}))
    printed = snakemake(tmp_path, "--configfile", str(small), "--", *CELLS)
    assert "3 of 3 steps (100%) done" in printed
    drawn, attacked = (promotion.read(tmp_path / file) for file in CELLS)
    assert "--pictures 1 --out data/results/" in drawn["command"] and drawn["measurements"]
    counted = {m["measure"]: m["value"]["n"] for m in attacked["measurements"]}
    reference, found = COMMITTED["attack_concept-vector_uce_dog"], attacked["details"]
    assert len(found["attempts"]) == counted["attack"] == 3
    same = ("method", "config", "erased", "preserved")
    made = [{key: one["edits"]["uce"][key] for key in same} for one in (attacked, reference)]
    assert made[0] == made[1] and found["config"] == reference["details"]["config"]
    first = [one["prompt"] for one in reference["details"]["attempts"][:3]]
    assert [one["prompt"] for one in found["attempts"]] == first
    assert "Nothing to be done" in snakemake(tmp_path, "--configfile", str(small), "--", *CELLS)
    small.write_text(small.read_text().replace('"attempts": 3', '"attempts": 4'))
    again = snakemake(tmp_path, "--configfile", str(small), "--dry-run", "--", *CELLS)
    assert "rule attack" in again and "rule evaluate" not in again and "rule erase" not in again


def test_a_failed_cell_names_the_command_and_leaves_no_file(tmp_path):
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"evaluate": {"base_characters_ghost": {"pictures": "many"}}}))
    with pytest.raises(AssertionError, match="--pictures many"):
        snakemake(tmp_path, "--configfile", str(small), "--", "build/results/base_characters_ghost.json")
    assert not (tmp_path / "build/results/base_characters_ghost.json").exists()


@pytest.mark.parametrize("name", ["local", "slurm", "kubernetes"])
def test_profiles_name_rules_and_options_that_there_are(name, jobs):
    from snakemake.cli import get_argument_parser

    profile = yaml.safe_load((ROOT / f"workflow/profiles/{name}/config.yaml").read_text())
    options = {
        word.lstrip("-") for action in get_argument_parser()._actions for word in action.option_strings
    }
    plugin = profile.get("executor", "local")
    unknown = {
        key for key in profile if key not in options and not key.startswith((f"{plugin}-", "storage-"))
    }
    assert not unknown
    rules = set(
        re.findall(r"^(?:use )?rule (?:\w+ as )?(\w+)", (ROOT / "workflow/Snakefile").read_text(), re.M)
    )
    assert {rule for key in ("set-resources", "set-threads") for rule in profile.get(key, {})} <= rules


# Promotion

SUBJECT = {"fingerprint": "f", "vae": "v", "judges": {"emoji-object": "j"}}


def good(target=None, **changes) -> dict:
    """A whole result file."""
    counted = {"target": target or rate(3, 50), "others": rate(500, 515)}
    rows = tuple(
        records.Measurement(name, one, seconds=3.0, machine={"cores": 2}) for name, one in counted.items()
    )
    command = 'python -m erasekit run uce "dog" --out build/results/uce_dog.json'
    details = {"course": [1.0, 0.5]}
    whole = records.Result(
        command, "run", **SUBJECT, machine={"accelerator": "none"}, measurements=rows, details=details
    )
    return records.plain(whole) | changes


GOOD = good()


@pytest.fixture
def judged(tmp_path):
    """A function: the candidate of a result, beside a committed one."""
    committed = tmp_path / "committed"
    committed.mkdir()

    def call(result, old=None, name="uce_dog.json") -> promotion.Candidate:
        path = tmp_path / name
        path.write_text(result if isinstance(result, str) else json.dumps(result))
        if old:
            (committed / name).write_text(json.dumps(old))
        return promotion.candidate(path, SUBJECT, committed)

    call.committed = committed
    return call


def test_promotion_tells_new_same_and_different(judged):
    moved = GOOD | {"command": GOOD["command"].replace("build/", "data/")}
    assert judged(GOOD).state == "new"
    there = f"{judged.committed.resolve()}/build/"  # a pod's volume, say
    assert judged(GOOD | {"command": GOOD["command"].replace("build/", there)}, moved).state == "same"
    elsewhere = [one | {"seconds": 9.0, "machine": {"cores": 16}} for one in GOOD["measurements"]]
    assert judged(GOOD | {"machine": {}, "measurements": elsewhere}, moved).state == "same"
    changed = good(rate(4, 50), details={"steps": 25})
    found = judged(changed)
    assert found.state == "differs"
    assert "measurements[0].value.k: 3 -> 4" in found.details and "details.steps: added" in found.details
    assert "details.course: gone" in found.details and not any("[1]" in line for line in found.details)
    assert promotion.write([found], judged.committed) == [judged.committed / "uce_dog.json"]
    assert judged(changed).state == "same"  # and the command names the committed file
    assert json.loads((judged.committed / "uce_dog.json").read_text())["command"] == moved["command"]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda d: json.dumps(d)[:-30], "not whole JSON"),
        (lambda d: "", "not whole JSON"),
        (lambda d: json.dumps(d).replace("0.06,", "NaN,"), "NaN"),
        (lambda d: {k: v for k, v in d.items() if k != "command"}, "does not name the command"),
        (lambda d: d | {"command": d["command"].replace("uce_dog", "uce_cat")}, "made as something else"),
        (
            lambda d: d | {"command": d["command"].replace("build/", "elsewhere/")},
            "made as something else",
        ),
        (lambda d: d | {"fingerprint": "other"}, "fingerprint"),
        (lambda d: d | {"judges": {"emoji-object": "other"}}, "judge emoji-object"),
        (lambda d: {k: v for k, v in d.items() if k != "edits"}, "no result file"),
        (lambda d: good(rate(3, 50) | {"k": 4}), "measurements[0].value does not follow"),
        (lambda d: good(rate(3, 50) | {"n": 0}), "measurements[0].value does not follow"),
    ],
)
def test_promotion_refuses_what_is_damaged_or_of_other_weights(judged, damage, complaint):
    found = judged(damage(GOOD))
    assert found.state == "refused" and complaint in " ".join(found.details)
    good = promotion.Candidate(Path("good.json"), "new", (), "{}")
    with pytest.raises(ValueError, match="uce_dog.json"):
        promotion.write([good, found], judged.committed)
    assert not list(judged.committed.iterdir())


def test_committed_results_are_sound_and_the_same_as_themselves(tmp_path, capsys):
    """The command as it is typed: it writes nothing, and nothing where a file is cut short."""
    for name, result in COMMITTED.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    before = {path: path.read_bytes() for path in RESULTS.rglob("*.json")}
    with pytest.raises(SystemExit) as end:
        cli.main(["promote", *map(str, sorted(tmp_path.glob("*.json"))), "--write"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and lines[-1] == f"0 of {len(COMMITTED)} written to data/results/"
    assert {line.split()[0] for line in lines[:-1]} == {"same"}
    half = tmp_path / "uce_church.json"
    half.write_text(half.read_text()[:-20])
    with pytest.raises(SystemExit) as end:
        cli.main(["promote", str(half), "--write"])
    assert end.value.code == 2 and "refused  uce_church.json" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in RESULTS.rglob("*.json")} == before


# Cells that draw with the same model at once


def test_a_line_that_another_process_is_writing_is_not_cut_off(tmp_path):
    path = tmp_path / "pictures.0.jsonl"
    line = runs._sealed({"shot": "a"})
    other = Thread(target=runs.append_sealed, args=(path, [{"shot": "b"}]))
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line[:10])
        file.flush()
        other.start()
        other.join(0.5)
        file.write(line[10:])
    other.join()
    assert runs.read_sealed(tmp_path, "pictures").keys() == {"a", "b"}


# ---- cells built again -----------------------------------------------------------------------------------------


def test_the_lot_is_the_same_for_all_and_holds_every_cell_but_timings():
    cells = audit.lot()
    made = {cell for rule in CONFIG.keys() - {*audit.LEFT_OUT} for cell in CONFIG[rule]}
    assert set(cells) == made and len(cells) == len(made) and cells == audit.lot() != sorted(cells)
    some = audit.lot(["weapons", "objects"])
    assert set(some) == {*CONFIG["objects"], *CONFIG["weapons"]} and some == [c for c in cells if c in some]
    with pytest.raises(ValueError, match="no rule edits: there are"):
        audit.lot(["edits"])


def test_files_without_verdicts_are_older_and_go_first(tmp_path, monkeypatch):
    """Control: with its verdicts again, the same file waits for its turn in the lot."""
    first, *others, last = audit.lot(["context"])
    done = []
    for cell in (first, *others, last):
        shutil.copy(RESULTS / f"{cell}.json", tmp_path)
    whole = (tmp_path / f"{last}.json").read_text()
    result = json.loads(whole)
    del result["details"]["verdicts"]
    (tmp_path / f"{last}.json").write_text(json.dumps(result))
    monkeypatch.setattr(audit, "RESULTS", tmp_path)
    monkeypatch.setattr(audit, "rebuilt", lambda cell, clone: done.append(cell) or RESULTS / f"{cell}.json")
    log = tmp_path / "audit.csv"
    audit.main(["2", "--older", "--rule", "context", "--log", str(log)])
    assert done == [last, first]
    assert audit.rows_of(log)[["draw", "verdict"]].values.tolist() == [["older", "counts"], ["lot", "same"]]
    (tmp_path / f"{last}.json").write_text(whole)
    assert audit.older(["context"]) == []
    kept = json.loads(whole)["details"]["verdicts"]
    two = result | {"edits": {"a": {}, "b": {}}}
    assert audit.keeps(two | {"details": {"verdicts": {"original": kept, "a": kept, "b": kept}}})
    assert not audit.keeps(two | {"details": {"verdicts": {"original": kept, "a": kept}}})
    with pytest.raises(ValueError, match="--older is for objects, context, weapons, .*: files of attack"):
        audit.older(["attack"])


def test_a_cell_is_compared_by_its_counts_and_by_all_it_says():
    old = promotion.read(RESULTS / "weapons_oce.json")
    change = lambda **other: json.loads(json.dumps(old)) | other
    assert audit.compared(old, change(machine={"cores": 99})) == ("same", "")
    few = {name: value for name, value in old["details"].items() if name != "verdicts"}
    assert audit.compared(old, change(details=few)) == ("counts", "details.verdicts: gone")
    means = promotion.read(RESULTS / "objects_trce_dog.json")
    moved = json.loads(json.dumps(means))
    next(one for one in moved["measurements"] if "mean" in one["value"])["value"]["mean"] += 1e-5
    assert audit.compared(means, moved)[0] == "counts"
    wrong = change()
    wrong["measurements"][0]["value"]["k"] += 1
    verdict, details = audit.compared(old, wrong)
    assert verdict == "differs" and details.startswith("oce emoji-weapons explicit.k: 158 -> 159")


def test_an_audit_goes_on_where_it_stopped_and_counts_no_file_that_changed(tmp_path, monkeypatch, capsys):
    log, done, resumed = tmp_path / "audit.csv", [], []

    def rebuilt(cell, clone):
        done.append(cell)
        if len(done) == 2:
            raise subprocess.CalledProcessError(1, "snakemake", stderr="out of\nmemory")
        if len(done) >= 4 and not resumed:  # the pool may begin another before it stops
            raise KeyboardInterrupt
        return RESULTS / f"{cell}.json"

    monkeypatch.setattr(audit, "rebuilt", rebuilt)
    context = ["--rule", "context", "--log", str(log)]
    first = audit.lot(["context"])[:5]
    with pytest.raises(KeyboardInterrupt):
        audit.main(["5", *context])
    rows = audit.standing(log)
    assert rows["cell"].tolist() == first[:3] == done[:3]
    assert (
        rows["verdict"].tolist() == ["same", "failed", "same"]
        and rows["details"].tolist()[1] == "out of memory"
    )
    assert rows["built"].tolist()[0] == audit.committed(first[0])  # nothing differs, so the same bytes
    log.write_text(log.read_text().replace(audit.committed(first[0]), "0" * 64))  # as if the file had changed
    assert audit.standing(log)["cell"].tolist() == first[1:3]
    resumed += [True]
    done[:] = [""] * 4
    audit.main(["2", *context])
    assert done[4:] == [first[0], first[3]]
    assert audit.standing(log)["cell"].tolist() == [first[1], first[2], first[0], first[3]]
    audit.main(["2", "--jobs", "2", *context])
    assert {*done[6:]} == {first[4], audit.lot(["context"])[5]}
    with pytest.raises(SystemExit):
        audit.main(["1", "--rule", "edits"])
    assert "no rule edits" in capsys.readouterr().err


def test_a_cell_whose_build_was_stopped_has_no_verdict(tmp_path, monkeypatch):
    """Control: the same end of its Snakemake, with nobody stopping the audit, is one."""
    first = audit.lot(["context"])[0]

    def rebuilt(cell, clone):
        if cell == first and interrupted:
            raise KeyboardInterrupt
        time.sleep(0.3)
        raise subprocess.CalledProcessError(1, "snakemake", stderr="terminated")

    monkeypatch.setattr(audit, "rebuilt", rebuilt)
    command = ["2", "--jobs", "2", "--rule", "context", "--log", str(tmp_path / "audit.csv")]
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        audit.main(command)
    assert audit.rows_of(tmp_path / "audit.csv").empty
    interrupted = False
    audit.main(command)
    assert audit.rows_of(tmp_path / "audit.csv")["verdict"].tolist() == ["failed"] * 2


def test_committed_files_keep_the_verdicts_that_pairs_are_made_of():
    """All of objects, contexts and weapons, and the ablations that the README names."""
    assert audit.older(audit.PROTOCOLS) == []
    whole = {f"ablation_{method}_dog" for method in ("uce", "mace", "rece")} | {
        "ablation_advunlearn_dog_claims"
    }
    assert not whole & set(audit.older(["ablation"]))


def test_the_committed_audit_is_about_committed_files():
    rows = audit.standing()
    assert len(rows) and set(rows["verdict"]) <= {"same", "counts", "differs", "failed"}
    assert list(rows.columns) == list(audit.COLUMNS) and set(rows["cell"]) <= set(audit.lot())
    agree = rows["verdict"].isin(["same", "counts"])
    by_lot, older = (
        (len(part), part.sum()) for part in (agree[rows["draw"] == draw] for draw in ("lot", "older"))
    )
    assert set(rows["cell"]) <= set(audit.lot(audit.PAIRED))
    drawn = audit.lot(audit.PROTOCOLS)
    assert set(rows.loc[rows["draw"] == "lot", "cell"]) <= set(drawn)
    read = " ".join((ROOT / "README.md").read_text().split())
    assert f"The {len(audit.lot())} cells of the grid" in read
    assert (
        "Of {} cells drawn by lot and built again from nothing {} have the same counts".format(*by_lot)
        in read
    )
    assert (
        "that older code had made {} more were built again, and {} have the same counts".format(*older)
        in read
    )
    assert f"among the {len(drawn)} of these three kinds" in read
