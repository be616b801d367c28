"""Small random pipelines: real classes, the same for a seed, and nothing in them shuts the text out."""

import diffusers
import numpy as np
import pytest
import torch

import erasekit as ek
from erasekit import exercises, miniatures
from erasekit.text_entries import fed, leaves, text_entries

CLASSES = {
    "sd1": (diffusers.StableDiffusionPipeline, diffusers.UNet2DConditionModel),
    "sdxl": (diffusers.StableDiffusionXLPipeline, diffusers.UNet2DConditionModel),
    "sd3": (diffusers.StableDiffusion3Pipeline, diffusers.SD3Transformer2DModel),
    "flux": (diffusers.FluxPipeline, diffusers.FluxTransformer2DModel),
}


@pytest.fixture(scope="module", params=miniatures.FAMILIES)
def family(request) -> str:
    return request.param


@torch.no_grad()
def predicted(model, prompt: str) -> torch.Tensor:
    args, kwargs = fed(model, prompt)
    return torch.cat([one.flatten() for _, one in leaves(model.denoiser(*args, **kwargs))])


def test_the_same_seed_gives_the_same_pipeline(family, tmp_path):
    state = torch.get_rng_state()
    model, again = (ek.load(miniatures.pipeline(family, 3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers are drawn
    assert (type(model.pipeline), type(model.denoiser)) == CLASSES[family]
    assert model.fingerprint() == again.fingerprint()
    assert model.fingerprint() != ek.load(miniatures.pipeline(family, 4)).fingerprint()  # control
    miniatures.pipeline(family, 3).save_pretrained(tmp_path)
    size = dict(steps=2, height=32, width=32)
    stored, drawn = (np.asarray(one.generate("a dog", **size)[0]) for one in (ek.load(tmp_path), model))
    np.testing.assert_array_equal(stored, drawn)


def test_every_way_in_of_the_text_is_heard(family):
    model = ek.load(miniatures.pipeline(family))
    ways = {"embedding"} if family == "sd1" else {"embedding", "pooled"}
    assert {entry.reads for entry in text_entries(model)} == ways
    dog, house = predicted(model, "a dog"), predicted(model, "a house")
    assert (dog - house).norm() > 0.05 * house.norm()
    for pooled in (True, False):  # one way alone changes something too
        with torch.no_grad():
            for entry in text_entries(model):
                if entry.pooled == pooled:
                    model.denoiser.get_parameter(entry.weight)[:, slice(*entry.columns)] = 0
        dog, house = predicted(model, "a dog"), predicted(model, "a house")
        heard = (dog - house).norm() / house.norm()
        if pooled:  # of SD 1 nothing is shut yet
            assert heard > 1e-3  # in FLUX.1 one token of 512 differs
        else:
            assert heard < 1e-6  # control: both are shut


def test_words_are_one_token_each(family):
    pipeline = miniatures.pipeline(family, words=("a", "zebra"))
    for name, tokenizer in pipeline.components.items():
        if name.startswith("tokenizer"):
            count = lambda text, tokenizer=tokenizer: len(tokenizer(text, add_special_tokens=False).input_ids)
            assert count("zebra") == 1
            assert count("dog") > 2  # control: its letters


def test_another_family_is_refused():
    with pytest.raises(ValueError, match="miniatures of sd1, sdxl, sd3, flux, got 'pixart'"):
        miniatures.pipeline("pixart")


def test_the_exercises_tell_what_is_wrong():
    folded = lambda w, b, c, c_star: w + torch.outer(w @ (c_star - c) + b, c) / (c @ c)
    with pytest.raises(AssertionError, match="yours is off by"):
        exercises.check_entry_weight(folded)
    everything = lambda w, b, c, c_star: torch.outer(w @ c_star, c) / (c @ c)
    with pytest.raises(AssertionError, match="right angle"):
        exercises.check_entry_weight(everything)
    with pytest.raises(AssertionError, match="off by"):
        exercises.check_noise_of(lambda x, v, s: x + s * v)
