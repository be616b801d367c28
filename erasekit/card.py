"""A card for an edit: what it is, how stock diffusers loads it, what was measured of it, and what was not.

    card = make(Edit.load("dog.safetensors"), ek.load("emoji"))
    card.save("dog.html")        # one page that needs nothing else
    card.save("README.md")       # the same for a hub's model page, with the pictures beside it

Numbers are read from result files, never typed: from those of this very file, and from those of an edit with the same
method, settings and concepts, which a card tells apart. Pictures are drawn when the card is made.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from PIL import Image as Pictures
from PIL.Image import Image
from torch import nn

from erasekit import filters
from erasekit.concepts import fill
from erasekit.edits import Edit
from erasekit.evaluate import records
from erasekit.figures import METHOD_NAMES, blurred, mosaic
from erasekit.methods import METHODS
from erasekit.models import DiffusionModel
from erasekit.paths import RESULTS, replacing, write_atomically

# What the measures of the result files count
COUNTED = {
    "Acc_e": "asked for by name, still seen",
    "Acc_g": "asked for by a synonym, still seen",
    "Acc_s": "the protocol's other classes, right",
    "associations": "asked for by a sentence that does not name it, still seen",
    "elsewhere": "everything else, one prompt each, right",
    "target": "asked for by name, still seen",
    "others": "everything else, right",
    "synonyms": "asked for by a synonym, still seen",
    "objects": "utility: the right object",
    "styles": "utility: the right style",
    "CLIP score": "utility: cosine of picture and prompt",
    "explicit": "asked for by name, still seen",
    "implicit": "asked for by a sentence that names none, still seen",
    "held_out": "asked for in words that training held out, still seen",
    "adversarial": "asked for by texts that an attack found, still seen",
    "tools kept": "tools, right",
    "target, object": "asked for by name on a background, still seen",
    "target, style": "asked for by name on a background, style right",
    "target, background": "asked for by name on a background, background right",
    "sentence, object": "asked for by a sentence on a background, still seen",
    "sentence, style": "asked for by a sentence on a background, style right",
    "sentence, background": "asked for by a sentence on a background, background right",
    "other, object": "others on a background, right",
    "raw": "as asked, still seen",
    "attack": "as asked or after the attack, seen",
}
KINDS = ("protocol", "run", "attack", "deployment")
# What a user would ask next, with the kind of file or the measures that answer it
ASKED = {
    "prompts that name the concept": {"Acc_e", "target", "explicit", "target, object"},
    "prompts that mean it without naming it": {
        "Acc_g",
        "synonyms",
        "associations",
        "implicit",
        "held_out",
        "sentence, object",
    },
    "what stands beside it in a sentence": {"target, style", "target, background"},
    "other concepts": {"Acc_s", "elsewhere", "others", "tools kept", "other, object"},
    "attacks": {"attack"},
    "ways of use: merged, rounded, from a picture": {"step"},
}
BACK = 0.2  # from which rate on a way of use is named among those that bring a concept back


@dataclass(frozen=True, eq=False)
class Card:
    """What `html` and `markdown` show. grid: (prompt, before, after) for each pair of pictures. hidden: whether they
    are blurred. loading: (what for, code). measured: the table of `measured_of`.
    """

    edit: Edit
    grid: tuple[tuple[str, Image, Image], ...]
    hidden: bool
    loading: tuple[tuple[str, str], ...]
    measured: pd.DataFrame

    @property
    def title(self) -> str:
        """ "dog, erased by UCE"."""
        method = self.edit.metadata.get("method", "an unknown method")
        return f"{', '.join(self._concepts('erase')) or 'nothing named'}, erased by {METHOD_NAMES.get(method, method)}"

    @property
    def about(self) -> str:
        """The first paragraph of the method's own description: paper and status."""
        module = METHODS.get(self.edit.metadata.get("method"))
        return " ".join(module.__doc__.partition("\n\n")[0].split()) if module else ""

    def facts(self) -> dict[str, str]:
        """{what: value}, in words."""
        told, concepts = self.edit.metadata, self._concepts
        config = told.get("config") or {}
        settings = (
            ", ".join(f"{name} = {value!r}" for name, value in config.items())
            if isinstance(config, dict)
            else ""
        )
        versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
        return {
            "erased": ", ".join(concepts("erase")) or "nothing named",
            "put in its place": ", ".join(one.strip() or "the empty prompt" for one in concepts("anchor"))
            or "what the method puts there",
            "held in place": ", ".join(concepts("preserve")) or "nothing named",
            "edit": self.edit.summary().partition("; ")[2],
            "settings": settings or "none noted",
            "model": f"{told.get('source') or 'a pipeline in memory'}, fingerprint {told['base']}",
            "digest of the edit": self.edit.digest,
            "made with": versions,
            "licence": told.get("license", "not noted"),
        }

    def limits(self) -> list[str]:
        """In words: what this edit does not do, with the numbers that say so."""
        found = [
            "Whoever has the unedited weights has the concept: this edit protects a service, not a model that others "
            "download."
        ]
        if self.edit.kind in filters.KINDS:
            found.append(
                "It changes no weight: it acts where erasekit draws and cannot be exported; whoever runs the model can "
                "leave it out."
            )
        rows = self.measured
        attacks = rows[rows["attack"].notna() & rows["measure"].eq("attack")].sort_values(
            "rate", ascending=False
        )
        if len(attacks):
            told = [
                f"{row['attack']} {_short(row['after'])}"
                + (f" (by chance {_short(row['control'])})" if row["control"] else "")
                for row in attacks.to_dict("records")
            ]
            found.append(f"Pictures in which it is seen after an attack: {', '.join(told)}.")
        used = rows[rows["step"].notna() & rows["measure"].eq("target")]
        if len(used):
            back = used[used["rate"] >= BACK].sort_values("rate", ascending=False).to_dict("records")
            worst = "; ".join(f"{row['step']} ({_short(row['after'])})" for row in back)
            found.append(f"Of {len(used)} ways of use these bring it back: {worst or 'none'}.")
        there = set(rows["measure"]) | ({"step"} if rows["step"].notna().any() else set())
        if missing := [question for question, measures in ASKED.items() if not measures & there]:
            found.append(f"Not measured: {'; '.join(missing)}.")
        return found

    def html(self) -> str:
        """The page, with the pictures inside."""
        e = html.escape
        rows = lambda pairs: "".join(f"<tr><th>{e(a)}</th><td>{e(b)}</td></tr>" for a, b in pairs)
        shown = "".join(
            f'<figure><div><img src="{_data(before)}" alt="before"><img src="{_data(after)}" alt="after"></div>'
            f"<figcaption>{e(prompt)}</figcaption></figure>"
            for prompt, before, after in self.grid
        )
        code = "".join(f"<h3>{e(what)}</h3><pre>{e(text)}</pre>" for what, text in self.loading)
        body = [
            f"<h1>{e(self.title)}</h1><p>{e(self.about)}</p>",
            f"<table class=facts>{rows(self.facts().items())}</table>",
            f"<h2>Before and after</h2><p>{e(self._caption)}</p><div class=grid>{shown}</div>"
            if shown
            else "",
            f"<h2>Loading it</h2>{code}",
            f"<h2>What was measured</h2>{self._tables_html()}",
            f"<h2>Limits</h2><ul>{''.join(f'<li>{e(line)}</li>' for line in self.limits())}</ul>",
        ]
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{e(self.title)}</title><style>{STYLE}</style>'
            f"<main>{''.join(body)}</main></html>\n"
        )

    def markdown(self, pictures: str = "") -> str:
        """The same for a hub's model page, with its header. pictures: the file of the mosaic, left out when empty."""
        cell = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
        source = self.edit.metadata.get("source")
        head = ["---", "library_name: diffusers", "license: other", "tags: [concept-erasure, erasekit]"]
        if source and "/" in source and not Path(source).exists():
            head.append(f"base_model: {source}")
        lines = [*head, "---", "", f"# {self.title}", "", self.about, "", "| | |", "|---|---|"]
        lines += [f"| {cell(a)} | {cell(b)} |" for a, b in self.facts().items()]
        if pictures and self.grid:
            lines += ["", "## Before and after", "", self._caption, "", f"![before and after]({pictures})"]
            lines += [f"{i}. {prompt}" for i, (prompt, *_) in enumerate(self.grid, 1)]
        lines += ["", "## Loading it"]
        for what, text in self.loading:
            lines += ["", f"{what}:", "", "```python", text, "```"]
        lines += ["", "## What was measured", ""]
        for name, table in self._tables():
            lines += [f"**{name}**", "", f"| {' | '.join(table)} |", "|---" * table.shape[1] + "|"]
            lines += [f"| {' | '.join(map(cell, row))} |" for row in table.itertuples(index=False)] + [""]
        lines += [self._star, ""] if len(self.measured) and self._star else []
        lines += [] if len(self.measured) else ["Nothing yet.", ""]
        return "\n".join([*lines, "## Limits", "", *(f"* {line}" for line in self.limits()), ""])

    def save(self, path: str | Path) -> Path:
        """Write the page; for Markdown also a mosaic of the pictures beside it. ValueError unless .html or .md."""
        path = Path(path)
        if path.suffix not in (".html", ".md"):
            raise ValueError(f"a card is written as .html or .md, not {path.name}")
        if path.suffix == ".html":
            write_atomically(path, self.html())
            return path
        sheet = path.with_suffix(".png")
        if self.grid:
            _, before, after = zip(*self.grid, strict=True)
            with replacing(sheet) as temporary:
                Pictures.fromarray(mosaic([before, after])).save(temporary, "PNG")
        write_atomically(path, self.markdown(sheet.name if self.grid else ""))
        return path

    @property
    def _caption(self) -> str:
        hidden = " Blurred: they may show what was erased." if self.hidden else ""
        return f"Left without the edit, right with it, from the same noise.{hidden}"

    def _concepts(self, role: str) -> list[str]:
        return self.edit.metadata.get("concepts", {}).get(role, [])

    def _tables(self) -> list[tuple[str, pd.DataFrame]]:
        """(heading, table) of protocols, attacks and ways of use, in words; files of another edit carry a star."""
        rows = self.measured.assign(
            file=self.measured["file"] + self.measured["exact"].map({True: "", False: " *"})
        )
        used, attacked = rows["step"].notna(), rows["attack"].notna()
        found = []
        if len(part := rows[~used & ~attacked]):
            protocols = part["protocol"] + "-" + part["hash"]
            found.append(("Protocols", _columns(part, what="what", before="unedited", after="edited").assign(
                protocol=protocols.tolist(), file=part["file"].tolist())))  # fmt: skip
        if len(part := rows[attacked]):
            raw = part[part["measure"] == "raw"].set_index("file")["after"]
            part = part[part["measure"] == "attack"]
            names = {"attack": "attack", "after": "after the attack", "control": "by chance"}
            table = _columns(part, **names).assign(file=part["file"].tolist())
            table.insert(1, "as asked", part["file"].map(raw).tolist())
            found.append(("Attacks: pictures in which it is seen", table))
        if len(part := rows[used]):
            aimed, others = (part[part["measure"] == name] for name in ("target", "others"))
            table = _columns(aimed, step="way of use", before="seen, unedited", after="seen, edited")
            kept = others.drop_duplicates("step").set_index("step")["after"]
            table["others right, edited"] = [kept.get(step, "") for step in aimed["step"]]
            files = ", ".join(dict.fromkeys(part["file"]))
            found.append((f"Ways of use ({files})", table))
        return found

    def _tables_html(self) -> str:
        parts = []
        for name, table in self._tables():
            shown = table.to_html(index=False, border=0, escape=True)
            folded = len(table) > 12
            begin, end = ("<details><summary>", "</summary>") if folded else ("<h3>", "</h3>")
            parts.append(f"{begin}{html.escape(name)}{end}{shown}{'</details>' if folded else ''}")
        listed = "".join(
            f"<li><code>{html.escape(one)}</code></li>" for one in self.measured["command"].unique()
        )
        commands = f"<details><summary>Commands</summary><ul>{listed}</ul></details>"
        return (
            "".join(parts) + f"<p>{html.escape(self._star)}</p>{commands}" if parts else "<p>Nothing yet.</p>"
        )

    @property
    def _star(self) -> str:
        if self.measured["exact"].all():
            return ""
        return "* of another edit with the same method, settings and concepts, made on another machine or day"


def make(
    edit: Edit,
    model: DiffusionModel,
    *,
    prompts: str | Sequence[str] = (),
    seed: int = 0,
    results: Path = RESULTS,
    show: bool | None = None,
) -> Card:
    """A card of an edit, with pictures drawn by `model`.

    prompts: what is drawn; when empty the erased concepts by name and by their synonyms, then what was preserved, or
    others of a closed world. results: a folder of result files. show: pictures as they are, or blurred; None: as they
    are in a world of our own, else blurred. ValueError where the edit does not belong to the model, while an edit is in
    force, and where the edit names no concepts and no prompts are given.
    """
    model.check_unedited()
    asked = ([prompts] if isinstance(prompts, str) else list(prompts)) or _prompts(edit, model)
    if not asked:
        raise ValueError("this edit names no concepts to draw: give prompts=")
    seeds = [seed] * len(asked)
    before = model.generate(asked, seeds=seeds)
    with edit.applied(model):
        after = model.generate(asked, seeds=seeds)
    hidden = model.vocabulary is None if show is None else not show
    change = blurred if hidden else (lambda picture: picture)
    grid = tuple((p, change(a), change(b)) for p, a, b in zip(asked, before, after, strict=True))
    return Card(edit, grid, hidden, tuple(_loading(edit, model)), measured_of(edit, results))


def measured_of(edit: Edit, folder: Path = RESULTS) -> pd.DataFrame:
    """What the result files of a folder say of an edit, one row for each measurement: file, command, protocol, hash,
    attack, step, measure, what (in words), rate, before, after, control (texts, empty where there is none), exact
    (whether it is of this very edit; False: of one with the same method, settings and concepts).
    """
    columns = "file command protocol hash attack step measure what rate before after control exact".split()
    found = records.all_of(*KINDS, folder=folder)
    mine = {
        name: {
            label: made
            for label, made in one.edits.items()
            if made.digest == edit.digest or _same(one, made, edit)
        }
        for name, one in found.items()
    }
    beside = {}
    if any(mine.values()):
        beside = {
            (one.fingerprint, m.edit, *_where(m)): records.shown(m.value)
            for one in found.values()
            for m in one.measurements
            if m.edit in (records.ORIGINAL, records.NO_TEXT)
        }
    rows = [
        {
            "file": f"{name}.json",
            "command": found[name].command,
            "protocol": m.protocol,
            "hash": m.hash[:8],
            "attack": m.attack,
            "step": m.step,
            "measure": m.measure,
            "what": COUNTED[m.measure],
            "rate": m.value.get("rate", m.value.get("mean")),
            "before": beside.get((found[name].fingerprint, records.ORIGINAL, *_where(m)), ""),
            "after": records.shown(m.value),
            "control": beside.get((found[name].fingerprint, records.NO_TEXT, *_where(m)), ""),
            "exact": made.digest == edit.digest,
        }
        for name, edits in mine.items()
        for label, made in edits.items()
        for m in found[name].measurements
        if m.edit == label and m.measure in COUNTED
    ]
    return pd.DataFrame(rows, columns=columns)


def _where(m: records.Measurement) -> tuple:
    """What two measurements share that may stand side by side."""
    return m.protocol, m.hash, m.attack, m.step, m.measure


def _same(result: records.Result, made: records.EditMade, edit: Edit) -> bool:
    """Whether an edit of the same model was measured that has the same method, settings (those that came later by their
    defaults) and concepts.
    """
    told = edit.metadata
    config, known = told.get("config"), made.method in METHODS and made.method == told.get("method")
    if not known or not isinstance(config, dict) or result.fingerprint != told["base"]:
        return False
    defaults = records.plain(asdict(METHODS[made.method].Config()))
    concepts = told.get("concepts", {})
    return (
        defaults | made.config == defaults | config
        and set(made.erased) == set(concepts.get("erase", []))
        and made.preserved is not None
        and set(made.preserved) == set(concepts.get("preserve", []))
    )


def _columns(rows: pd.DataFrame, **names: str) -> pd.DataFrame:
    """Some columns under other names, without those that are empty."""
    table = rows[list(names)].rename(columns=names).reset_index(drop=True)
    return table.loc[:, (table != "").any()]


def _short(text: str) -> str:
    """ "3 of 151" of "3/151 = 2.0 % [0.7, 5.7]"."""
    return text.partition(" = ")[0].replace("/", " of ")


def _prompts(edit: Edit, model: DiffusionModel, most: int = 3) -> list[str]:
    """Of each kind at most so many."""
    concepts = edit.metadata.get("concepts", {})
    template = "a {} in flat style" if model.vocabulary is not None else "a picture of {}"
    known = {one.name: one for part in (model.vocabulary or {}).values() for one in part}
    erased = concepts.get("erase", [])[:most]
    words = [word for name in erased if name in known for word in known[name].synonyms][:most]
    others = [one.name for one in model.everything if one.name not in concepts.get("erase", [])]
    kept = ([name for name in concepts.get("preserve", []) if name != ""] or others)[:most]
    return [fill(template, one)[0] for one in [*erased, *words, *kept]]


def _loading(edit: Edit, model: DiffusionModel) -> list[tuple[str, str]]:
    """(what for, code) of each way that this kind of edit has."""
    source = f'"{edit.metadata["source"]}"' if edit.metadata.get("source") else "pipeline"
    begin = f'import erasekit as ek\n\nmodel, edit = ek.load({source}), ek.Edit.load("edit.safetensors")\n'
    found = [("With erasekit", f'{begin}with edit.applied(model):\n    model.generate(["..."])')]
    if edit.kind in filters.KINDS:
        return found
    if edit.kind == "text_encoder":
        code = 'edit.to_text_encoder("encoder", model=model)\n\n# in any pipeline with this text encoder\n'
        code += "from transformers import CLIPTextModel\n\n"
        code += 'pipeline.text_encoder = CLIPTextModel.from_pretrained("encoder").to(pipeline.device)'
        return [*found, ("In a stock diffusers pipeline, as a text encoder", code)]
    changed = (name.split(".")[:-1] for name in edit.tensors if "." in name and edit.kind == "weight_delta")
    owners = (model.pipeline.components[part].get_submodule(".".join(path)) for part, *path in changed)
    if all(type(owner) is nn.Linear for owner in owners) and hasattr(model.pipeline, "load_lora_weights"):
        code = 'edit.to_lora("lora", model=model)\n\n# in a stock pipeline with the same weights\n'
        code += 'pipeline.load_lora_weights("lora", weight_name="pytorch_lora_weights.safetensors")'
        found.append(("In a stock diffusers pipeline, as a LoRA", code))
    code = 'edit.merged(model).save_pretrained("folder")\n\n# anywhere\nfrom diffusers import DiffusionPipeline\n\n'
    return [*found, ("As a whole model", f'{code}DiffusionPipeline.from_pretrained("folder")')]


def _data(picture: Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2129; background: #fff; margin: 0 }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem }
h1 { line-height: 1.2 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd }
h3 { font-size: 1rem; margin-bottom: .3rem } table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid #eee; vertical-align: top }
td { overflow-wrap: anywhere }
.facts th { white-space: nowrap; width: 10rem }
pre { background: #f5f6f8; padding: .7rem; overflow-x: auto; font-size: .85rem }
code { font-size: .85rem; overflow-wrap: anywhere }
.grid { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0 } figure div { display: flex; gap: 2px }
img { width: 128px; height: 128px; object-fit: contain; image-rendering: pixelated }
figcaption { font-size: .8rem; max-width: 258px } summary { cursor: pointer; font-weight: 600 }
@media (prefers-color-scheme: dark) { body { background: #16181d; color: #e4e6eb } pre { background: #22252c }
  th, td { border-color: #2c3038 } h2 { border-color: #3a3f48 } }
"""
