"""Small random pipelines of SD 1, SDXL, SD 3 and FLUX.1, of the real classes, for notebooks and tests.

Nothing is downloaded: each is made of configs, in a second, and loads, draws, trains and exports as a published one
does. Its weights are random, so its pictures mean nothing. What does not depend on training can be tried on it: where
text enters, what an edit does there, what it leaves, what other programs make of the files.
"""

from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

WORDS = tuple("castle church house dog a an in flat ink style image picture of art".split())
LENGTH, WIDTH = 24, 32  # tokens of a prompt, columns of the first CLIP
LETTERS = "abcdefghijklmnopqrstuvwxyz"
HEADS = dict(num_attention_heads=2, attention_head_dim=8)


def clip_tokenizer(words: Sequence[str] = WORDS, length: int = LENGTH) -> transformers.CLIPTokenizer:
    """Byte pairs that know the words; any other word becomes its letters."""
    letters = sorted(ByteLevel.alphabet())
    merges = {}  # in order, without repeats
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges[(pieces[0], pieces[1])] = None
            pieces[:2] = [pieces[0] + pieces[1]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=length)


def t5_tokenizer(words: Sequence[str] = WORDS, length: int = LENGTH) -> transformers.T5Tokenizer:
    """Unigrams: the words, and letters."""
    known = [("▁" + word, -1.0) for word in words if len(word) > 1]
    letters = [("▁", -2.0), *((one, -3.0) for one in LETTERS)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return transformers.T5Tokenizer(vocab=[*special, *known, *letters], extra_ids=0, model_max_length=length)


def clip_config(tokenizer, width: int, **changes) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=width, initializer_factor=10.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **changes,
    )  # fmt: skip


def t5(width: int, tokenizer, cls=transformers.T5EncoderModel, config=transformers.T5Config):
    return cls(config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    ))  # fmt: skip


def vae(levels: int = 2, **changes) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * (levels - 1) + (16,), down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=4, norm_num_groups=4, sample_size=16, **changes,
    )  # fmt: skip


def flow(**changes) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**changes)


def sd1(words: Sequence[str] = WORDS, length: int = LENGTH) -> diffusers.StableDiffusionPipeline:
    """One CLIP, whose rows the keys and values of every cross-attention read."""
    one = clip_tokenizer(words, length)
    return diffusers.StableDiffusionPipeline(
        text_encoder=CLIPTextModel(clip_config(one, WIDTH)),
        tokenizer=one,
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=WIDTH,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl(words: Sequence[str] = WORDS, length: int = LENGTH) -> diffusers.StableDiffusionXLPipeline:
    """Two CLIPs side by side; the pooled row of the second, and sizes, beside them."""
    one, two = clip_tokenizer(words, length), clip_tokenizer(words, length)
    two.pad_token = "!"
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13),
        text_encoder=CLIPTextModel(clip_config(one, WIDTH)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(two, 40, hidden_act="gelu")),
        tokenizer=one,
        tokenizer_2=two,
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            attention_head_dim=(2, 4), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH + 40,
            use_linear_projection=True, transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 40,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )  # fmt: skip


def sd3(words: Sequence[str] = WORDS, length: int = LENGTH) -> diffusers.StableDiffusion3Pipeline:
    """Two CLIPs side by side, T5 behind them (as 3.5), and the pooled rows of both CLIPs."""
    one, two, three = (
        clip_tokenizer(words, length),
        clip_tokenizer(words, length),
        t5_tokenizer(words, length),
    )
    two.pad_token = "!"
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            **HEADS, sample_size=8, in_channels=4, num_layers=2, joint_attention_dim=80, caption_projection_dim=16,
            pooled_projection_dim=WIDTH + 40, out_channels=4, pos_embed_max_size=16,
        ),
        scheduler=flow(shift=3.0),
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=CLIPTextModelWithProjection(clip_config(one, WIDTH)),
        tokenizer=one,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(two, 40, hidden_act="gelu")),
        tokenizer_2=two,
        text_encoder_3=t5(80, three),
        tokenizer_3=three,
    )  # fmt: skip


def flux(words: Sequence[str] = WORDS, length: int = LENGTH) -> diffusers.FluxPipeline:
    """As FLUX.1-dev: T5 for the sequence, CLIP's pooled row beside, guidance as a number."""
    one, two = clip_tokenizer(words, length), t5_tokenizer(words, length)
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            **HEADS, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=24,
            pooled_projection_dim=WIDTH, axes_dims_rope=(4, 2, 2), guidance_embeds=True,
        ),
        scheduler=flow(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=CLIPTextModel(clip_config(one, WIDTH)),
        tokenizer=one,
        text_encoder_2=t5(24, two),
        tokenizer_2=two,
    )  # fmt: skip


FAMILIES = {make.__name__: make for make in (sd1, sdxl, sd3, flux)}


def spread(weight: torch.Tensor, gain: float = 1.0) -> None:
    """Normal numbers for a weight (d_out, ...): what it gives is `gain` times as large as what it reads."""
    nn.init.normal_(weight, std=gain * weight[0].numel() ** -0.5)


def pipeline(
    family: str, seed: int = 0, words: Sequence[str] = WORDS, length: int = LENGTH
) -> diffusers.DiffusionPipeline:
    """A pipeline of "sd1", "sdxl", "sd3" or "flux", the same for the same seed and words.

    words: those that are one token each. length: of a prompt in tokens. Every matrix of the text encoders and the
    denoiser is normal, and none shrinks or swells what it reads (`spread`): words differ, all entries count, and no
    layer begins with zeros. ValueError for another family.
    """
    if family not in FAMILIES:
        raise ValueError(f"there are miniatures of {', '.join(FAMILIES)}, got {family!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = FAMILIES[family](words, length)
        parts = [
            part
            for name, part in made.components.items()
            if name.startswith(("text_encoder", "unet", "trans"))
        ]
        for parameter in (parameter for part in parts for parameter in part.parameters()):
            if parameter.ndim > 1:
                spread(parameter)
    return made


def clip(folder: str | Path, words: Sequence[str] = WORDS, length: int = 77, seed: int = 0) -> Path:
    """A CLIP of text and pictures with random weights, written to a folder as the hub has it: a judge to try code with.
    Its tokenizer is that of a pipeline with the same words and length.
    """
    tokenizer = clip_tokenizer(words, length)
    part = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = part | dict(
        vocab_size=len(tokenizer), max_position_embeddings=length, eos_token_id=tokenizer.eos_token_id
    )
    vision = part | dict(image_size=32, patch_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model.save_pretrained(folder)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return Path(folder)
