#!/usr/bin/env bash
# lycoris_lora from 4.0.0 on: a network for a stock Stable Diffusion UNet, or a file for it, ends in an AssertionError.
# The classes it targets include TimestepEmbedding, the names time_embedding.linear_1 again. Expected: a network, as 3.4.0
# makes. Exits 1 if what is seen changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat > "$place/attach.py" <<'PY'
import importlib.metadata
import logging

import torch
from diffusers import UNet2DConditionModel
from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights

logging.getLogger("LyCORIS").setLevel(logging.ERROR)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
    norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
weights = {"lora_unet_conv_in.diff": torch.ones_like(unet.conv_in.weight)}


def seen():
    try:
        network, _ = create_network_from_weights(1.0, "", None, None, unet, weights_sd=weights)
    except AssertionError as error:
        return f"AssertionError: {error}"
    return f"{len(network.unet_loras)} layer"


first = seen()
LycorisNetworkKohya.apply_preset({"unet_target_name": []})
print(f"lycoris_lora {importlib.metadata.version('lycoris_lora')}: {first}; without the names: {seen()}")
PY
for version in 3.4.0 4.1.3; do
    python3 -m venv "$place/$version"
    "$place/$version/bin/pip" install -q --disable-pip-version-check \
        torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 numpy "lycoris_lora==$version"
    "$place/$version/bin/python" -W ignore "$place/attach.py" 2>/dev/null | grep "^lycoris_lora" | tee -a "$place/seen"
done
echo "expected: 1 layer, four times"
cat > "$place/as_found" <<'TXT'
lycoris_lora 3.4.0: 1 layer; without the names: 1 layer
lycoris_lora 4.1.3: AssertionError: duplicated lora name: lora_unet_time_embedding_linear_1; without the names: 1 layer
TXT
diff "$place/as_found" "$place/seen"
