#!/usr/bin/env bash
# fuse_qkv_projections() on a UNet with a LoRA on keys and values: it has no effect any more and is listed as active.
# Expected: the picture with the LoRA, or an error. Exits 1 if what is seen changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
"$place/env/bin/python" -W ignore - <<'PY'
import sys

import diffusers
import peft
import torch
from diffusers import UNet2DConditionModel

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
    norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval()
x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)


def out():
    with torch.no_grad():
        return unet(x, 1, text).sample


plain = out()
targets = ["to_k", "to_v"]
unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=40, init_lora_weights=False, target_modules=targets), "mine")
adapted = out()
unet.fuse_qkv_projections()
fused = out()
far = lambda a, b: float((a - b).abs().max())
print("diffusers", diffusers.__version__, "peft", peft.__version__, "torch", torch.__version__)
print(f"expected after fusing: {far(adapted, plain):.4f} from the plain output, as with the LoRA before, or an error")
print(f"seen: {far(fused, plain):.7f} from the plain output; active adapters: {unet.active_adapters()}")
as_found = far(adapted, plain) > 1e-2 and far(fused, plain) < 1e-5 and unet.active_adapters() == ["mine"]
sys.exit(0 if as_found else 1)
PY
