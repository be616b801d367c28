"""A tiny random Stable Diffusion 1.x pipeline, made of the real classes; no test needs the network."""

import importlib.util
import os
import sys
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from erasekit import models
from erasekit.miniatures import LENGTH, WIDTH  # noqa: F401
from erasekit.miniatures import WORDS as WHOLE  # noqa: F401
from erasekit.miniatures import clip_tokenizer as tiny_tokenizer
from erasekit.paths import ROOT


@contextmanager
def benchmark_script(name: str):
    """benchmarks/NAME.py as a module, beside the others of its folder."""
    folder = ROOT / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name, None)


def tiny_pipeline(seed: int = 0, length: int = LENGTH) -> StableDiffusionPipeline:
    tokenizer = tiny_tokenizer(length=length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                initializer_factor=10.0,  # so that different words differ after two layers
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "attn2" in name:
                    parameter.mul_(3)  # so that the text moves the picture
            vae.decoder.conv_out.weight.mul_(3)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def literal_erase(w, pairs, kept, e: float, p: float, ridge: float) -> torch.Tensor:
    """M_num M_den^-1 of the method sheet for one weight, one outer product at a time and an explicit inverse.

    pairs: (c, c*) rows; kept: rows to preserve.
    """
    numerator, denominator = ridge * w, ridge * torch.eye(w.shape[1], dtype=torch.float64)
    for c, c_star in pairs:
        numerator = numerator + e * torch.outer(w @ c_star, c)
        denominator = denominator + e * torch.outer(c, c)
    for c in kept:
        numerator = numerator + p * torch.outer(w @ c, c)
        denominator = denominator + p * torch.outer(c, c)
    return numerator @ torch.linalg.inv(denominator)


def block(model, prompt: str) -> torch.Tensor:
    """Embeddings of a prompt, float64 (length, d)."""
    return model.encode(prompt)[0].double()


def aligned(model, phrase: str, anchor: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The slice of the code of 2023: from the last real token to the end, both cut to equal length."""
    last = lambda prompt: sum(model.tokenizer(prompt).attention_mask) - 2
    old, new = last(phrase), last(anchor)
    far = max(old, new)
    return block(model, phrase)[old : LENGTH - (far - old)], block(model, anchor)[new : LENGTH - (far - new)]


def check_dogs_go_and_cats_stay(method, folder) -> None:
    """A closed form on the emoji model; the control is the model as it is."""
    from erasekit.evaluate.world import Prompt, judged

    model = models.load("emoji", device="cpu")
    prompts = [Prompt(f"a {name} in flat style", name, "flat") for name in ("dog", "cat")]
    shown = lambda: (
        judged(model, prompts, seeds=range(6), steps=12, folder=folder)
        .query("shown == concept")["concept"]
        .value_counts()
    )
    before = shown()
    with method.fit(model, "dog", ["cat", "horse", "bird", "deer"]).applied(model):
        after = shown()
    assert before["dog"] >= 5 and before["cat"] >= 5
    assert after.get("dog", 0) <= 1 and after["cat"] >= 5


@pytest.fixture(scope="session")
def shared_model() -> models.DiffusionModel:
    """Read only: a test that changes the model takes `model`."""
    return models.load(tiny_pipeline())


@pytest.fixture
def model() -> models.DiffusionModel:
    """A fresh model with the weights of `shared_model`."""
    return models.load(tiny_pipeline())


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
