"""Run by consumers.py inside another environment, without erasekit: read each export by one tool, predict, compare."""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

TOOL, EXPORTS = sys.argv[1], Path(sys.argv[2])
NOISE = load_file(EXPORTS / "noise.safetensors")
INPUTS = tuple(NOISE[name] for name in ("latents", "step", "text"))


def unet(folder="unet"):
    return UNet2DConditionModel.from_pretrained(EXPORTS / folder, local_files_only=True).eval()


def predicted(model):
    with torch.no_grad():
        return model(*INPUTS).sample


def lycoris(file):
    from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights

    # else an error: findings/lycoris_cannot_attach_to_a_stock_unet.sh
    LycorisNetworkKohya.apply_preset({"unet_target_name": []})
    model = unet()
    network, _ = create_network_from_weights(1.0, str(EXPORTS / file), None, None, model)
    for layer in network.unet_loras:
        layer.merge_to(1.0)
    return predicted(model)


def onnx(folder):
    import onnxruntime

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet(folder)

        def forward(self, latents, step, text):
            return self.unet(latents, step, text).sample

    names = ["latents", "step", "text"]
    torch.onnx.export(
        Plain().eval(), INPUTS, EXPORTS / "unet.onnx", input_names=names, dynamo=True, verbose=False
    )
    session = onnxruntime.InferenceSession(EXPORTS / "unet.onnx", providers=["CPUExecutionProvider"])
    given = {name: value.numpy() for name, value in zip(names, INPUTS, strict=True)}
    return torch.from_numpy(session.run(None, given)[0])


LORA = {"LoRA in kohya's names": ("map", "kohya-map.safetensors")}
FULL = {f"LyCORIS full, {name}": (name, f"full-{name}.safetensors") for name in ("map", "everything")}
WAYS = {
    "lycoris": (lycoris, LORA | FULL, ("lycoris_lora", "diffusers")),
    "onnx": (
        onnx,
        {f"merged, {name}": (name, f"merged-{name}") for name in ("map", "everything")},
        ("onnx", "onnxscript", "onnxruntime", "diffusers"),
    ),
}

read, exports, packages = WAYS[TOOL]
far = lambda a, b: float((a - b).abs().max())
found = {}
for name, (edit, file) in exports.items():
    noise = read(file)
    found[name] = {
        "difference": far(noise, NOISE[edit]),
        "of the unedited": far(NOISE["unedited"], NOISE[edit]),
    }
versions = {name: importlib.metadata.version(name) for name in ("torch", *packages)}
print(json.dumps({"versions": versions, "found": found}))
