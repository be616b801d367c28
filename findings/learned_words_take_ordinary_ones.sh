#!/usr/bin/env bash
# A textual inversion is loaded under the name of its file, as diffusers does where no token is given: "Fantasy". Expected:
# prompts with that very word use it, all others are read as before. Seen: it also takes "fantasy" in small letters, the
# ordinary word in every prompt, and its letters inside of other words ("fantasyland"), for the added word is matched
# after the prompt is put in small letters and without regard for where words end. Two words that differ in capitals
# alone, "<Dog>" and "<dog>", both load without a warning, both prompts get the same one, and which it is changes by
# chance with every tokenizer that is made, of the same files in the same process. Control: in angle brackets, in small
# letters, a word takes nothing but itself. Exits 1 if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 numpy diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cat > "$place/taken.py" <<'PY'
import sys
from importlib.metadata import version

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

diffusers.utils.logging.set_verbosity_warning()
transformers.utils.logging.set_verbosity_error()
letters = sorted(ByteLevel.alphabet())
known = [*letters, *(one + "</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]


def small() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(known), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=len(known) - 2, eos_token_id=len(known) - 1,
    ))
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=8,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), text_encoder=text, unet=unet,
        tokenizer=CLIPTokenizer(vocab={t: i for i, t in enumerate(known)}, merges=[], model_max_length=32),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )


def taken(words: list[str], prompts: list[str]) -> list[str | None]:
    """Which of the loaded words each prompt has, by the vectors that are looked up; None: none of them."""
    pipeline, found = small(), []
    for number, word in enumerate(words):
        pipeline.load_textual_inversion({word: torch.full((16,), float(number + 1))})
    for prompt in prompts:
        ids = torch.tensor(pipeline.tokenizer(prompt, add_special_tokens=False).input_ids)
        first = pipeline.text_encoder.get_input_embeddings()(ids)[:, 0].tolist()
        found.append(next((word for number, word in enumerate(words) if number + 1.0 in first), None))
    return found


print(", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")))
cases = [  # word loaded, prompt, expected, seen
    ("Fantasy", "a Fantasy castle", "Fantasy", "Fantasy"),
    ("Fantasy", "a fantasy castle", None, "Fantasy"),
    ("Fantasy", "fantasyland", None, "Fantasy"),
    ("<fantasy>", "a <fantasy> castle", "<fantasy>", "<fantasy>"),
    ("<fantasy>", "a fantasy castle", None, None),
    ("<fantasy>", "fantasyland", None, None),
]
as_seen = True
for word, prompt, expected, seen in cases:
    (found,) = taken([word], [prompt])
    as_seen &= found == seen
    print(f"loaded {word:10} prompt {prompt!r:21} expected {expected or 'none':10} found {found or 'none'}")
prompts = ["a <Dog>", "a <dog>"]
loads = [tuple(taken(["<Dog>", "<dog>"], prompts)) for _ in range(24)]
print("loaded <Dog> and <dog> 24 times; what 'a <Dog>' and 'a <dog>' get:",
      ", ".join(f"{both[0]} and {both[1]} {loads.count(both)} times" for both in sorted(set(loads))))
as_seen &= set(loads) == {("<Dog>", "<Dog>"), ("<dog>", "<dog>")}
sys.exit(not as_seen)
PY
"$place/env/bin/python" -W ignore "$place/taken.py" 2> "$place/said" || { cat "$place/said"; exit 1; }
if grep -v -e torchvision -e '^$' "$place/said"; then echo "warnings, where none was seen"; exit 1; fi
