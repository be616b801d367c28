"""Everything that an Edit exports, read by stock libraries of several ages: are the pictures the same?

    python benchmarks/exports.py --out data/results/benchmark_exports.json

For each row of ENVIRONMENTS a fresh virtual environment is made (pip needs a network or a cache), in which erasekit is
not installed. `reading.py` draws with each export there, offline; the reference is what today's libraries draw with
`applied`. Edits: UCE of "church", and random changes of the parameters that ESD-x and AdvUnlearn change, so that all
exports are met. A difference is the largest over all pixels, in levels of 255.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import torch

import erasekit as ek
from erasekit.edits import Edit
from erasekit.evaluate.records import Result, save
from erasekit.evaluate.runs import machine
from erasekit.layers import text_parameters, unet_parameters
from erasekit.models import DiffusionModel

OLD = ("peft==0.12.0", "huggingface_hub==0.25.2", "accelerate==0.34.2", "numpy<2.3", "safetensors==0.4.5")
ENVIRONMENTS = {
    "diffusers 0.30, transformers 4.44": ("diffusers==0.30.3", "transformers==4.44.2", *OLD),
    "diffusers 0.35, transformers 4.56": ("diffusers==0.35.2", "transformers==4.56.2", "peft==0.17.1"),
    "diffusers 0.42, transformers 5.23": ("diffusers==0.42.1", "transformers==5.23.0", "peft==0.21.2"),
}
TORCH = f"torch=={torch.__version__.partition('+')[0]}"
PROMPTS = ["a church in noto style", "a dog in ink style"]
READER = Path(__file__).with_name("reading.py")


def random_edit(model: DiffusionModel, part: str, names: list[str], share: float) -> Edit:
    """Noise added to these parameters of a part, `share` of each one's own norm."""
    generator, module = torch.Generator().manual_seed(0), dict(getattr(model, part).named_parameters())
    delta = {}
    for name in names:
        noise = torch.randn(module[name].shape, generator=generator)
        delta[f"{part}.{name}"] = noise * share * module[name].detach().norm() / noise.norm()
    return Edit.from_weight_delta(delta, model, method="random", concepts={})


def stock(model: DiffusionModel) -> np.ndarray:
    """What the reader draws, by the pipeline as it stands."""
    pictures = [
        model.pipeline(
            prompt, num_inference_steps=10, guidance_scale=3.0, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images[0] for prompt in PROMPTS
    ]  # fmt: skip
    return np.stack(pictures)


def write_exports(folder: Path) -> None:
    """The exports below a folder, and expected.npz: the pictures that each should give."""
    model = ek.load("emoji")
    edits = {
        "map": ek.uce.fit(model, "church", preserve=["castle", "house", "mosque"]),
        "attention": random_edit(model, "unet", unet_parameters(model.unet, "x"), 0.3),
        "text": random_edit(model, "text_encoder", text_parameters(model.text_encoder), 0.1),
    }
    model.save_pretrained(folder / "base")
    expected = {"base": stock(model)}
    for name, edit in edits.items():
        with edit.applied(model):
            expected[name] = stock(model)
        edit.merged(model).save_pretrained(folder / f"merged-{name}")
        if name != "text":
            edit.to_lora(folder / f"lora-{name}", model=model)
    edits["map"].to_kohya(folder / "kohya-map.safetensors", model=model)
    edits["map"].merged(model).save_single_file(folder / "single-map.safetensors")
    edits["text"].merged(model).save_single_file(folder / "single-text.safetensors")
    edits["map"].to_projections(folder / "projections-map.safetensors", model=model)
    edits["text"].to_text_encoder(folder / "encoder-text", model=model)
    np.savez(folder / "expected.npz", **expected)


def elsewhere(place: Path, packages: tuple[str, ...], *command: str | Path) -> dict:
    """What a script prints, as JSON in its last line, in a fresh environment at `place` with torch and these packages.

    It runs offline; RuntimeError with what it said where it fails.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "DIFFUSERS_VERBOSITY": "error"}
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check"]
    done = subprocess.run([*pip, TORCH, *packages], env=environment, capture_output=True, text=True)
    print(done.stderr, file=sys.stderr)
    if done.returncode:
        raise RuntimeError(f"{', '.join(packages)}: {done.stderr}")
    done = subprocess.run([python, *command], env=environment, cwd=place, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{', '.join(packages)}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def read(name: str, exports: Path, place: Path) -> dict:
    """What an environment makes of the exports: versions of its packages, for each export a difference or an error."""
    return elsewhere(place, ("accelerate", *ENVIRONMENTS[name]), READER, exports, json.dumps(PROMPTS))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        exports = Path(folder) / "exports"
        write_exports(exports)
        rows = {name: read(name, exports, Path(folder) / f"env{i}") for i, name in enumerate(ENVIRONMENTS)}
    command = f"python benchmarks/exports.py --out {given.out.as_posix()}"
    save(Result(command, "benchmark", machine=machine(), details={"environments": rows}), given.out)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
