"""RECE against its own attack: how often does the derived embedding draw what was erased?

    python -m erasekit.experiments.regeneration church --preserve castle --out data/results/rece_church.json

For the map T_k after every round k (round 0 is UCE), on the emoji world:

    attack        the concept's prompts, each row c of their embeddings replaced by the c' that is derived from T_k
    attack_after  the embeddings of `attack`, drawn by T_(k+1), which has erased the rows derived from the concept

and for UCE and for the last round:

    target        the concept's prompts as they are
    synonyms      prompts by the concept's synonyms, trained and held out
    others        prompts about everything else
    harmonic_mean of 1 - target, others and 1 - synonyms: H_o of MACE (Lu et al., CVPR 2024)

The attacker knows both models, and maps the prompt alone: the unconditional embedding goes in as it is.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from erasekit.closed_form import weight_gram
from erasekit.edits import Edit
from erasekit.emoji import data
from erasekit.evaluate import runs, world
from erasekit.evaluate.metrics import harmonic_mean
from erasekit.evaluate.protocols import Measure, Prompt, Protocol
from erasekit.evaluate.records import ORIGINAL, EditMade, Result, measurements, save
from erasekit.layers import cross_attention_kv
from erasekit.methods import rece
from erasekit.models import DiffusionModel, load


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """At most `count` of the prompts, evenly spaced."""
    step = max(1.0, len(prompts) / count)
    return [prompts[int(i * step)] for i in range(min(count, len(prompts)))]


def prompts_about(erased: Sequence[str]) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """Prompts of the erased concepts or styles, of their synonyms, and of everything else."""
    everything = world.grid()
    target = [p for p in everything if p.concept in erased or p.style in erased]
    phrases = [(c.name, word) for c in data.concepts() if c.name in erased for word in c.synonyms]
    phrases += [(h.concept, h.text) for h in data.heldout() if h.concept in erased and h.kind == "synonym"]
    synonyms = [
        Prompt(f"a {word} in {style} style", name, style) for name, word in phrases for style in data.STYLES
    ]
    return target, synonyms, [p for p in everything if p not in target]


def protocol(erased: Sequence[str], pictures: int = 200, steps: int = world.STEPS) -> Protocol:
    """The pictures of the module's table: prompts with the roles target, others and synonyms, and what is counted."""
    target, synonyms, others = prompts_about(erased)
    target = spread(target, pictures)
    seeds = range(-(-pictures // len(target)))
    prompts = [replace(p, role="target", seed=seed) for seed in seeds for p in target]
    for role, part in (("others", others), ("synonyms", synonyms)):
        prompts += [replace(p, role=role) for p in spread(part, pictures)]
    style = set(erased) <= set(data.STYLES)
    how = {"judge": "emoji-style", "asked": "style"} if style else {"judge": "emoji-object"}
    measures = [Measure(role, (role,), **how) for role in dict.fromkeys(p.role for p in prompts)]
    name = "emoji-regeneration"
    return Protocol(name, tuple(prompts), tuple(measures), steps=steps, erased=tuple(erased))


def measure(
    model: DiffusionModel,
    erase: str | Sequence[str],
    preserve: Sequence[str] = (),
    *,
    pictures: int = 200,
    config: rece.Config | None = None,
    skip_before: bool = False,
    steps: int = world.STEPS,
    folder: Path = runs.RUNS,
    progress: bool = False,
    command: str = "",
) -> Result:
    """The module's table, `pictures` of each kind (synonyms: as many as there are, once each, at most); the edits are
    called "round 0", which is UCE, "round 1", ...
    """
    config = config or rece.PRESETS["emoji"]
    states: list[dict] = []
    edit = rece.fit(model, erase, preserve, config=config, callback=states.append)
    erased = [concept.name for concept in model.concepts(erase)]
    asked = protocol(erased, pictures, steps)
    aimed = tuple(p for p in asked.prompts if p.role == "target")
    attacked = replace(asked, prompts=aimed, measures=asked.measures[:1])

    verdicts: dict[str, dict] = {}  # by edit and measure

    def rates(edit: str, name: str, attack: torch.Tensor) -> dict:
        run = runs.run(model, None, attacked, attack=attack, folder=folder, progress=progress)
        verdicts.setdefault(edit, {})[name] = run.verdicts()["target"]
        return {name: run.measured()["target"]}

    def without_attack(edit: str) -> dict:
        run = runs.run(model, None, asked, folder=folder, progress=progress)
        verdicts.setdefault(edit, {}).update(run.verdicts())
        return run.measured()

    found = [] if skip_before else measurements(without_attack(ORIGINAL), asked)
    gram = weight_gram(layer.weight for layer in cross_attention_kv(model.unet).values())
    eye = torch.eye(gram.shape[0], dtype=torch.float64)
    edits, rounds, previous = {}, [], None
    for state in states:
        t = state["context_map"]
        attack = rece.derive(t, gram, eye, config.lam).T
        edit_k = Edit.from_context_map(
            t, model, method="rece", config=config, concepts=edit.metadata["concepts"]
        )
        label, row = f"round {state['step']}", {}
        own = replace(EditMade.of(edit_k, rece.PRESETS["emoji"]), erased=tuple(erased))
        edits[label] = replace(own, config=own.config | {"epochs": state["step"]})
        with edit_k.applied(model):
            if state["step"] in (0, config.epochs):
                row |= without_attack(label)
                kept = [1 - row["target"]["rate"], row["others"]["rate"]]
                kept += [1 - row["synonyms"]["rate"]] if "synonyms" in row else []
                row["harmonic_mean"] = {"harmonic_mean": round(harmonic_mean(kept), 5)}
            row |= rates(label, "attack", attack)
            if previous is not None:
                before = rounds[-1]["edit"]
                found += measurements(rates(before, "attack_after", previous), asked, before)
        found += measurements(row, asked, label)
        residuals = {
            key: state[key]
            for key in ("erase_residual", "preserve_drift", "attack_residual", "norm_ratio")
            if key in state
        }
        rounds.append({"edit": label, "residuals": residuals})
        previous = attack
    return Result(
        command,
        "regeneration",
        **world.subject(model),
        erased=tuple(erased),
        machine=runs.machine(),
        edits=edits,
        measurements=tuple(found),
        details={"steps": steps, "guidance": world.GUIDANCE, "rounds": rounds, "verdicts": verdicts},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("concepts", nargs="+")
    parser.add_argument("--preserve", action="append", default=[])
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument(
        "--epochs",
        type=int,
        default=rece.PRESETS["emoji"].epochs,
        help="rounds of RECE (default: %(default)s)",
    )
    parser.add_argument("--pairs", choices=get_args(rece.Pairs), help="the preset's if absent")
    parser.add_argument(
        "--skip-before",
        action="store_true",
        help="do not draw the unedited model (data/emoji/report.json says what it can draw)",
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    kept = "".join(f" --preserve {json.dumps(name)}" for name in given.preserve)
    named = " ".join(json.dumps(name) for name in given.concepts)
    command = (
        f"python -m erasekit.experiments.regeneration {named}{kept} --pictures {given.pictures} "
        f"--epochs {given.epochs} {'--skip-before ' if given.skip_before else ''}"
        f"{f'--pairs {given.pairs} ' if given.pairs else ''}--out {given.out.as_posix()}"
    )
    preset = rece.PRESETS["emoji"]
    result = measure(
        load("emoji"),
        given.concepts,
        given.preserve,
        pictures=given.pictures,
        config=replace(preset, epochs=given.epochs, pairs=given.pairs or preset.pairs),
        skip_before=given.skip_before,
        progress=True,
        command=command,
    )
    save(result, given.out)


if __name__ == "__main__":
    main()
