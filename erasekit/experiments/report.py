"""How good the emoji world is: measure it and write data/emoji/report.json.

    python -m erasekit.experiments.report              # everything, about 15 minutes on two cores
    python -m erasekit.experiments.report --seeds 1    # a quick look; does not replace the report

An interrupted run goes on where it stopped. Every rate is {k, n, rate, low, high} with a 95 % Wilson interval.
"""

import argparse
import json
import resource
import time

import numpy as np
import pandas as pd
import torch

from erasekit.emoji import clip, data, judge
from erasekit.emoji.pictures import Placement, load_sprites, place
from erasekit.emoji.train import JUDGE_PLACEMENT, degrade
from erasekit.evaluate import runs, world
from erasekit.evaluate.metrics import rate
from erasekit.models import DiffusionModel, load
from erasekit.paths import EMOJI, write_atomically

SEEDS = 5
HELD_OUT_SEED = 20_000  # the training scripts use small seeds, so these augmentations were never seen


@torch.no_grad()
def real_pictures(copies: int, generator: torch.Generator, placement: Placement) -> tuple[torch.Tensor, ...]:
    """Held-out augmentations: (pictures, style index, concept index), `copies` of every sprite."""
    sprites = load_sprites()
    style, concept = torch.meshgrid(
        torch.arange(sprites.shape[0]), torch.arange(sprites.shape[1]), indexing="ij"
    )
    style, concept = style.flatten().repeat(copies), concept.flatten().repeat(copies)
    pictures = [
        place(sprites[s, c], placement, generator)[0]
        for s, c in zip(style.split(130), concept.split(130), strict=True)
    ]
    return torch.cat(pictures), style, concept


def about_real_pictures() -> dict:
    """Judge and zero-shot CLIP on held-out augmentations of real pictures."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    pictures, style, concept = real_pictures(4, generator, JUDGE_PLACEMENT)
    objects, styles = judge.probabilities(degrade(pictures, generator))
    found = {
        "judge_real_object": rate(int((objects.argmax(1) == concept).sum()), len(concept)),
        "judge_real_style": rate(int((styles.argmax(1) == style).sum()), len(style)),
    }
    pictures, _, concept = real_pictures(4, generator, Placement())
    names = clip.text_features([f"a {c.name}" for c in data.concepts()])
    guess = (clip.picture_features(pictures) @ names.T).argmax(1)
    return found | {"clip_zero_shot_object": rate(int((guess == concept).sum()), len(concept))}


def phrase_prompts(kind: str) -> list[world.Prompt]:
    """Synonyms in the captions' main form, implicit sentences in their own; the styles take turns."""
    if kind == "trained":
        phrases = [(c.name, synonym) for c in data.concepts() for synonym in c.synonyms]
    else:
        phrases = [(h.concept, h.text) for h in data.heldout() if h.kind == kind]
    form = "{}, in {} style" if kind == "implicit" else "a {} in {} style"
    return [
        world.Prompt(form.format(phrase, style), concept, style)
        for i, (concept, phrase) in enumerate(phrases)
        for style in (data.STYLES[i % len(data.STYLES)],)
    ]


def variety(model: DiffusionModel, count: int = 60, copies: int = 24) -> dict[str, float]:
    """Is a prompt one memorized picture? Root-mean-square pixel distances in [0, 1], averaged over `count` prompts:
    between two seeds, and from a generated picture to the nearest of `copies` random placements of its sprite.
    """
    generator = torch.Generator().manual_seed(HELD_OUT_SEED + 1)
    prompts = world.grid()
    chosen = [prompts[i] for i in torch.randperm(len(prompts), generator=generator)[:count].tolist()]
    a, b = (
        clip.to_tensor(model.generate([p.text for p in chosen], [seed], world.STEPS)) / 2 for seed in (0, 1)
    )
    sprites, names = load_sprites(), [c.name for c in data.concepts()]
    distance = lambda x, y: (x - y).square().mean((-3, -2, -1)).sqrt()
    nearest = []
    for picture, prompt in zip(a, chosen, strict=True):
        sprite = sprites[data.STYLES.index(prompt.style), names.index(prompt.concept)]
        training, _ = place(sprite.expand(copies, *sprite.shape), Placement(colored=0.0), generator)
        nearest.append(distance(training / 2, picture).min())
    return {
        "distance_between_seeds": round(distance(a, b).mean().item(), 4),
        "distance_to_nearest_training_picture": round(torch.stack(nearest).mean().item(), 4),
    }


def speed(model: DiffusionModel, repeats: int = 3) -> float:
    """Median seconds for 16 pictures of 25 guided steps."""
    prompts = [p.text for p in world.grid()[:16]]
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.generate(prompts, range(16), world.STEPS)
        times.append(time.perf_counter() - start)
    return round(float(np.median(times)), 2)


def protocols(seeds: int = SEEDS) -> dict[str, str]:
    """{key of the report: name and hash of the protocol} of the rates over generated pictures."""
    named = {
        "generated_object": (world.grid(), seeds),
        "generated_style": (world.grid(), seeds),
        "generated_synonym_trained": (phrase_prompts("trained"), 1),
        "generated_synonym_heldout": (phrase_prompts("synonym"), 1),
        "generated_implicit_heldout": (phrase_prompts("implicit"), 1),
    }
    return {key: world.protocol(prompts, range(n)).short for key, (prompts, n) in named.items()}


def measure(seeds: int = SEEDS, progress: bool = True) -> dict:
    """The whole report."""
    model = load("emoji")
    with runs.sampled_by(model, world.SAMPLER):
        return _measured(model, seeds, progress)


def _measured(model: DiffusionModel, seeds: int, progress: bool) -> dict:
    draw = lambda prompts, seeds=1: world.judged(
        model, prompts, range(seeds), sampler=world.SAMPLER, steps=world.STEPS, progress=progress
    )
    generated = draw(world.grid(), seeds)
    per_concept = (generated.shown == generated.concept).groupby(generated.concept).mean()
    seen_as = pd.crosstab(generated["style"], generated.drawn_style, normalize="index").round(3)
    size = sum(
        file.stat().st_size for file in EMOJI.rglob("*.safetensors") if "checkpoints" not in file.parts
    )
    return {
        **world.subject(model),
        "concepts": len(data.concepts()),
        "seeds": seeds,
        **about_real_pictures(),
        "generated_object": world.object_rate(generated),
        "generated_style": world.style_rate(generated),
        "generated_synonym_trained": world.object_rate(draw(phrase_prompts("trained"))),
        "generated_synonym_heldout": world.object_rate(draw(phrase_prompts("synonym"))),
        "generated_implicit_heldout": world.object_rate(draw(phrase_prompts("implicit"))),
        "protocols": protocols(seeds),
        "weights_mb": round(size / 1e6, 2),
        "seconds_16_pictures": speed(model),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        **variety(model),
        "object_rate_by_concept": {name: round(float(value), 3) for name, value in per_concept.items()},
        "style_seen_as": seen_as.to_dict("index"),
        "machine": world.machine(),
        "command": "python -m erasekit.experiments.report",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="pictures per concept and style")
    parser.add_argument("--no-write", action="store_true", help="print only")
    given = parser.parse_args()
    text = json.dumps(measure(given.seeds), indent=1)
    if given.seeds == SEEDS and not given.no_write:
        write_atomically(EMOJI / "report.json", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
