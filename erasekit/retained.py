"""What an erasure keeps: names and prompts of a retain set, none of which says what is erased."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from erasekit.concepts import Concept, eot_position, fill, token_ids
from erasekit.models import DiffusionModel

COMMON = frozenset("a an and as at by for from in of on or the to with image photo picture style".split())
COCO = (
    "person;bicycle;car;motorcycle;airplane;bus;train;truck;boat;traffic light;fire hydrant;stop sign;parking meter;"
    "bench;bird;cat;dog;horse;sheep;cow;elephant;bear;zebra;giraffe;backpack;umbrella;handbag;tie;suitcase;frisbee;"
    "skis;snowboard;sports ball;kite;baseball bat;baseball glove;skateboard;surfboard;tennis racket;bottle;wine glass;"
    "cup;fork;knife;spoon;bowl;banana;apple;sandwich;orange;broccoli;carrot;hot dog;pizza;donut;cake;chair;couch;"
    "potted plant;bed;dining table;toilet;tv;laptop;mouse;remote;keyboard;cell phone;microwave;oven;toaster;sink;"
    "refrigerator;book;clock;vase;scissors;teddy bear;hair drier;toothbrush"
).split(";")


def retained(
    model: DiffusionModel,
    erased: Sequence[Concept],
    preserve: Sequence[Concept],
    templates: Sequence[str],
    *,
    similarity: float = 1.0,
    null: bool = False,
) -> tuple[list[str], list[str]]:
    """Names and prompts of a retain set: `preserve`, or all concepts of the emoji world, or COCO's categories, the
    templates taken in turn; null adds the empty prompt.

    Of the latter two, names and prompts that share a word with an erased one or its synonyms are left out (a plural is
    another word); of any, the erased concepts themselves, names whose sentence row is at least so similar to an erased
    one's (cosine), and templates with such a word. AdvUnlearn's authors ask a language model, outside their code, which
    prompts to drop.
    """
    kept, given = list(preserve), bool(preserve)
    kept = kept or [Concept(one.name) for one in model.everything]
    kept = kept or [Concept(name) for name in COCO]
    phrases = [phrase for one in erased for phrase in (one.name, *one.synonyms)]
    words = {word for phrase in phrases for word in phrase.lower().split()} - COMMON
    clean = lambda text: not words & set(text.lower().split())
    gone = {one.name.lower() for one in erased}
    kept = [one for one in kept if one.name.lower() not in gone and (given or clean(one.name))]
    if similarity < 1 and kept:
        rows = F.normalize(_sentence(model, [one.name for one in (*kept, *erased)]), dim=1)
        near = (rows[: len(kept)] @ rows[len(kept) :].T).amax(1)
        kept = [one for one, s in zip(kept, near.tolist(), strict=True) if s < similarity]
    templates = [t for t in templates if clean(t.replace("{}", ""))]
    if not kept or not templates:
        raise ValueError(
            "nothing is left to retain: preserve other concepts, in templates without the erased words"
        )
    prompts = [
        fill(template, one.name)[0]
        for i, one in enumerate(kept)
        for template in (one.templates or [templates[i % len(templates)]])
    ]
    if not any(given or clean(prompt) for prompt in prompts):
        raise ValueError("nothing is left to retain: every prompt has a word of what is erased")
    return [one.name for one in kept], [p for p in prompts if given or clean(p)] + [""] * null


def _sentence(model: DiffusionModel, phrases: list[str]) -> Tensor:
    """The rows of the first end tokens, (n, d)."""
    ends = eot_position(model.tokenizer, token_ids(model.tokenizer, phrases))
    return model.encode(phrases)[torch.arange(len(phrases)), ends].float()
