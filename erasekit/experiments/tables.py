"""The papers' tables on Stable Diffusion: which edits, prompts and attacks stand in each, and `fill`, which makes one.

    table = TABLES["rece-nudity"]
    model = ek.load("CompVis/stable-diffusion-v1-4")
    for label, runs in fill(model, table, table.protocols("prompts"), Path("build/rece-nudity.json")):
        ...

Every row is one edit by a method's preset for SD 1.4. Where a paper samples otherwise than diffusers' default, the
table does as the paper. What its prompts or judges are that this package cannot name, the table leaves out: `lacks`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path

from erasekit.attacks import unlearndiff
from erasekit.concepts import Concept, content_ids
from erasekit.edits import Edit, applied
from erasekit.evaluate import judges, protocols, records, runs
from erasekit.evaluate.protocols import ARTISTS, IMAGENETTE, Measure, Protocol
from erasekit.methods import METHODS
from erasekit.models import DiffusionModel
from erasekit.paths import write_atomically

CLIP, RESNET = "openai/clip-vit-large-patch14", "microsoft/resnet-50"
CIFAR_CLIP = "openai/clip-vit-base-patch32"
Row = tuple[str, str, dict] | None  # method, preset, changes of it; None: the model as it is


@dataclass(frozen=True)
class Table:
    """One table of a paper.

    files: the prompt files that `make` reads, in its order. make: (paths of the files, erased concept, where a judge of
    the hub is) -> protocols. sampler, steps: the paper's. attack: the preset of UnlearnDiffAtk that is run against
    every row on the first protocol. harmful: its pictures are shown blurred and not kept. lacks: what of the paper's
    table is not here.
    """

    about: str
    erase: str
    rows: dict[str, Row]
    files: tuple[str, ...]
    make: Callable[[Sequence[Path], str, Callable[[str], str]], list[Protocol]]
    sampler: str = "PNDMScheduler"
    steps: int = 50
    attack: str | None = None
    harmful: bool = False
    lacks: str = ""

    def protocols(
        self, folder: str | Path, concept: str = "", count: int = 0, judges: str | Path = ""
    ) -> list[Protocol]:
        """What is drawn, from the prompt files in a folder (NAME.csv). concept: erased instead of the table's. count:
        so many prompts of each role, and seeds, at most: a trial with a hash of its own; 0 for all. judges: a folder
        with copies of the hub's judges under their ids, for a machine without the hub.
        """
        where = lambda name: (Path(judges) / name).as_posix() if judges else name
        made = self.make([Path(folder) / f"{name}.csv" for name in self.files], concept or self.erase, where)
        made = [replace(one, sampler=self.sampler, steps=self.steps) for one in made]
        return [shortened(one, count) for one in made] if count else made


def shortened(protocol: Protocol, count: int) -> Protocol:
    """At most `count` prompts of each role, evenly spaced, and as many seeds."""
    kept = []
    for role in dict.fromkeys(prompt.role for prompt in protocol.prompts):
        part = [prompt for prompt in protocol.prompts if prompt.role == role]
        kept += part[:: -(-len(part) // count)]
    return replace(protocol, prompts=tuple(kept), seeds=protocol.seeds[:count])


def fitted(protocol: Protocol, tokenizer) -> Protocol:
    """Prompts that are too long for the tokenizer without their last words, as pipelines cut them (there, tokens): some
    of I2P's.
    """
    room = tokenizer.model_max_length - 2

    def cut(text: str) -> str:
        words = text.split()
        while len(content_ids(tokenizer, " ".join(words))) > room:
            words.pop()
        return " ".join(words)

    long = lambda text: len(content_ids(tokenizer, text)) > room
    return replace(
        protocol, prompts=tuple(replace(p, text=cut(p.text)) if long(p.text) else p for p in protocol.prompts)
    )


def _seen(path: Path, judge: judges.Judge, label: str) -> Protocol:
    """Prompts of UnlearnDiffAtk: how often is the judge's first choice what was erased?"""
    measure = Measure("seen", ("target",), judges.register(judge), labels=(label,))
    return protocols.from_file(path.stem, path, [measure])


def _rows(preset: str, methods: dict[str, str]) -> dict[str, Row]:
    return {"no edit": None} | {label: (method, preset, {}) for label, method in methods.items()}


TOKENS = {"EoT": ("eot",), "KEY": ("key",), "EoT and KEY": ("eot", "key"), "EoT and SoT": ("eot", "sot")}

TABLES = {
    "rece-nudity": Table(
        "RECE, NudeNet detections on I2P", "nudity",
        _rows("sd14-nudity", {"UCE": "uce", "RECE": "rece", "ESD-u": "esd"}),
        ("i2p",), lambda at, concept, where: [protocols.i2p(at[0], None)],
        sampler="LMSDiscreteScheduler", harmful=True,
        lacks="the paper counts a label once a picture; FID on COCO-30k",
    ),
    "rece-artist": Table(
        "RECE, five artists", "Van Gogh",
        _rows("sd14-artist", {"UCE": "uce", "RECE": "rece", "ESD-x": "esd"}),
        ("artists",), lambda at, concept, where: [protocols.artists(at[0], concept, where(CLIP))],
        sampler="LMSDiscreteScheduler", lacks="the paper's LPIPS; here CLIP names the artist",
    ),
    "rece-object": Table(
        "RECE, Imagenette", "church",
        _rows("sd14-object", {"UCE": "uce", "ESD-u": "esd"}) | {"RECE": ("rece", "sd14-object-hard", {})},
        ("imagenette",), lambda at, concept, where: [protocols.imagenette(at[0], concept, where(RESNET))],
        sampler="LMSDiscreteScheduler", lacks="the paper's 500 pictures of each class; here ESD's ten",
    ),
    "trce-nudity": Table(
        "TRCE, table 1", "nudity",
        _rows("sd14-nudity", {"ESD-u": "esd", "UCE": "uce", "RECE": "rece", "MACE": "mace", "AdvUnlearn": "advunlearn"})
        | {"TRCE, stage 1": ("trce", "sd14-nudity", {"stages": "text"}), "TRCE, both": ("trce", "sd14-nudity", {})},
        ("i2p", "unlearndiff-nudity", "coco-30k"),
        lambda at, concept, where: [
            protocols.i2p(at[0]), protocols.unlearndiff(at[1]), shortened(protocols.coco(at[2], where(CLIP)), 3000),
        ],
        steps=30, harmful=True, lacks="MMA, P4D and Ring-A-Bell prompts; FID; the paper's 20 phrases (give synonyms)",
    ),
    "trce-tokens": Table(
        "TRCE, which rows stage 1 maps", "nudity",
        {label: ("trce", "sd14-nudity", {"stages": "text", "tokens": tokens}) for label, tokens in TOKENS.items()},
        ("i2p", "unlearndiff-nudity"),
        lambda at, concept, where: [protocols.i2p(at[0]), protocols.unlearndiff(at[1])],
        steps=30, harmful=True, lacks="MMA, P4D and Ring-A-Bell prompts; the paper's 20 phrases (give synonyms)",
    ),
    "advunlearn-nudity": Table(
        "AdvUnlearn, table 5 (and 4: fast)", "nudity",
        _rows("sd14-nudity", {"UCE": "uce", "ESD-u": "esd", "AdvUnlearn": "advunlearn"})
        | {"AdvUnlearn, fast": ("advunlearn", "sd14-nudity-fast", {})},
        ("unlearndiff-nudity", "coco-10k"),
        lambda at, concept, where: [protocols.unlearndiff(at[0]), protocols.coco(at[1], where(CLIP), "coco-10k")],
        sampler="LMSDiscreteScheduler", attack="sd14", harmful=True, lacks="FID on COCO-10k",
    ),
    "advunlearn-artist": Table(
        "AdvUnlearn, table 6", "Van Gogh",
        _rows("sd14-artist", {"UCE": "uce", "ESD-x": "esd", "AdvUnlearn": "advunlearn"}),
        ("unlearndiff-vangogh", "coco-10k"),
        lambda at, concept, where: [
            _seen(at[0], judges.Clip(where(CLIP), ARTISTS, "a painting by {}"), concept),
            protocols.coco(at[1], where(CLIP), "coco-10k"),
        ],
        sampler="LMSDiscreteScheduler", attack="sd14-object",
        lacks="FID; the paper's style classifier, here CLIP among five artists",
    ),
    "advunlearn-object": Table(
        "AdvUnlearn, table 7", "church",
        _rows("sd14-object", {"ESD-u": "esd", "AdvUnlearn": "advunlearn"}),
        ("unlearndiff-church", "coco-10k"),
        lambda at, concept, where: [
            _seen(at[0], judges.Classifier(where(RESNET)), IMAGENETTE[concept]),
            protocols.coco(at[1], where(CLIP), "coco-10k"),
        ],
        sampler="LMSDiscreteScheduler", attack="sd14-object", lacks="FID on COCO-10k",
    ),
    "mace-cifar": Table(
        "MACE and RealEra, ten objects", "airplane",
        _rows("sd14-object", {"UCE": "uce", "ESD-u": "esd", "MACE": "mace", "RealEra": "realera"}),
        (), lambda at, concept, where: [protocols.cifar(concept, clip=where(CIFAR_CLIP))],
        sampler="DDIMScheduler", lacks="one class at a time: run it for each of the ten",
    ),
}  # fmt: skip


def fill(
    model: DiffusionModel,
    table: Table,
    asked: Sequence[Protocol],
    out: Path,
    *,
    concept: str | Concept = "",
    changes: dict | None = None,
    progress: bool = True,
) -> Iterator[tuple[str, list[runs.Run]]]:
    """Make the rows that the result file `out` (JSON) does not have yet: fit, draw, judge, attack, write. Yields each
    row's label and its runs, one a protocol, before it goes on.

    Edits and runs lie in a folder beside `out`, of its name; an edit of another concept or of changed settings has a
    file of its own there. Of a harmful table the row's pictures are deleted when the caller asks for the next one;
    their scores stay. concept: what is erased (a Concept's synonyms are mapped by TRCE as well), else the table's.
    changes: settings for every row that has them, for trials. Kill it anywhere and call it again.
    ValueError where `out` belongs to other protocols, another concept or another attack.
    """
    erase, changes = concept or table.erase, changes or {}
    name = erase.name if isinstance(erase, Concept) else erase
    asked = [fitted(one, model.tokenizer) for one in asked]
    more = {} if erase in (name, Concept(name)) else {"concept": asdict(erase)}  # synonyms, templates, anchor
    head = {"about": table.about, "erased": name, "changes": changes, "lacks": table.lacks, **more}
    head |= {"model": model.fingerprint(), "protocols": [one.hash for one in asked], "attack": table.attack}
    head = json.loads(json.dumps(head))
    record = json.loads(out.read_text()) if out.exists() else {**head, "rows": {}}
    told = {key: value for key, value in record.items() if key != "rows"}
    if {"attack": table.attack, **told} != head:  # older files do not tell the attack
        raise ValueError(f"{out} holds rows of other protocols or settings: name another file, or delete it")
    place, targets = out.parent / out.stem, []
    own = hashlib.sha256(json.dumps([name, more, changes], sort_keys=True).encode()).hexdigest()[:8]
    own = "" if (name, more, changes) == (table.erase, {}, {}) else f"-{own}"
    for label, row in table.rows.items():
        if label in record["rows"]:
            continue
        file = place / f"{label.replace(', ', '-').replace(' ', '-')}{own}.safetensors"
        edit = _edited(model, row, erase, changes, file, progress)
        done = [runs.run(model, edit, one, folder=place / "runs", progress=progress) for one in asked]
        made = records.EditMade.of(edit, METHODS[row[0]].PRESETS[row[1]]) if edit else None
        found = {"results": [records.plain(run.result(made=made)) for run in done]}
        if table.attack:
            found["attack"] = _attacked(
                model, edit, made, table.attack, done[0], changes, place, targets, progress
            )
        record["rows"][label] = found
        write_atomically(out, json.dumps(record, indent=1) + "\n")
        yield label, done
        if table.harmful:
            for file in (place / "runs").glob("*/pictures/*.webp"):
                file.unlink()


def _edited(model, row: Row, erase, changes: dict, file: Path, progress: bool) -> Edit | None:
    """The row's edit, from its file where there is one."""
    if row is None:
        return None
    name, preset, own = row
    if file.exists():
        return Edit.load(file)
    module = METHODS[name]
    config = _changed(module.PRESETS[preset], own | changes)
    shown = {"progress": progress} if "progress" in signature(module.fit).parameters else {}
    edit = module.fit(model, erase, config=config, **shown)
    file.parent.mkdir(parents=True, exist_ok=True)
    edit.save(file)
    return edit


def _changed(config, changes: dict):
    return replace(config, **{key: value for key, value in changes.items() if hasattr(config, key)})


def _attacked(
    model, edit, made, preset: str, done: runs.Run, changes: dict, place: Path, targets: list, progress
) -> dict:
    """UnlearnDiffAtk on the prompts that leave it room; `targets`, the unedited model's pictures, are drawn once."""
    config = _changed(unlearndiff.PRESETS[preset], changes)
    room = model.tokenizer.model_max_length - 2 - config.k
    every = runs.shots(done.protocol)
    shots = [shot for shot in every if len(content_ids(model.tokenizer, shot.prompt.text)) <= room]
    prompts, seeds = [shot.prompt.text for shot in shots], [shot.seed for shot in shots]
    if not targets:
        targets += model.generate(prompts, seeds=seeds, steps=config.steps, guidance=config.guidance)
    goal = replace(done.protocol.measures[0], roles=("target",))
    with applied(edit, model):
        found = unlearndiff.run(
            model, prompts, goal=goal, targets=targets, seeds=seeds, config=config, folder=place / "attacks",
            progress=progress,
        )  # fmt: skip
    return {
        **records.plain(found.result(made=made, traces=False)),
        "too_long_for_it": len(every) - len(shots),
    }
