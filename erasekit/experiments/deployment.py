"""What an edit of the emoji world survives: every step of `evaluate.deployment`, one result file for each edit.

    python -m erasekit.experiments.deployment dog --edit build/edits/uce_dog.safetensors --neighbour cat
        --out data/results/deployment_uce_dog.json

Measured with each step, on the same prompts and seeds:

    target     prompts by the concept's name: does the judge see it?
    others     where the step changes weights or sampler: a quarter so many prompts about everything else, is the right
               thing seen?

`details` has for each step and measure how many pictures changed sides against the same edit used as it is: "back"
(seen now, not before) and "gone", and under "verdicts" that of each picture (`records.about` reads those of one step).
Without an edit the same of the unedited model.

What the steps need beside the edit is made once for a concept and kept in build/deployment/: a sibling, the model
fine-tuned on real emoji of everything but the concept; the same as a LoRA of a smaller rank; and a word for the
concept, learned on the unedited model by textual inversion.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasekit.attacks import fine_tuning
from erasekit.edits import Edit
from erasekit.emoji import data
from erasekit.evaluate import deployment, runs, world
from erasekit.evaluate.protocols import deployment as protocol
from erasekit.evaluate.records import ORIGINAL, EditMade, Result, measurements, save
from erasekit.experiments import stages
from erasekit.methods import METHODS
from erasekit.models import DiffusionModel, copied, load
from erasekit.paths import BUILD, replacing
from erasekit.training import constant, optimize

UPDATES = 100  # of the sibling's fine-tuning
LEFT_OUT = 0.3  # of a layer's change by the LoRA, see `Edit.to_lora`
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def sibling(model: DiffusionModel, concept: str, folder: Path = BUILD) -> Edit:
    """The attention layers fine-tuned by the plain diffusion loss on real emoji of everything but the concept, as an
    edit of the unedited model.
    """
    place = folder / "deployment"
    file = place / f"sibling_{concept}.safetensors"
    if not file.exists():
        config = fine_tuning.PRESETS["emoji"]
        given = stages.stage(concept, 1).arguments(fine_tuning.run, model)
        tuned = DiffusionModel(copied(model.pipeline), model.preset)
        for name, parameter in tuned.unet.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[0].endswith(ATTENTION) and parameter.ndim == 2)
        loss = fine_tuning.objective(model, tuned, given["pictures"], given["captions"], config)
        optimize(
            "sibling", tuned.unet, loss, steps=UPDATES, peak=config.alpha, schedule=constant, decay=0.0,
            generator=torch.Generator().manual_seed(0), folder=place / f"sibling_{concept}", progress=True,
        )  # fmt: skip
        before = dict(model.unet.named_parameters())
        delta = {
            f"unet.{name}": (one.detach() - before[name].detach()).half()
            for name, one in tuned.unet.named_parameters()
            if one.requires_grad
        }
        about = {"erase": [], "anchor": [], "preserve": []}
        Edit.from_weight_delta(
            delta, model, method="fine-tuning", config={"updates": UPDATES}, concepts=about
        ).save(file)
    return Edit.load(file)


def word(model: DiffusionModel, concept: str, folder: Path = BUILD) -> Tensor | None:
    """(tokens, d), learned for the concept on the unedited model; None for what no single phrase names."""
    if concept == "weapon":
        return None
    file = folder / "deployment" / f"word_{concept}.safetensors"
    if not file.exists():
        rows = stages.attack("textual-inversion", model, model, stages.stage(concept, 5)).learned
        with replacing(file) as temporary:
            save_file({"rows": rows.contiguous()}, temporary)
    return load_file(file)["rows"]


def lora(model: DiffusionModel, tuned: Edit, concept: str, folder: Path = BUILD) -> Path:
    """The sibling as a file that stock diffusers loads."""
    return tuned.to_lora(folder / "deployment" / f"lora_{concept}", model=model, error=LEFT_OUT)


def measure(
    model: DiffusionModel,
    edit: Edit | None,
    concept: str,
    neighbour: str,
    *,
    pictures: int = 100,
    only: Sequence[str] = (),
    command: str = "",
    folder: Path = BUILD,
    progress: bool = False,
) -> Result:
    """The module's table. neighbour: see `deployment.steps`. only: names of steps, all when empty."""
    aimed, others = protocol(concept, pictures), protocol(concept, -(-pictures // 4), others=True)
    phrases = sorted({p.concept for p in aimed.prompts}) if concept not in data.STYLES else [concept]
    tuned = sibling(model, concept, folder)
    steps = deployment.steps(
        phrases, neighbour, number=aimed.steps, sibling=tuned, lora=lora(model, tuned, concept, folder),
        word=word(model, concept, folder),
    )  # fmt: skip
    if unknown := set(only) - steps.keys():
        raise ValueError(f"there is no step {', '.join(sorted(unknown))}: choose from {', '.join(steps)}")
    preset = edit and METHODS[edit.metadata["method"]].PRESETS["emoji"]
    edits = {(one := EditMade.of(edit, preset)).label: one} if edit else {}
    label = next(iter(edits), ORIGINAL)
    plain, found, moved, refused, verdicts = {}, [], {}, {}, {}
    for name, step in steps.items():
        whole = step is None or step.group in ("weights", "sampler")
        for asked in (aimed, others) if whole else (aimed,):
            if only and name not in (deployment.AS_IT_IS, *only):
                continue
            if edit is None and step is not None and step.of_edit:
                continue
            try:
                run = runs.run(
                    model, edit, asked, step=step, folder=folder / runs.RUNS.name, progress=progress
                )
            except deployment.NoMeaning as error:
                refused[name] = str(error)
                continue
            (counted,) = asked.measures
            seen = run.values(counted)
            before = plain.setdefault(counted.name, seen)
            found += measurements(run.measured(), asked, label, step=name)
            verdicts.setdefault(name, {}).update(run.verdicts())
            moved.setdefault(name, {})[counted.name] = {
                "back": int((seen > before).sum()),
                "gone": int((seen < before).sum()),
            }
    return Result(
        command,
        "deployment",
        **world.subject(model),
        erased=aimed.erased,
        machine=runs.machine(),
        edits=edits,
        measurements=tuple(found),
        details={"against as it is": moved, "refused": refused, "neighbour": neighbour, "verdicts": verdicts},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("concept", help="an object, a style, or weapon")
    parser.add_argument("--edit", type=Path, help="an edit written by erase; none for the unedited model")
    parser.add_argument(
        "--neighbour", required=True, help="another thing, to blend with and as a negative prompt"
    )
    parser.add_argument("--pictures", type=int, default=100, help="with each step (default: %(default)s)")
    parser.add_argument("--only", action="append", default=[], help="a step; repeat for more")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    told = f" --edit {given.edit.as_posix()}" if given.edit else ""
    told += f" --neighbour {json.dumps(given.neighbour)}"
    told += f" --pictures {given.pictures}" if given.pictures != 100 else ""
    told += "".join(f" --only {json.dumps(name)}" for name in given.only)
    result = measure(
        load("emoji"),
        Edit.load(given.edit) if given.edit else None,
        given.concept,
        given.neighbour,
        pictures=given.pictures,
        only=given.only,
        command=f"python -m erasekit.experiments.deployment {json.dumps(given.concept)}{told} "
        f"--out {given.out.as_posix()}",
        progress=True,
    )
    save(result, given.out)


if __name__ == "__main__":
    main()
