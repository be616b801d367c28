"""The in-world CLIP: a text-picture similarity and a zero-shot classifier of the emoji world."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from safetensors.torch import load
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from erasekit.concepts import token_ids
from erasekit.emoji import data
from erasekit.models import quietly
from erasekit.paths import EMOJI_CLIP, EMOJI_MODEL


def load_clip() -> CLIPModel:
    """The stock CLIPModel, float32, joined from the pipeline's text tower and data/emoji/clip."""
    clip = CLIPModel(CLIPConfig.from_pretrained(EMOJI_CLIP))
    with quietly():
        text = CLIPTextModel.from_pretrained(EMOJI_MODEL / "text_encoder")
    weights = {f"text_model.{name}": value for name, value in text.state_dict().items()}
    clip.load_state_dict(weights | load(data.verified(f"{EMOJI_CLIP.name}/vision.safetensors")))
    return clip.float().eval()


@cache
def _parts() -> tuple[CLIPModel, CLIPTokenizer]:
    return load_clip(), CLIPTokenizer.from_pretrained(EMOJI_MODEL / "tokenizer")


def to_tensor(pictures: Sequence[Image]) -> Tensor:
    """PIL pictures of one size as float32 (n, 3, height, width) in [-1, 1]."""
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def text_features(prompts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Unit rows (n, 256)."""
    clip, tokenizer = _parts()
    parts = token_ids(tokenizer, prompts).split(batch_size)
    return F.normalize(
        torch.cat([clip.text_projection(clip.text_model(ids).pooler_output) for ids in parts]), dim=-1
    )


@torch.no_grad()
def picture_features(pictures: Tensor, batch_size: int = 128) -> Tensor:
    """Unit rows (n, 256) of pictures (n, 3, 64, 64) in [-1, 1]."""
    clip, _ = _parts()
    rows = [
        clip.visual_projection(clip.vision_model(part).pooler_output) for part in pictures.split(batch_size)
    ]
    return F.normalize(torch.cat(rows), dim=-1)
