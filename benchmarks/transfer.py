"""An erased text encoder in front of another UNet: does the erasure go with it?

    python benchmarks/transfer.py dog EDIT --out data/results/benchmark_transfer.json

The other UNet is that of the emoji model, tuned further on real pictures of one style under captions that name no
style, with the text encoder as it was: what makers of Stable Diffusion variants do. Each UNet draws the prompts of
`experiments.ablation` behind the original text encoder and behind the erased one.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

import erasekit as ek
from erasekit.attacks import fine_tuning
from erasekit.emoji import data
from erasekit.evaluate import runs, world
from erasekit.evaluate.records import ORIGINAL, EditMade, Measurement, Result, measurements, save
from erasekit.experiments import ablation, stages
from erasekit.methods import METHODS
from erasekit.models import DiffusionModel
from erasekit.paths import BUILD
from erasekit.training import constant, optimize


def variant(model: DiffusionModel, style: str, config: fine_tuning.Config) -> DiffusionModel:
    """The model with a UNet tuned on real pictures of one style, captioned "a NAME"."""
    names = [c.name for c in data.concepts()] * 4
    pictures = stages.real([(name, style) for name in names], torch.Generator().manual_seed(21))
    tuned = model.copy()
    loss = fine_tuning.objective(model, tuned, pictures, [f"a {name}" for name in names], config)
    optimize(
        "variant", tuned.unet, loss, steps=config.updates, peak=config.alpha, schedule=constant, decay=0.0,
        generator=torch.Generator().manual_seed(22), folder=BUILD / "training" / "variant", save_every=config.every,
    )  # fmt: skip
    return tuned


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("concept")
    parser.add_argument("edit", type=Path)
    parser.add_argument("--style", default="twemoji", choices=data.STYLES)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, edit = ek.load("emoji"), ek.Edit.load(given.edit)
    config = fine_tuning.Config(updates=300, every=100, alpha=1e-4, batch=16)
    tuned = variant(model, given.style, config)
    asked, plain = ablation.protocol(given.concept), world.grid(template="a {}", styles=[given.style])
    made, found = EditMade.of(edit, METHODS[edit.metadata["method"]].PRESETS["emoji"]), []
    for name, one in ((None, model), ("tuned UNet", tuned)):
        styled = world.judged(one, plain, sampler=world.SAMPLER, steps=world.STEPS, progress=True)
        found.append(
            Measurement(
                "drawn in the style",
                world.style_rate(styled),
                protocol="judged",
                hash=styled.attrs["protocol"].rpartition("-")[2],
                model=name,
            )
        )
        for label, change in ((ORIGINAL, None), (made.label, edit)):
            found += measurements(runs.run(one, change, asked).measured(), asked, label, model=name)
    command = f"python benchmarks/transfer.py {json.dumps(given.concept)} EDIT --style {given.style}"
    result = Result(
        f"{command} --out {given.out.as_posix()}",
        "benchmark",
        **world.subject(model),
        erased=(given.concept,),
        machine=runs.machine(),
        edits={made.label: made},
        measurements=tuple(found),
        details={
            "tuning": asdict(config) | {"style": given.style},
            "fingerprints": {"tuned UNet": tuned.fingerprint()},
        },
    )
    save(result, given.out)
    print(result.table().to_string())


if __name__ == "__main__":
    main()
