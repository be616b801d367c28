"""What the benchmark at the true shapes counts is what a fit does; and on a GPU, the true shape itself."""

from dataclasses import replace

import pytest
import torch
from conftest import benchmark_script, tiny_pipeline

import erasekit as ek
from erasekit import models


@pytest.fixture(scope="module")
def benchmark():
    with benchmark_script("stable_diffusion") as module:
        yield module


# (method, settings, prompts, kept): with one sampler step, or cached states, nothing of the count is left to chance
COUNTED = {
    "esd drawn": ("esd", dict(sampler=1, batch=2), 1, 0),
    "esd cached": ("esd", dict(sampler=3, states="cached", noises=2), 1, 0),
    "advunlearn drawn": (
        "advunlearn", dict(sampler=1, warmup=0, attack_steps=3, retain_batch=2), 1, 2,
    ),
    "advunlearn cached": (
        "advunlearn", dict(sampler=2, warmup=0, attack_steps=2, retain_batch=2, states="cached", noises=2), 1, 2,
    ),
    "advunlearn warm": ("advunlearn", dict(sampler=1, warmup=1, attack_steps=3, retain_batch=2), 1, 2),
    "trce": ("trce", dict(stages="trajectory", sampler=4, early=2, noises=2, calm=3, keep_batch=3), 1, 0),
    "trce, whole way": (
        "trce", dict(stages="trajectory", sampler=2, early=2, noises=1, calm=1, branches="text", reference="original"),
        1, 0,
    ),
    "realera": ("realera", dict(sampler=2, noises=2, lora_n=2, lora_m=3, templates=("{}", "a {}")), 2, 0),
    "mace": ("mace", dict(sampler=3, pictures=2, batch=2), 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_the_count_of_latents_is_that_of_a_fit(benchmark, name, tmp_path):
    method, settings, prompts, kept = COUNTED[name]
    config = getattr(ek, method).Config(iterations=1, **settings)
    model = models.load(tiny_pipeline())
    with benchmark.Meter() as meter:
        getattr(ek, method).fit(
            model, "church", ["house", "dog"], config=config, folder=tmp_path, callback=meter.mark
        )
    expected = benchmark.latents(method, config, prompts, kept)
    set_up, one = meter.between(0, 1), meter.between(1, 2)
    assert len(meter.marks) == 3
    assert (set_up["free"], set_up["trained"]) == (expected.set_up, 0)
    assert (one["free"], one["trained"]) == (pytest.approx(expected.free), expected.trained)
    forward = type(model.unet).forward
    assert forward.__module__.startswith("diffusers"), "the meter left the UNet as it was"


def test_expected_steps_are_the_mean_over_all_picks(benchmark):
    for sampler, rows in ((5, 1), (4, 2), (3, 3)):
        picks = torch.cartesian_prod(*[torch.arange(sampler)] * rows).view(-1, rows)
        furthest = picks.max(1).values.clamp_min(1)
        assert benchmark.steps(sampler, rows) == pytest.approx(furthest.double().mean().item())


@pytest.mark.parametrize("family", ["sd14", "sd21", "sdxl"])
def test_pipelines_have_the_true_shapes(benchmark, family):
    """Parameters of the published models (diffusers' configurations), counted without memory."""
    with torch.device("meta"):
        made = benchmark.pipeline(family)
    count = lambda part: sum(p.numel() for p in getattr(made, part).parameters())
    assert count("unet") == {"sd14": 859520964, "sd21": 865910724, "sdxl": 2567463684}[family]
    assert count("vae") == 83653863
    assert count("text_encoder") == {"sd14": 123060480, "sd21": 340387840, "sdxl": 123060480}[family]
    assert made.tokenizer.model_max_length == 77


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_true_shape_on_a_gpu(benchmark, tmp_path):
    """Stable Diffusion 1.4 with random weights: load, one step of ESD, one of the sampler, in half precision."""
    torch.manual_seed(0)
    benchmark.pipeline("sd14").save_pretrained(tmp_path / "sd14")
    model = ek.load(tmp_path / "sd14")
    assert model.device.type == "cuda" and model.dtype == torch.float16
    seen = []
    config = replace(ek.esd.PRESETS["sd14-artist"], iterations=1, sampler=2)
    edit = ek.esd.fit(
        model, "church", config=config, folder=tmp_path, callback=lambda state: seen.append(state["loss"])
    )
    assert len(seen) == 1 and 0 < seen[0] < float("inf")
    before = model.generate("a church", steps=1)[0]
    with edit.applied(model, scale=1000.0):
        after = model.generate("a church", steps=1)[0]
    assert before.size == after.size == (512, 512) and before.tobytes() != after.tobytes()
    assert model.generate("a church", steps=1)[0].tobytes() == before.tobytes()
    assert torch.cuda.max_memory_allocated() < 16e9
