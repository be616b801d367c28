"""Draw the emoji world's prompts and let the judge say what is on the pictures."""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from erasekit.edits import Edit
from erasekit.emoji import data, judge
from erasekit.evaluate.metrics import rate, separated
from erasekit.models import DiffusionModel
from erasekit.paths import BUILD, write_atomically

STEPS, GUIDANCE = 25, 3.0


@dataclass(frozen=True)
class Prompt:
    """A prompt and what a right picture of it shows; style None: any."""

    text: str
    concept: str
    style: str | None


def grid(
    concepts: Sequence[str] | None = None,
    styles: Sequence[str] = data.STYLES,
    template: str = "a {} in {} style",
) -> list[Prompt]:
    """Every concept (all when None) in every style."""
    names = [c.name for c in data.concepts()] if concepts is None else concepts
    return [Prompt(template.format(name, style), name, style) for name in names for style in styles]


def machine() -> dict[str, str | int]:
    """What a timing depends on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def judged(
    model: DiffusionModel,
    prompts: Sequence[Prompt],
    seeds: Sequence[int] = (0,),
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    attack: torch.Tensor | None = None,
    folder: Path = BUILD / "judged",
    progress: bool = False,
) -> pd.DataFrame:
    """One row per prompt and seed: concept, style, prompt, seed, shown and drawn_style (the judge's first choices),
    probability (of the concept).

    attack: a (d, d) matrix G; the prompts' embeddings x, as rows, are replaced by x G^T. Applied edits count. Rows are
    kept in `folder` in pieces of 130 pictures, under a hash of model, judge, edits, prompts and settings: an
    interrupted run goes on where it stopped, and a repeated one draws nothing.
    """
    pairs = [(prompt, seed) for seed in seeds for prompt in prompts]
    settings = [
        model.fingerprint(),
        model.vae_fingerprint(),
        judge.fingerprint(),
        [edit.digest for edit in model._active],
        steps,
        guidance,
    ]
    if attack is not None:
        settings.append(hashlib.sha256(attack.double().contiguous().numpy().tobytes()).hexdigest())
    frames = []
    for start in range(0, len(pairs), 130):
        part = pairs[start : start + 130]
        key = settings + [[p.text, p.concept, p.style, seed] for p, seed in part]
        file = folder / (hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24] + ".json")
        if not file.exists():
            write_atomically(file, _draw(model, part, steps, guidance, attack, progress))
        frames.append(pd.read_json(file, orient="records", dtype={"seed": int}))
    return pd.concat(frames, ignore_index=True)


def _draw(model, pairs, steps, guidance, attack, progress) -> str:
    texts, seeds = [p.text for p, _ in pairs], [s for _, s in pairs]
    settings = {"steps": steps, "guidance": guidance, "progress": progress}
    if attack is None:
        pictures = model.generate(texts, seeds, **settings)
    else:
        embeddings = (model.encode(texts).double() @ attack.double().T).float()
        pictures = model.draw(embeddings, seeds, **settings)
    names = [c.name for c in data.concepts()]
    objects, styles = judge.probabilities(pictures)
    rows = [
        {
            "concept": prompt.concept,
            "style": prompt.style,
            "prompt": prompt.text,
            "seed": seed,
            "shown": names[int(of_objects.argmax())],
            "drawn_style": data.STYLES[int(of_styles.argmax())],
            "probability": round(float(of_objects[names.index(prompt.concept)]), 5),
        }
        for (prompt, seed), of_objects, of_styles in zip(pairs, objects, styles, strict=True)
    ]
    return json.dumps(rows)


def object_rate(table: pd.DataFrame) -> dict:
    """Share of pictures on which the judge sees the concept of the prompt."""
    return rate(int((table.shown == table.concept).sum()), len(table))


def style_rate(table: pd.DataFrame) -> dict:
    """Share of pictures on which the judge sees the style of the prompt."""
    return rate(int((table.drawn_style == table["style"]).sum()), len(table))


def erasure(before: pd.DataFrame, after: pd.DataFrame, erased: Sequence[str]) -> dict:
    """What an edit did to the erased concepts or styles and to the rest, on the same prompts and seeds.

    Two rows of rates, "before" and "after": target (the judge still sees what was erased) and others (it sees the
    right object, or for an erased style the right style, on the remaining prompts).
    """
    if list(before.prompt) != list(after.prompt) or list(before.seed) != list(after.seed):
        raise ValueError("before and after must be the same prompts and seeds in the same order")
    styles = set(erased) <= set(data.STYLES)
    column, measure = ("style", style_rate) if styles else ("concept", object_rate)
    result: dict = {"erased": list(erased)}
    for name, table in (("before", before), ("after", after)):
        target = table[column].isin(erased)
        if not target.any():
            raise ValueError(f"none of the prompts is about {', '.join(erased)}")
        result[name] = {"target": measure(table[target]), "others": measure(table[~target])}
        if styles:
            result[name]["objects"] = object_rate(table)
    result["others_fall"] = round(result["before"]["others"]["rate"] - result["after"]["others"]["rate"], 5)
    return result


def measure(model: DiffusionModel, edit: Edit, *, target_pictures: int = 50, progress: bool = False) -> dict:
    """`erasure` of an edit of the emoji model over the whole world.

    All concepts in all styles with seed 0; prompts of the erased concepts with further seeds, until there are at least
    `target_pictures` of them. Rates before the edit are drawn once and reused.
    """
    named = model.concepts(edit.metadata["concepts"]["erase"])
    erased = [concept.name for concept in named]
    everything = grid()
    aimed = [p for p in everything if p.concept in erased or p.style in erased]
    if not aimed:
        raise ValueError(f"no concept or style of the emoji world is called {', '.join(erased)}")
    more = range(1, -(-target_pictures // len(aimed)))
    draw = lambda: pd.concat(
        [judged(model, everything, [0], progress=progress)]
        + ([judged(model, aimed, more, progress=progress)] if more else []),
        ignore_index=True,
    )
    before = draw()
    with edit.applied(model):
        after = draw()
    result = erasure(before, after, erased)
    target = [result[when]["target"] for when in ("before", "after")]
    return {
        "fingerprint": model.fingerprint(),
        "vae": model.vae_fingerprint(),
        "judge": judge.fingerprint(),
        "method": edit.metadata["method"],
        "config": edit.metadata["config"],
        "preserve": edit.metadata["concepts"]["preserve"],
        **result,
        "target_intervals_separate": separated(*target),
        "edit_bytes": edit.nbytes,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "machine": machine(),
    }
