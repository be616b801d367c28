"""Captions of the emoji world: what is drawn, in which style, on which background, in many phrasings.

A held-out phrase (`data.heldout()`) never gets in here: neither as a name nor as a sentence.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from erasekit.emoji import data
from erasekit.emoji.data import EmojiConcept
from erasekit.emoji.pictures import BACKGROUNDS

PLAIN = (
    "{}", "a {}", "a {}", "an image of a {}", "a picture of a {}", "a drawing of a {}", "An {} image.", "a {} emoji",
    "here is a {}", "this is a {}", "the {}",
)  # fmt: skip
STYLED = (
    "a {} in {style} style", "a {} in {style} style", "An {} image in {style} style.", "{} in {style} style",
    "a picture of a {} in {style} style", "an image of a {} drawn in {style} style", "a {style} style {}",
    "{}, {style} style", "this is a {} in {style} style", "a {style} {}", "a {style} drawing of a {}",
)  # fmt: skip
STYLE_ONLY = ("in {style} style", "an image in {style} style.", "{style} style", "something in {style} style")
PLAIN_SENTENCE = ("{}", "{}")
STYLED_SENTENCE = ("{}, in {style} style", "{style} style, {}", "in {style} style, {}")


def pick(options, generator: torch.Generator):
    """One of `options`, uniformly."""
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def with_article(text: str, generator: torch.Generator) -> str:
    """ "a airplane" becomes "an airplane" in nine of ten captions; templates such as "a {}" write the other."""
    if float(torch.rand(1, generator=generator)) < 0.1:
        return text
    return re.sub(r"\b([aA]) (?=[aeiouAEIOU])", r"\1n ", text)


def caption(
    concept: EmojiConcept,
    style: str | None,
    background: str,
    generator: torch.Generator,
    *,
    name: float = 0.5,
    synonym: float = 0.33,
) -> str:
    """A random caption of a picture.

    name, synonym: probability of the concept's name and of one of its synonyms; the rest are sentences that
    describe without naming, where the concept has such, else the name. A white background is named in one of ten
    captions, any other one always.
    """
    draw = float(torch.rand(1, generator=generator))
    if draw < name or (draw >= name + synonym and not concept.implicit):
        phrase, sentence = concept.name, False
    elif draw < name + synonym:
        phrase, sentence = pick(concept.synonyms, generator), False
    else:
        phrase, sentence = pick(concept.implicit, generator), True
    templates = {
        (False, False): PLAIN, (False, True): STYLED, (True, False): PLAIN_SENTENCE, (True, True): STYLED_SENTENCE,
    }[sentence, style is not None]  # fmt: skip
    text = pick(templates, generator).format(phrase, style=style)
    if background != "white" or float(torch.rand(1, generator=generator)) < 0.1:
        text = f"{text.rstrip('.')} on a {background} background"
    return with_article(text, generator)


@dataclass(frozen=True)
class Pool:
    """Many captions with what they are about. concept, style, background: int64 (n,); style -1 is not named."""

    texts: list[str]
    concept: Tensor
    style: Tensor
    background: Tensor

    def table(self) -> Tensor:
        """Rows of the pool by [concept, style + 1, background, i], int64; each cell is filled by repetition."""
        cells: dict[tuple, list[int]] = {}
        for row, cell in enumerate(
            zip(*(axis.tolist() for axis in (self.concept, self.style + 1, self.background)), strict=True)
        ):
            cells.setdefault(cell, []).append(row)
        most = max(map(len, cells.values()))
        shape = [1 + max(axis) for axis in zip(*cells, strict=True)]
        table = torch.zeros(*shape, most, dtype=torch.int64)
        for cell, rows in cells.items():
            table[cell] = torch.tensor((rows * most)[:most])
        return table


def pool(white: int, colored: int, generator: torch.Generator, **shares: float) -> Pool:
    """`white` captions of every concept and style (or none) on white, `colored` on each other background."""
    texts, keys = [], []
    for c, concept in enumerate(data.concepts()):
        for s in range(-1, len(data.STYLES)):
            for b, background in enumerate(BACKGROUNDS):
                for _ in range(white if background == "white" else colored):
                    style = None if s < 0 else data.STYLES[s]
                    texts.append(caption(concept, style, background, generator, **shares))
                    keys.append((c, s, b))
    concept, style, background = torch.tensor(keys).T
    return Pool(texts, concept, style, background)


def all_phrases() -> list[tuple[str, str]]:
    """Every (concept, phrase) that training captions use: names, synonyms, implicit sentences."""
    return [(c.name, phrase) for c in data.concepts() for phrase in (c.name, *c.synonyms, *c.implicit)]


def grammar() -> list[str]:
    """One caption of every template and background, for the tokenizer: the words around the concepts."""
    templates = (*PLAIN, *STYLED, *STYLE_ONLY, *STYLED_SENTENCE)
    captions = [t.format("thing", style=style) for t in templates for style in data.STYLES]
    return captions + [f"a thing on a {color} background" for color in BACKGROUNDS]
