"""A tiny random Stable Diffusion 1.x pipeline, made of the real classes; no test needs the network."""

import importlib
import importlib.util
import os
import sys
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from diffusers import StableDiffusionPipeline

from erasekit import miniatures, models
from erasekit.miniatures import LENGTH, WIDTH  # noqa: F401
from erasekit.miniatures import WORDS as WHOLE  # noqa: F401
from erasekit.miniatures import clip_tokenizer as tiny_tokenizer  # noqa: F401
from erasekit.paths import ROOT


@pytest.fixture(autouse=True)
def close_figures():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


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


def literal_loop(name: str):
    """benchmarks/literal/NAME.py as a module: a published training loop, written out."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(f"literal.{name}")
    finally:
        sys.path.remove(folder)


def tiny_pipeline(seed: int = 0, length: int = LENGTH) -> StableDiffusionPipeline:
    """A miniature of SD 1 in which the text moves the picture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = miniatures.sd1(length=length)
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "attn2" in name:
                parameter.mul_(3)
        pipeline.vae.decoder.conv_out.weight.mul_(3)
    return pipeline


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
