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
from erasekit.experiments import ablation, stages
from erasekit.models import DiffusionModel
from erasekit.paths import BUILD, write_atomically
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
    found = {}
    for name, one in (("emoji model", model), ("tuned UNet", tuned)):
        styles = world.style_rate(world.judged(one, plain, progress=True))
        whole = {"encoder": runs.run(one, None, asked), "erased": runs.run(one, edit, asked)}
        found[name] = {"drawn in the style": styles} | {key: run.measured() for key, run in whole.items()}
    result = {
        "command": f"python benchmarks/transfer.py {json.dumps(given.concept)} EDIT --style {given.style} "
        f"--out {given.out.as_posix()}",
        "erased": given.concept,
        "edit": {key: edit.metadata[key] for key in ("method", "config", "concepts")},
        "protocol": asked.short,
        "tuning": asdict(config) | {"style": given.style},
        "fingerprints": {"emoji model": model.fingerprint(), "tuned UNet": tuned.fingerprint()},
        "models": found,
        "machine": runs.machine(),
    }
    write_atomically(given.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
