"""Run by exports.py inside another environment, without erasekit: load each export by stock calls, draw, compare."""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel

EXPORTS, PROMPTS = Path(sys.argv[1]), json.loads(sys.argv[2])
EXPECTED = np.load(EXPORTS / "expected.npz")
LORA = "pytorch_lora_weights.safetensors"


def pipeline(folder="base", **parts):
    loaded = StableDiffusionPipeline.from_pretrained(
        EXPORTS / folder, safety_checker=None, requires_safety_checker=False, local_files_only=True, **parts
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def with_lora(name, **how):
    loaded = pipeline()
    loaded.load_lora_weights(str(EXPORTS / f"lora-{name}"), **how)
    return loaded


def with_kohya():
    loaded = pipeline()
    loaded.load_lora_weights(str(EXPORTS), weight_name="kohya-map.safetensors")
    return loaded


def single_file(name):
    loaded = StableDiffusionPipeline.from_single_file(
        str(EXPORTS / f"single-{name}.safetensors"), config=str(EXPORTS / "base"), local_files_only=True
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def with_projections():
    loaded = pipeline()
    loaded.unet.load_state_dict(load_file(EXPORTS / "projections-map.safetensors"), strict=False)
    return loaded


def with_encoder():
    return pipeline(text_encoder=CLIPTextModel.from_pretrained(EXPORTS / "encoder-text"))


def apart(pictures, name):
    return round(float(np.abs(EXPECTED[name] - pictures).max() * 255), 2)


WAYS = {
    "unedited folder": ("base", pipeline),
    "merged folder": ("map", lambda: pipeline("merged-map")),
    "merged folder, text encoder edited": ("text", lambda: pipeline("merged-text")),
    "LoRA folder": ("map", lambda: with_lora("map")),
    "LoRA folder, weight_name given": ("map", lambda: with_lora("map", weight_name=LORA)),
    "LoRA with biases, weight_name given": ("attention", lambda: with_lora("attention", weight_name=LORA)),
    "LoRA in kohya's names": ("map", with_kohya),
    "projections": ("map", with_projections),
    "text encoder": ("text", with_encoder),
    "one file": ("map", lambda: single_file("map")),
    "one file, text encoder edited": ("text", lambda: single_file("text")),
}

found = {}
for way, (expected, load) in WAYS.items():
    try:
        drawing = load()
    except Exception as error:  # noqa: BLE001 - what an old library says is the result
        found[way] = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:160]}
        continue
    pictures = np.stack([
        drawing(
            prompt, num_inference_steps=10, guidance_scale=3.0, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images[0]
        for prompt in PROMPTS
    ])  # fmt: skip
    found[way] = {"levels": apart(pictures, expected), "levels from unedited": apart(pictures, "base")}

versions = ("torch", "diffusers", "transformers", "peft", "tokenizers", "huggingface_hub", "accelerate")
print(json.dumps({"versions": {name: importlib.metadata.version(name) for name in versions}, "found": found}))
