#!/usr/bin/env bash
# ZImagePipeline of diffusers 0.42.1 writes its chat template into the list of prompts that it was given: the same call,
# repeated with the same list, seed and weights, draws another picture.
# Expected: the list is left alone, and the second picture is the first. Exits 1 if what is seen changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
"$place/env/bin/python" -W ignore - 2>/dev/null <<'PY'
import sys

import diffusers
import numpy as np
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

torch.manual_seed(0)
special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
vocab = {token: i for i, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[], padding_side="right")
tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
encoder = transformers.Qwen3Model(
    transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )
)
pipeline = diffusers.ZImagePipeline(
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    vae=diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16, shift_factor=0.1,
    ),
    text_encoder=encoder,
    tokenizer=tokenizer,
    transformer=diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=24, n_layers=1, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=24,
        axes_dims=[4, 2, 2], axes_lens=[600, 16, 16],
    ),
)
pipeline.set_progress_bar_config(disable=True)


def draw(prompts):
    generator = torch.Generator().manual_seed(1)
    settings = dict(height=32, width=32, num_inference_steps=2, guidance_scale=0.0, output_type="latent")
    return np.asarray(pipeline(prompts, generator=generator, **settings).images.float())


prompts = ["a church"]
first, second, fresh = draw(prompts), draw(prompts), draw(["a church"])
print("torch", torch.__version__, "diffusers", diffusers.__version__, "transformers", transformers.__version__)
print("expected: ['a church'], and the first picture again")
print("seen:", prompts, "and a difference of", float(abs(second - first).max()))
print("control, a new list:", float(abs(fresh - first).max()))
sys.exit(0 if prompts != ["a church"] and abs(second - first).max() > 1e-4 and not abs(fresh - first).max() else 1)
PY
