"""Run by consumers.py inside another environment, without erasekit: read each export by one tool, predict, compare."""

import importlib.metadata
import json
import logging
import sys
from pathlib import Path

import torch

try:  # it comes with InvokeAI, built for torch with CUDA: beside torch for CPUs alone it misses operators
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass
except RuntimeError:
    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )

from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

TOOL, EXPORTS = sys.argv[1], Path(sys.argv[2])
NOISE = load_file(EXPORTS / "noise.safetensors")
NAMES = ["latents", "step", "text"]
INPUTS = tuple(NOISE[name] for name in NAMES)
ARRAYS = {name: value.numpy() for name, value in zip(NAMES, INPUTS, strict=True)}


def unet(folder="unet"):
    return UNet2DConditionModel.from_pretrained(EXPORTS / folder, local_files_only=True).eval()


class Plain(torch.nn.Module):
    """A UNet that takes and gives tensors."""

    def __init__(self, folder):
        super().__init__()
        self.unet = unet(folder)

    def forward(self, latents, step, text):
        return self.unet(latents, step, text).sample


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


def invokeai(file, **how):
    """As its LoRALoader and its denoising do it for SD 1; it patches layers beside the weights on a CPU."""
    from invokeai.backend.model_manager.load.model_cache.torch_module_autocast.torch_module_autocast import (
        apply_custom_layers_to_model,
    )
    from invokeai.backend.patches.layer_patcher import LayerPatcher
    from invokeai.backend.patches.lora_conversions.peft_adapter_utils import normalize_peft_adapter_names
    from invokeai.backend.patches.lora_conversions.sd_lora_conversion_utils import (
        lora_model_from_sd_state_dict,
    )

    model = unet()
    apply_custom_layers_to_model(model)
    patch = lora_model_from_sd_state_dict(normalize_peft_adapter_names(load_file(EXPORTS / file)))
    with LayerPatcher.apply_smart_model_patches(model, [(patch, 1.0)], "lora_unet_", torch.float32, **how):
        return predicted(model)


def onnx(folder):
    import onnxruntime

    torch.onnx.export(
        Plain(folder).eval(), INPUTS, EXPORTS / "unet.onnx", input_names=NAMES, dynamo=True, verbose=False
    )
    session = onnxruntime.InferenceSession(EXPORTS / "unet.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, ARRAYS)[0])


def openvino(folder, **how):
    """Written and read again; computed in float32, which is not the default of every processor."""
    import openvino as ov

    written = EXPORTS / "openvino.xml"
    ov.save_model(ov.convert_model(Plain(folder).eval(), example_input=INPUTS), written, **how)
    model = ov.Core().compile_model(written, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(model(list(ARRAYS.values()))[0])


LORA = {"LoRA in kohya's names": ("map", "kohya-map.safetensors")}
UNKNOWN = {"control: a LoRA of unknown names": ("map", "unknown-map.safetensors")}
FULL = {f"LyCORIS full, {name}": (name, f"full-{name}.safetensors") for name in ("map", "everything")}
MERGED = {f"merged, {name}": (name, f"merged-{name}") for name in ("map", "everything")}


def each(exports, addition="", **how):
    return {name + addition: (edit, file, how) for name, (edit, file) in exports.items()}


WAYS = {
    "LyCORIS": (lycoris, each(LORA | FULL | UNKNOWN), ("lycoris_lora", "diffusers")),
    "InvokeAI": (
        invokeai,
        each(LORA | FULL | UNKNOWN) | each(LORA | FULL, ", into the weights", force_direct_patching=True),
        ("invokeai", "diffusers"),
    ),
    "ONNX Runtime": (onnx, each(MERGED), ("onnxruntime", "onnx", "onnxscript", "diffusers")),
    "OpenVINO": (
        openvino,
        each(MERGED, compress_to_fp16=False) | each(MERGED, ", save_model's default"),
        ("openvino", "diffusers"),
    ),
}


class Heard(logging.Handler):
    """How many warnings a tool gave."""

    count = 0

    def emit(self, record):
        self.count += record.levelno >= logging.WARNING


def far(a, b):
    return float((a - b).abs().max())


heard = Heard()
logging.getLogger().addHandler(heard)
read, exports, packages = WAYS[TOOL]
found = {}
for name, (edit, file, how) in exports.items():
    heard.count = 0
    control = {"applied from unedited": far(NOISE["unedited"], NOISE[edit])}
    try:
        noise = read(file, **how)
    except Exception as error:  # noqa: BLE001 - what a tool says is the result
        found[name] = control | {"error": f"{type(error).__name__}: {error}".split("\n")[0][:160]}
        continue
    found[name] = control | {
        "difference": far(noise, NOISE[edit]),
        "from unedited": far(noise, NOISE["unedited"]),
        "warnings": heard.count,
    }
versions = {name: importlib.metadata.version(name) for name in ("torch", *packages)}
print(json.dumps({"versions": versions, "found": found}))
