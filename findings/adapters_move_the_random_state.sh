#!/usr/bin/env bash
# Before and after an adapter, from the same noise: torch.manual_seed(0), load it, draw. Expected: loading adapters moves
# torch's global random state for all of them or for none. Seen: a LoRA for the UNet leaves it alone; a LoRA for the text
# encoder, a textual inversion, taking that away again, and fuse_qkv_projections each draw from it (weights that are then
# written over), so the picture starts from other noise, also for a prompt that has nothing to do with the adapter, and
# the difference looks like the adapter's doing. Control: with generator= in the call the picture is the same.
# Exits 1 if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 numpy diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cat > "$place/moved.py" <<'PY'
import sys
from importlib.metadata import version

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
letters = sorted(ByteLevel.alphabet())
tokens = [*letters, *(one + "</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]


def small() -> StableDiffusionPipeline:
    """The same weights in every call."""
    torch.manual_seed(1)
    blocks = dict(block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4)
    unet = UNet2DConditionModel(
        sample_size=8, cross_attention_dim=16, attention_head_dim=8, **blocks,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
    )
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    ))
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=24)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text.eval(), tokenizer=tokenizer, unet=unet.eval(), scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def lora(module: torch.nn.Module, prefix: str, ends: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A LoRA that changes nothing: B is zero."""
    weights = {}
    for name, layer in module.named_modules():
        if name.endswith(ends):
            weights[f"{prefix}.{name}.lora_A.weight"] = torch.ones(2, layer.in_features)
            weights[f"{prefix}.{name}.lora_B.weight"] = torch.zeros(layer.out_features, 2)
    return weights


def picture(act, own_generator: bool) -> torch.Tensor:
    pipeline = small()
    torch.manual_seed(0)
    act(pipeline)
    generator = torch.Generator().manual_seed(0) if own_generator else None
    return torch.from_numpy(pipeline("sea", num_inference_steps=2, output_type="np", generator=generator).images)


def taken_away(pipeline) -> None:
    pipeline.load_textual_inversion({"<toy>": torch.zeros(16)})
    torch.manual_seed(0)
    pipeline.unload_textual_inversion("<toy>")


acts = {
    "nothing": lambda p: None,
    "a LoRA for the UNet": lambda p: p.load_lora_weights(lora(p.unet, "unet", ("to_k", "to_v"))),
    "a LoRA for the text encoder": lambda p: p.load_lora_weights(
        lora(p.text_encoder, "text_encoder.text_model", ("q_proj", "v_proj"))
    ),
    "a textual inversion": lambda p: p.load_textual_inversion({"<toy>": torch.zeros(16)}),
    "taking it away again": taken_away,
    "fuse_qkv_projections": lambda p: p.fuse_qkv_projections(),
}
print(", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft")))
print("how far a picture of 'sea' is from the one before (0 expected: none of these changes what is drawn for it)")
far = {}
for name, act in acts.items():
    far[name] = [float((picture(act, own) - picture(acts["nothing"], own)).abs().max()) for own in (False, True)]
    print(f"{name:28} global seed {far[name][0]:.4f}   generator {far[name][1]:.1e}")
still = [name for name, (seeded, _) in far.items() if seeded < 1e-5]
asked = all(own < 1e-5 for _, own in far.values())
sys.exit(0 if still == ["nothing", "a LoRA for the UNet"] and asked else 1)
PY
"$place/env/bin/python" -W ignore "$place/moved.py" 2> "$place/said" || { cat "$place/said"; exit 1; }
