"""What tools that are not diffusers make of the exports: LyCORIS and ONNX Runtime.

    python benchmarks/consumers.py --out data/results/benchmark_consumers.json [--only lycoris]

For each row of CONSUMERS a fresh virtual environment is made (pip needs a network or a cache), in which erasekit is not
installed; `consuming.py` reads the files there, offline. The witness is the noise that the UNet predicts for two
prompts: its largest distance from that of `applied`, and as a control that of the unedited UNet. Edits: UCE of
"church", and noise on every weight and bias of the UNet.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from exports import PROMPTS, elsewhere, random_edit
from safetensors.torch import save_file

import erasekit as ek
from erasekit.evaluate.records import Result, save
from erasekit.evaluate.runs import machine

TODAY = ("diffusers==0.42.1", "transformers==5.23.0", "accelerate", "numpy")
CONSUMERS = {
    "lycoris": ("lycoris_lora==4.1.3", *TODAY),
    "onnx": ("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0", *TODAY),
}
READER = Path(__file__).with_name("consuming.py")


def write_exports(folder: Path) -> None:
    """UNets and exports below a folder, and noise.safetensors: inputs of the UNet and what it should predict."""
    model = ek.load("emoji")
    everything = [name for name, _ in model.unet.named_parameters()]
    edits = {
        "map": ek.uce.fit(model, "church", preserve=["castle", "house", "mosque"]),
        "everything": random_edit(model, "unet", everything, 0.1),
    }
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "latents": torch.randn(
            len(PROMPTS), model.unet.config.in_channels, *model.latent_size, generator=draw
        ),
        "step": torch.tensor(500),
        "text": model.encode(PROMPTS),
    }

    def predicted() -> torch.Tensor:
        with torch.no_grad():
            return model.unet(*inputs.values()).sample

    model.unet.save_pretrained(folder / "unet")
    noise = {"unedited": predicted()}
    for name, edit in edits.items():
        with edit.applied(model):
            noise[name] = predicted()
        edit.to_lycoris(folder / f"full-{name}.safetensors", model=model)
        edit.merged(model).unet.save_pretrained(folder / f"merged-{name}")
    edits["map"].to_kohya(folder / "kohya-map.safetensors", model=model)
    save_file(inputs | noise, folder / "noise.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=CONSUMERS, default=list(CONSUMERS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        exports = Path(folder) / "exports"
        exports.mkdir()
        write_exports(exports)
        rows = {
            name: elsewhere(Path(folder) / name, CONSUMERS[name], READER, name, exports)
            for name in given.only
        }
    only = "" if given.only == list(CONSUMERS) else f" --only {' '.join(given.only)}"
    command = f"python benchmarks/consumers.py{only} --out {given.out.as_posix()}"
    save(Result(command, "benchmark", machine=machine(), details={"consumers": rows}), given.out)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
