"""The papers' tables on Stable Diffusion, made end to end on a tiny random pipeline with tiny random judges."""

import dataclasses
import hashlib
import json
import subprocess

import nbformat
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import PNDMScheduler
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import erasekit as ek
from erasekit import miniatures, models, notebooks
from erasekit.evaluate import protocols, runs
from erasekit.evaluate.protocols import IMAGENETTE
from erasekit.experiments import tables
from erasekit.experiments.tables import TABLES
from erasekit.methods import METHODS
from erasekit.paths import NOTEBOOKS

# of methods, attack; what a trial makes smaller
SMALL = dict(
    iterations=1, sampler=2, early=1, noises=1, calm=1, warmup=0, attack_steps=1, retain_batch=2, pictures=1,
    timesteps=(500,), updates=1, steps=2, lam=0.01,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny pipeline, and tiny judges under their hub ids."""
    place = tmp_path_factory.mktemp("hub")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = tiny_pipeline(length=77)  # the presets' own words do not fit into less
        pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
        models.load(pipeline).save_pretrained(place / "model")
        for name in (tables.CLIP, tables.CIFAR_CLIP):
            miniatures.clip(place / "judges" / name)
        part = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        labels = dict(enumerate(IMAGENETTE.values()))
        classifier = ViTForImageClassification(
            ViTConfig(**part, image_size=32, patch_size=8, id2label=labels)
        )
        classifier.save_pretrained(place / "judges" / tables.RESNET)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(
            place / "judges" / tables.RESNET
        )
    return place


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Harmless prompt files in the place of the real ones."""
    classes = list(IMAGENETTE)
    for number, (name, known) in enumerate(protocols.PROMPT_FILES.items()):
        header = "prompt,evaluation_seed,evaluation_guidance,categories,class,artist,type"
        rows = [
            f"a dog {i},{10 * number + i},7,sexual,{classes[i % 10]},{tables.ARTISTS[i % 5]},erased"
            for i in range(10)
        ]
        path = tmp_path / "prompts" / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([header, *rows]) + "\n")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(protocols.PROMPT_FILES, name, dataclasses.replace(known, rows=10, sha256=digest))
    return tmp_path / "prompts"


def made(folder, files, name, out, count=1, changes=SMALL, **settings):
    table = TABLES[name]
    if table.harmful:
        pytest.importorskip("nudenet")
    asked = table.protocols(files, count=count, judges=folder / "judges")
    asked = [dataclasses.replace(one, steps=2) for one in asked]
    model = ek.load(folder / "model")
    return tables.fill(model, table, asked, out, changes=changes, progress=False, **settings)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_made_from_beginning_to_end(folder, files, name, tmp_path):
    """Every row of the table in the file, drawn on equal prompts, by what the row says; a second call does nothing."""
    out = tmp_path / f"{name}.json"
    seen = []
    for label, done in made(folder, files, name, out):
        seen.append(label)
        assert all(run.manifest["last"]["drawn"] for run in done)
    record = json.loads(out.read_text())
    assert seen == list(record["rows"]) == list(TABLES[name].rows)
    for label, row in TABLES[name].rows.items():
        found = record["rows"][label]
        assert [one["measurements"][0]["hash"] for one in found["results"]] == record["protocols"]
        assert [bool(one["edits"]) for one in found["results"]] == [row is not None] * len(found["results"])
        assert ("attack" in found) == bool(TABLES[name].attack)
        if "attack" in found:
            assert found["attack"]["measurements"][0]["value"]["n"] == 1
            assert bool(found["attack"]["edits"]) == (row is not None)
    edits = {
        file.stem: ek.Edit.load(file).metadata["method"] for file in (tmp_path / name).glob("*.safetensors")
    }
    assert sorted(edits.values()) == sorted(row[0] for row in TABLES[name].rows.values() if row)
    assert list(made(folder, files, name, out)) == []


def test_rows_name_presets_that_exist_and_settings_that_their_method_has():
    for table in TABLES.values():
        for method, preset, changes in filter(None, table.rows.values()):
            dataclasses.replace(METHODS[method].PRESETS[preset], **changes)
        assert set(table.files) <= set(protocols.PROMPT_FILES)
        assert hasattr(__import__("diffusers"), table.sampler)


def test_harmful_pictures_are_there_while_they_are_shown_and_gone_after(folder, files, tmp_path):
    out, counted = tmp_path / "rece-nudity.json", []
    pictures = lambda: list((tmp_path / "rece-nudity").rglob("*.webp"))
    for _, done in made(folder, files, "rece-nudity", out, changes=SMALL):
        counted.append(len(pictures()))
        assert len(list(done[0].pictures())) == 1
    assert min(counted) == max(counted) == 1 and not pictures()
    harmless = tmp_path / "mace-cifar.json"
    list(made(folder, files, "mace-cifar", harmless))
    assert list((tmp_path / "mace-cifar").rglob("*.webp"))  # control


def test_an_interrupted_table_goes_on_and_another_one_is_refused(folder, files, tmp_path):
    out = tmp_path / "one.json"
    rows = made(folder, files, "rece-object", out)
    next(rows), next(rows)
    rows.close()
    whole = tmp_path / "whole.json"
    list(made(folder, files, "rece-object", whole))
    assert [label for label, _ in made(folder, files, "rece-object", out)] == list(
        TABLES["rece-object"].rows
    )[2:]
    measured = lambda file: [
        [one["measurements"] for one in row["results"]]
        for row in json.loads(file.read_text())["rows"].values()
    ]
    assert measured(out) == measured(whole)
    with pytest.raises(ValueError, match="other protocols or settings"):
        list(made(folder, files, "rece-object", out, count=2))
    with pytest.raises(ValueError, match="other protocols or settings"):
        list(made(folder, files, "rece-object", out, concept="dog"))


def test_an_edit_is_taken_up_for_the_same_concept_and_settings_alone(folder, files, tmp_path, monkeypatch):
    """The result file is deleted each time, and the folder with the edits stays."""
    own = {"UCE": ("uce", "sd14-object", {})}
    monkeypatch.setitem(TABLES, "one", dataclasses.replace(TABLES["rece-object"], rows=own))
    fits, fit = [], METHODS["uce"].fit
    monkeypatch.setattr(METHODS["uce"], "fit", lambda *a, **k: fits.append(1) or fit(*a, **k))
    out, chapel = tmp_path / "one.json", ek.Concept("church", synonyms=("chapel",))
    changes = {"lam": 0.3, "synonyms": True}
    asked = [{}, {"concept": "dog"}, {"changes": changes}, {"changes": changes, "concept": chapel}]
    digests = []
    for number, given in enumerate(asked, 1):
        for _ in range(2):  # the second time from its file
            list(made(folder, files, "one", out, **({"changes": {}} | given)))
            (edit,) = json.loads(out.read_text())["rows"]["UCE"]["results"][0]["edits"].values()
            assert edit["erased"] == [getattr(given.get("concept"), "name", given.get("concept", "church"))]
            assert edit["config"].items() >= given.get("changes", {}).items() and len(fits) == number
            out.unlink()
        digests.append(edit["digest"])
    assert len(set(digests)) == len(asked)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == len(asked)
    assert (tmp_path / "one" / "UCE.safetensors").exists()  # the table's own, as it was called before


def test_rows_of_other_synonyms_or_another_attack_are_refused(folder, files, tmp_path, monkeypatch):
    table = dataclasses.replace(TABLES["rece-object"], rows={"no edit": None})
    monkeypatch.setitem(TABLES, "one", table)
    out = tmp_path / "one.json"
    go_on = lambda **given: list(made(folder, files, "one", out, **given))
    assert go_on() and not go_on(concept=ek.Concept("church"))
    with pytest.raises(ValueError, match="other protocols or settings"):
        go_on(concept=ek.Concept("church", synonyms=("chapel",)))
    record = json.loads(out.read_text())
    out.write_text(json.dumps({key: value for key, value in record.items() if key != "attack"}))
    assert not go_on()  # a file from before the attack was told
    out.write_text(json.dumps(record))
    monkeypatch.setitem(TABLES, "one", dataclasses.replace(table, attack="sd14"))
    with pytest.raises(ValueError, match="other protocols or settings"):
        go_on()


def test_shortened_keeps_every_role(folder):
    whole = protocols.cifar("cat", 200, "some/clip")
    short = tables.shortened(whole, 2)
    count = lambda protocol: {
        role: sum(p.role == role for p in protocol.prompts) for role in ("target", "other", "synonym")
    }
    assert count(whole) == {"target": 1, "other": 9, "synonym": 3} and len(runs.shots(whole)) == 2600
    assert count(short) == {"target": 1, "other": 2, "synonym": 2} and short.seeds == (0, 1)
    assert {p.concept for p in whole.prompts if p.role == "synonym"} == {"cat"}
    with pytest.raises(ValueError, match="no class"):
        protocols.cifar("church")


def test_long_prompts_lose_their_last_words(shared_model):
    tokenizer = shared_model.tokenizer
    long = "church " * 30
    protocol = protocols.Protocol(
        "p", tuple(protocols.Prompt(text, role="target") for text in ("a church", long)),
        (protocols.Measure("m", ("target",), "emoji-object", labels=("dog",)),),
    )  # fmt: skip
    short = tables.fitted(protocol, tokenizer)
    assert short.prompts[0] == protocol.prompts[0]
    assert short.prompts[1].text.split() == ["church"] * (tokenizer.model_max_length - 2)
    shared_model.encode([p.text for p in short.prompts])
    with pytest.raises(ValueError):
        shared_model.encode(long)  # control


def test_prompt_files_are_fetched_at_their_commit(tmp_path):
    """The command, run against a local repository in the place of GitHub."""
    origin = tmp_path / "lists"
    git = lambda *words: subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", origin, *words],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    origin.mkdir()
    git("init", "-q")
    for text in ("right", "later"):
        (origin / "prompts.csv").write_text(text)
        git("add", "."), git("commit", "-qm", text)
    commit = git("rev-parse", "--short=10", "HEAD~1")
    source = f"file://{origin.as_posix()} at {commit}, prompts.csv"
    file = protocols.PromptFile(source, 1, "", "MIT", {})
    (tmp_path / "here").mkdir()
    for _ in range(2):  # the second time from the clone that is there
        subprocess.run(file.command("found.csv"), shell=True, check=True, cwd=tmp_path / "here")
        assert (tmp_path / "here" / "found.csv").read_text() == "right"
    for known in protocols.PROMPT_FILES.values():
        assert " show " in known.command("x.csv")


@pytest.mark.slow
def test_the_notebook_makes_a_table_behind_run_gpu(folder, tmp_path):
    """Notebook 90 with its own parameters, on the tiny pipeline and judges, through the strict runner."""
    out, path = tmp_path / "tables", NOTEBOOKS / "90_stable_diffusion.ipynb"
    notebooks.run(
        path, tmp_path / "executed.ipynb", run_gpu=True, table="mace-cifar", source=str(folder / "model"),
        judges=str(folder / "judges"), concept="cat", pictures=1, iterations=1, out=str(out),
    )  # fmt: skip
    record = json.loads((out / "mace-cifar-cat-trial.json").read_text())
    assert list(record["rows"]) == list(TABLES["mace-cifar"].rows) and record["erased"] == "cat"
    first = [row["results"][0]["measurements"][0] for row in record["rows"].values()]
    assert all((one["measure"], one["value"]["n"]) == ("Acc_e", 1) for one in first)
    cell = nbformat.read(tmp_path / "executed.ipynb", 4).cells[-2]
    assert sum("image/svg+xml" in output.get("data", {}) for output in cell.outputs) == len(record["rows"])
