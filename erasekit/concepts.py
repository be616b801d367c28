"""Concepts, prompt templates, and token positions found from token ids (never from word counts)."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor
from transformers import CLIPTokenizer


@dataclass(frozen=True)
class Concept:
    """Something to erase, keep or replace.

    name: the phrase that stands for it in a prompt; white space around and between its words does not count.
    templates: prompts with one `{}` for the phrase; empty means the method's own. synonyms: other phrases for it.
    anchor: what to draw instead; None means the method's own. ValueError for anything that is not text.
    """

    name: str
    templates: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    anchor: str | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"a concept needs a name, got {self.name!r}")
        object.__setattr__(self, "name", " ".join(self.name.split()))
        check_templates(self.templates)
        if isinstance(self.synonyms, str) or not all(
            isinstance(one, str) and one.strip() for one in self.synonyms
        ):
            raise ValueError(f"synonyms are a sequence of phrases, got {self.synonyms!r}")
        if self.anchor is not None and not isinstance(self.anchor, str):
            raise ValueError(f"a concept's anchor is text, got {self.anchor!r}: give its name")
        for field in ("templates", "synonyms"):  # of a list as well: a Concept can be hashed
            object.__setattr__(self, field, tuple(getattr(self, field)))


def check_templates(templates: Sequence[str]) -> None:
    """ValueError unless every template is text with exactly one `{}`."""
    if isinstance(templates, str):
        raise ValueError(f"templates are a sequence of prompts, got the text {templates!r}")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"a template needs exactly one {{}}, got {template!r}")


def check_some_templates(*several: Sequence[str]) -> None:
    """`check_templates` of each, and ValueError for an empty one."""
    for templates in several:
        check_templates(templates)
        if not templates:
            raise ValueError("there must be at least one template")


def as_concepts(
    given: str | Concept | Sequence[str | Concept],
    vocabulary: Mapping[str, tuple[Concept, ...]] | None = None,
) -> tuple[Concept, ...]:
    """A text, a Concept, or a sequence of them, as a tuple of Concepts without repeats ("Dog" repeats "dog").

    With a vocabulary ({lower-case phrase: concepts}), a text must be one of its phrases and may stand for
    several concepts; a free phrase is passed as an explicit `Concept(...)`. Raises ValueError for an unknown
    phrase.
    """
    items = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    found: dict[Concept, Concept] = {}
    for item in items:
        if isinstance(item, Concept):
            named = (item,)
        elif not isinstance(item, str):
            raise ValueError(f"expected text or a Concept, got {type(item).__name__}")
        else:
            named = (Concept(item),) if vocabulary is None else _look_up(item, vocabulary)
        for one in named:
            found.setdefault(replace(one, name=one.name.lower()), one)
    return tuple(found.values())


def _look_up(phrase: str, vocabulary: Mapping[str, tuple[Concept, ...]]) -> tuple[Concept, ...]:
    key = " ".join(phrase.lower().split())
    if key not in vocabulary:
        close = difflib.get_close_matches(key, vocabulary, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ValueError(
            f"unknown concept {phrase!r}: {hint}use a name the model was trained on, "
            f"or Concept({phrase!r}) for a free phrase"
        )
    return vocabulary[key]


def check_learned_words(tokenizer) -> None:
    """ValueError for two textual inversions that differ in capitals alone: CLIP's tokenizer puts text in small letters,
    and which of the two it then finds changes with every tokenizer that is made.
    """
    if isinstance(tokenizer, CLIPTokenizer):
        spelt = {}
        for token in tokenizer.added_tokens_encoder:
            if (other := spelt.setdefault(token.lower(), token)) != token:
                raise ValueError(
                    f"{other!r} and {token!r} are one word to CLIP's tokenizer, and which of the two it takes is left "
                    "to chance: load one of them under another name (load_textual_inversion(..., token=...))"
                )


def _written_out(tokenizer, text: str) -> str:
    """`text` as a pipeline converts it: the token of a textual inversion of several vectors as all of its tokens."""
    added = tokenizer.added_tokens_encoder  # a property that builds a dict
    several = any(f"{token}_1" in added for token in added)
    return TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer) if several else text


def content_ids(tokenizer, text: str) -> list[int]:
    """Token ids of `text` without start and end tokens; a textual inversion of several vectors counts them all."""
    return tokenizer(_written_out(tokenizer, text), add_special_tokens=False, verbose=False).input_ids


def token_ids(tokenizer, prompts: Sequence[str]) -> Tensor:
    """Padded token ids, int64 (n, length), as Stable Diffusion feeds them; nothing is ever cut off.

    Raises ValueError for a prompt over the limit or with characters the tokenizer does not know, and as
    `check_learned_words`.
    """
    check_learned_words(tokenizer)
    limit = tokenizer.model_max_length
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is text, got {type(prompt).__name__}")
        content = content_ids(tokenizer, prompt)
        if len(content) + 2 > limit:
            raise ValueError(
                f"prompt has {len(content)} tokens, the limit is {limit - 2} (plus start and end): "
                f"shorten {prompt[:60]!r}"
            )
        if tokenizer.eos_token_id in content:
            raise ValueError(f"{prompt!r} has characters that the tokenizer does not know")
    written = [_written_out(tokenizer, prompt) for prompt in prompts]
    padded = tokenizer(written, padding="max_length", max_length=limit, return_tensors="pt")
    return padded.input_ids


def eot_position(tokenizer, ids: Tensor) -> Tensor:
    """Position of the first end-of-text token along the last dimension; padding repeats the same token."""
    is_eot = ids == tokenizer.eos_token_id
    if not is_eot.any(-1).all():
        raise ValueError("these token ids have no end-of-text token")
    return is_eot.to(torch.int64).argmax(-1)  # argmax returns the first of equal values


def subject_span(tokenizer, prompt: str, phrase: str) -> range:
    """Token positions of the first occurrence of `phrase` in `prompt`, counting the start token as 0.

    ValueError when the phrase is empty or is not a run of whole tokens of the prompt.
    """
    wanted = content_ids(tokenizer, phrase)
    if not wanted:
        raise ValueError("the phrase to find is empty")
    ids = token_ids(tokenizer, [prompt])[0].tolist()
    for start in range(1, len(ids) - len(wanted) + 1):
        if ids[start : start + len(wanted)] == wanted:
            return range(start, start + len(wanted))
    raise ValueError(f"{phrase!r} is not among the tokens of {prompt!r}")


def last_subject_token(tokenizer, prompt: str, phrase: str) -> int:
    """Position of the last token of the first occurrence of `phrase` in `prompt`."""
    return subject_span(tokenizer, prompt, phrase)[-1]


def fill(template: str, phrase: str) -> tuple[str, int]:
    """The prompt with `phrase` in the slot, and the number of characters before the slot.

    A blank phrase leaves the slot empty: `a {} in ink style` gives `a  in ink style`.
    """
    before, after = template.split("{}")
    return before + phrase.strip() + after, len(before)


def slot_token(tokenizer, template: str, phrase: str) -> int:
    """Position of the last token of `phrase` in the filled template.

    For a blank phrase: the token before the slot, which is the start token (0) where nothing comes before.
    """
    prompt, characters = fill(template, phrase)
    before, wanted = content_ids(tokenizer, prompt[:characters]), content_ids(tokenizer, phrase)
    ids = token_ids(tokenizer, [prompt])[0].tolist()
    end = 1 + len(before) + len(wanted)
    if ids[1:end] != before + wanted:
        raise ValueError(
            f"the tokens of {phrase!r} merge with their neighbors in {prompt!r}: put spaces around {{}}"
        )
    return end - 1


def slot_span(tokenizer, template: str, phrase: str) -> range:
    """Token positions of `phrase` in the filled template's slot; of a blank one, the token before the slot."""
    last, count = slot_token(tokenizer, template, phrase), len(content_ids(tokenizer, phrase))
    return range(last + 1 - max(count, 1), last + 1)
