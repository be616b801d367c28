"""Closed worlds: folders with a model, the words that it was trained on, and the SHA-256 of its files.

FOLDER/model/            a diffusers folder, which `load` reads by the world's name
FOLDER/words.json        {"concepts": {name: [synonym, ...]}, "styles": {name: [template, ...]},
                          "sets": {name: [name of a concept, ...]}}
FOLDER/SHA256SUMS.json   {file: SHA-256}
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from erasekit.concepts import Concept
from erasekit.paths import EMOJI

WORLDS = {"emoji": EMOJI}  # name -> folder; the name is also that of the methods' presets for it
STEPS = {"emoji": 10}  # of the sampler in its model folder: benchmarks/samplers.py
WORDS = "words.json"
CHECKSUMS = "SHA256SUMS.json"


def verified(name: str, folder: Path = EMOJI) -> bytes:
    """Contents of a shipped data file; ValueError when its SHA-256 is not the recorded one, or none is recorded."""
    content = (folder / name).read_bytes()
    if (expected := json.loads((folder / CHECKSUMS).read_text()).get(name)) is None:
        raise ValueError(
            f"{folder / name} is not a file of this world ({CHECKSUMS} does not list it): move it away"
        )
    if (found := hashlib.sha256(content).hexdigest()) != expected:
        raise ValueError(
            f"{folder / name} is damaged (SHA-256 {found[:12]}, expected {expected[:12]}): "
            f"restore it with `git checkout -- data/emoji/{name}`"
        )
    return content


@cache
def _words(world: str) -> dict[str, dict[str, list[str]]]:
    return json.loads(verified(WORDS, WORLDS[world]))


@cache
def concepts(world: str) -> tuple[Concept, ...]:
    """All concepts of a closed world; none for a name that is no world's."""
    if world not in WORLDS:
        return ()
    return tuple(Concept(name, synonyms=tuple(words)) for name, words in _words(world)["concepts"].items())


@cache
def vocabulary(world: str) -> Mapping[str, tuple[Concept, ...]] | None:
    """{phrase: the concepts it stands for} in a closed world; None for a name that is no world's."""
    if world not in WORLDS:
        return None
    words, known = _words(world), {one.name: (one,) for one in concepts(world)}
    synonyms = {word: (Concept(word),) for one in concepts(world) for word in one.synonyms}
    sets = {name: tuple(known[one][0] for one in members) for name, members in words["sets"].items()}
    styles = {name: (Concept(name, tuple(templates)),) for name, templates in words["styles"].items()}
    phrases = {**synonyms, **sets, **styles, **known}
    return {" ".join(phrase.lower().split()): value for phrase, value in phrases.items()}
