#!/usr/bin/env bash
# Several erasers, and many other methods, live in attention processors of their own (unet.set_attn_processor). Then the
# user saves memory or loads an IP-Adapter. Expected: the processor goes on working, or a warning. Seen: a processor with
# a setting (here: text is scaled by 0.2) is gone without a word after pipe.enable_attention_slicing(), and does not come
# back with disable_attention_slicing(); after fuse_qkv_projections() (unfuse brings it back); after an IP-Adapter is
# loaded; and pipe.unload_ip_adapter(), also where none was loaded, makes each processor anew from its class without its
# settings: unet.attn_processors lists the same classes as before, and they do nothing. Controls: FreeU, gradient
# checkpointing, channels_last and a LoRA leave it in force. Exits 1 if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 numpy diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cat > "$place/dropped.py" <<'PY'
import sys
import warnings
from importlib.metadata import version

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig

diffusers.utils.logging.set_verbosity_warning()


class Muffled(AttnProcessor2_0):
    """Attention to the text scaled by `share`."""

    def __init__(self, share: float = 1.0):
        super().__init__()
        self.share = share

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        text = None if encoder_hidden_states is None else self.share * encoder_hidden_states
        return super().__call__(attn, hidden_states, text, attention_mask, temb)


def small() -> StableDiffusionPipeline:
    """A pipeline of the same random weights in every call, without text encoder."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), text_encoder=None, tokenizer=None,
        unet=unet.eval(), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )


def ip_adapter(pipeline) -> dict:
    """Random weights in the layout of the published files."""
    image = {"proj.weight": torch.randn(4 * 32, 16), "proj.bias": torch.zeros(128)}
    image |= {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    crossed = [name for name in pipeline.unet.attn_processors if name.endswith("attn2.processor")]
    widths = [pipeline.unet.get_submodule(one.removesuffix(".processor")).to_k.out_features for one in crossed]
    rows = {f"{2 * i + 1}.to_{part}_ip.weight": torch.randn(w, 32) for i, w in enumerate(widths) for part in "kv"}
    return {"image_proj": image, "ip_adapter": rows}


def loaded(pipeline) -> None:
    pipeline.load_ip_adapter(ip_adapter(pipeline), subfolder=None, weight_name=None, image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(0.0)


def on_and_off(pipeline) -> None:
    pipeline.enable_attention_slicing()
    pipeline.disable_attention_slicing()


def fused_and_back(pipeline) -> None:
    pipeline.fuse_qkv_projections()
    pipeline.unfuse_qkv_projections()


x, text = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((1, 4, 8, 8), (1, 7, 32)))


@torch.no_grad()
def noise(pipeline, image: bool = False) -> torch.Tensor:
    more = {"added_cond_kwargs": {"image_embeds": [torch.zeros(1, 1, 16)]}} if image else {}
    return pipeline.unet(x, 10, text, **more).sample


plain = noise(small())
acts = {
    "nothing": lambda p: None,
    "FreeU": lambda p: p.enable_freeu(1, 1, 1, 1),
    "gradient checkpointing": lambda p: p.unet.enable_gradient_checkpointing(),
    "channels_last": lambda p: p.unet.to(memory_format=torch.channels_last),
    "a LoRA": lambda p: p.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"])),
    "fused and back": fused_and_back,
    "attention slicing": lambda p: p.enable_attention_slicing(),
    "slicing on and off": on_and_off,
    "fuse_qkv_projections": lambda p: p.fuse_qkv_projections(),
    "an IP-Adapter of scale 0": loaded,
    "unload_ip_adapter": lambda p: p.unload_ip_adapter(),
}
print(", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft")))
print("share of the processor's effect on the UNet's output that is left (1 expected in every row)")
left, warned = {}, []
for name, act in acts.items():
    pipeline = small()
    pipeline.unet.set_attn_processor(Muffled(0.2))
    before = noise(pipeline)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        act(pipeline)
    after = noise(pipeline, image="IP-Adapter of" in name)
    left[name] = round(float((after - plain).norm() / (before - plain).norm()), 4)
    warned += [str(one.message) for one in said]
    classes = sorted({type(one).__name__ for one in pipeline.unet.attn_processors.values()})
    print(f"{name:26} {left[name]:.4f}   processors listed: {', '.join(classes)}")
print("warnings:", warned or "none")
kept, lost = list(acts)[:6], list(acts)[6:]
sys.exit(not (all(left[name] > 0.999 for name in kept) and all(left[name] < 0.001 for name in lost) and not warned))
PY
"$place/env/bin/python" "$place/dropped.py"
