#!/usr/bin/env bash
# SDXL's second text encoder says eos_token_id=2 in its published config, for which transformers takes the pooled text at
# the highest token id of a prompt. A word added by diffusers' load_textual_inversion has a higher id than the end token:
# what stands behind the word in the prompt is then not in the pooled text. Expected: prompts with other endings have
# other pooled texts, as they have with the right id in the config. Exits 1 if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy diffusers==0.42.1 transformers==5.23.0
cat > "$place/pooled.py" <<'PY'
import sys

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

diffusers.utils.logging.set_verbosity_error()
letters = sorted(ByteLevel.alphabet())
tokens = [*letters, *(one + "</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]


def pooled(end: int) -> list[torch.Tensor]:
    tokenizers = [CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=24) for _ in "12"]
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    config = CLIPTextConfig(
        vocab_size=len(tokens), max_position_embeddings=24, eos_token_id=end, initializer_factor=10.0, **small
    )
    torch.manual_seed(0)
    first, second = CLIPTextModel(config).eval(), CLIPTextModelWithProjection(config).eval()
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=None, unet=None, scheduler=None, text_encoder=first, text_encoder_2=second, tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1], add_watermarker=False,
    )
    for encoder, tokenizer in zip((first, second), tokenizers):
        pipeline.load_textual_inversion({"<toy>": torch.randn(16)}, text_encoder=encoder, tokenizer=tokenizer)
    prompts = ["a <toy> at sea", "a <toy> in ink"]
    with torch.no_grad():
        return [pipeline.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)[2] for text in prompts]


print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}")
far = {}
for name, end in (("published, 2", 2), ("right", tokens.index("<|endoftext|>"))):
    a, b = pooled(end)
    far[name] = float((a - b).abs().max())
    print(f"eos_token_id {name}: pooled texts of two prompts that end differently are {far[name]:.4f} apart")
print("expected: above 0 in both lines")
sys.exit(0 if far["published, 2"] == 0 and far["right"] > 0.01 else 1)
PY
"$place/env/bin/python" -W ignore "$place/pooled.py" 2> "$place/said" || { cat "$place/said"; exit 1; }
