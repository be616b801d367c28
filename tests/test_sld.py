"""SLD: its formula step by step, in our loop, in the stock pipeline and in diffusers' own pipeline of the paper."""

import copy
import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from conftest import LENGTH, check_dogs_go_and_cats_stay, tiny_pipeline
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler

import erasekit as ek
from erasekit.filters import NEAR, Drawing
from erasekit.filters import sld as guided
from erasekit.methods import sld
from erasekit.methods.sld import Config
from erasekit.sampling import switched

PROMPTS, SEEDS, GUIDANCE = ["a church in flat style", "a dog"], [0, 1], 3.0
ALL = Config(delta=0, s_s=0.0, lam=100.0, s_m=0.0, beta_m=0.0, clamp="max")  # mu = 1 for every element
SOME = Config(delta=2, s_s=30.0, lam=0.02, s_m=0.5, beta_m=0.7)


@pytest.fixture
def exact():
    """The tiny model in double precision."""
    model = ek.load(tiny_pipeline(), dtype="float64")
    model.pipeline.set_progress_bar_config(disable=True)
    return model


def noise(model, seeds=SEEDS) -> torch.Tensor:
    shape = (model.unet.config.in_channels, *model.latent_size)
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(model.dtype)


def ours(model, prompts=PROMPTS, seeds=SEEDS, steps=5, guidance=GUIDANCE, **settings) -> torch.Tensor:
    settings = dict(steps=steps, guidance=guidance, decode=False) | settings
    return model.draw(model.encode(prompts), seeds, **settings)


def stock(model, prompts=PROMPTS, seeds=SEEDS, steps=5, guidance=GUIDANCE, **settings) -> torch.Tensor:
    settings = dict(output_type="latent", height=16, width=16, latents=noise(model, seeds)) | settings
    return model.pipeline(prompts, num_inference_steps=steps, guidance_scale=guidance, **settings).images


@torch.no_grad()
def literal(
    model, c: Config, concept="church", prompts=PROMPTS, seeds=SEEDS, steps=5, guidance=GUIDANCE, s=1.0
):
    """The paper's equations, one element of the latents after the other where they say so."""
    scheduler = copy.deepcopy(model.scheduler)
    scheduler.set_timesteps(steps)
    x, text = noise(model, seeds) * scheduler.init_noise_sigma, model.encode(prompts)
    nu = torch.zeros_like(x)
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        ask = lambda rows, seen=seen, t=t: model.unet.forward(seen, t, rows).sample
        others = (rows.expand(len(x), -1, -1) for rows in (stored(model, concept), model.encode("")))
        e_c, e_s, e_0 = (ask(rows) for rows in (text, *others))
        gamma = []
        for c_, s_, zero, before in zip(
            *(one.flatten().tolist() for one in (e_c, e_s, e_0, nu)), strict=True
        ):
            phi = abs(c.s_s * (c_ - s_))
            mu = (min(phi, 1.0) if c.clamp == "min" else max(phi, 1.0)) if c_ - s_ < c.lam else 0.0
            gamma.append(mu * (s_ - zero) + c.s_m * before)
        gamma = torch.tensor(gamma, dtype=x.dtype).view_as(x)
        nu = c.beta_m * nu + (1 - c.beta_m) * gamma
        led = e_c - e_0 - (s * gamma if i >= c.delta else 0)
        x = scheduler.step(e_0 + guidance * led, t, x).prev_sample
    return x


def stored(model, concept="church") -> torch.Tensor:
    """The embedding (1, length, d) of the concept as an edit keeps it, in single precision."""
    return model.encode(concept).float().to(model.dtype)


def far(a, b) -> float:
    return float((a - b).abs().max())


# The formula


@pytest.mark.parametrize(
    "sampler", [DDIMScheduler, PNDMScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_both_ways_of_drawing_are_the_papers_equations_over_several_steps(exact, sampler):
    """PNDM and Heun look twice at a time step: the warm-up counts each look, as the loop of the paper's code does."""
    exact.pipeline.scheduler = switched(exact.scheduler, sampler)
    wanted, plain = literal(exact, SOME), ours(exact)
    with sld.fit(exact, "church", config=SOME).applied(exact):
        torch.testing.assert_close(ours(exact), wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(stock(exact), wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(ours(exact), wanted, rtol=0, atol=1e-10)  # begins anew
    assert far(wanted, plain) > 1e-3


def test_every_setting_counts_in_the_equations(exact):
    """The control: with another one they give something else."""
    wanted = literal(exact, SOME)
    for changes in (
        {"delta": 0},
        {"s_m": 0.0},
        {"beta_m": 0.2},
        {"lam": 0.0},
        {"s_s": 1.0},
        {"clamp": "max"},
    ):
        assert far(literal(exact, dataclasses.replace(SOME, **changes)), wanted) > 1e-6, changes


@pytest.mark.skipif(not hasattr(diffusers, "StableDiffusionPipelineSafe"), reason="diffusers has dropped it")
@pytest.mark.parametrize("preset", ["weak", "medium", "strong", "max"])
def test_the_presets_draw_what_diffusers_own_pipeline_of_the_paper_draws(exact, preset):
    from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig

    theirs = getattr(SafetyConfig, preset.upper())
    c = sld.PRESETS[f"sd14-{preset}"]
    assert theirs == {
        "sld_warmup_steps": c.delta, "sld_guidance_scale": c.s_s, "sld_threshold": c.lam,
        "sld_momentum_scale": c.s_m, "sld_mom_beta": c.beta_m,
    }  # fmt: skip
    safe = diffusers.StableDiffusionPipelineSafe(**exact.pipeline.components, requires_safety_checker=False)
    safe.set_progress_bar_config(disable=True)
    safe.safety_concept = "church"
    given = dict(num_inference_steps=17, guidance_scale=GUIDANCE, height=16, width=16, latents=noise(exact))
    wanted = safe(PROMPTS, output_type="np", **given, **theirs).images
    plain = stock(exact, steps=17, output_type="np")
    with sld.fit(exact, "church", config=c).applied(exact):
        np.testing.assert_allclose(stock(exact, steps=17, output_type="np"), wanted, rtol=0, atol=1e-5)
    assert np.abs(plain - wanted).max() > 1e-3


def test_the_strength_is_that_of_gamma_and_the_momentum_is_not_weakened_by_it(exact):
    with sld.fit(exact, "church", config=SOME).applied(exact, 0.4):
        torch.testing.assert_close(ours(exact), literal(exact, SOME, s=0.4), rtol=0, atol=1e-10)


@pytest.mark.parametrize("guidance", [1.5, 3.0, 7.5])
def test_with_mu_one_it_is_a_negative_prompt(exact, guidance):
    """e_S + w (e_c - e_S) = e_0 + w (e_c - e_0 - gamma) for gamma = (1 - 1/w) (e_S - e_0)."""
    uncond = stored(exact)[0]
    wanted = ours(exact, guidance=guidance, uncond=uncond)
    by_stock = stock(exact, guidance=guidance, negative_prompt=["church"] * 2)
    edit, plain = sld.fit(exact, "church", config=ALL), ours(exact, guidance=guidance)
    with edit.applied(exact, 1 - 1 / guidance):
        torch.testing.assert_close(ours(exact, guidance=guidance), wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(stock(exact, guidance=guidance), by_stock, rtol=0, atol=1e-5)
    with edit.applied(exact):  # the control: whole, it is e_0 + w (e_c - e_S)
        assert far(ours(exact, guidance=guidance), wanted) > 1e-3
    assert far(plain, wanted) > 1e-3


def test_a_picture_with_the_negative_prompt_is_the_same(model):
    """In single precision, decoded: within a level."""
    pictures = lambda **more: np.stack(
        [np.asarray(one) for one in model.generate(PROMPTS, SEEDS, 5, GUIDANCE, **more)]
    ).astype(int)
    wanted, plain = pictures(negative="church"), pictures()
    with sld.fit(model, "church", config=ALL).applied(model, 1 - 1 / GUIDANCE):
        assert np.abs(pictures() - wanted).max() <= 1 < np.abs(plain - wanted).max()


@pytest.mark.parametrize("still", [{"lam": -100}, {"delta": 5}, {"clamp": "min", "s_s": 0.0}])
def test_where_mu_is_nothing_or_the_warm_up_never_ends_every_bit_stays(model, still):
    plain = ours(model), stock(model)
    for changes, same in ((still, True), ({}, False)):  # the control
        with sld.fit(model, "church", config=dataclasses.replace(ALL, **changes)).applied(model):
            found = ours(model), stock(model)
        assert [torch.equal(*pair) for pair in zip(found, plain, strict=True)] == [same, same]


def test_the_first_steps_are_left_alone_and_the_momentum_builds_up_meanwhile(exact):
    def course(config, scale=1.0):
        seen = []
        with sld.fit(exact, "church", config=config).applied(exact, scale):
            ours(exact, callback=lambda state: seen.append(state["latents"]))
        return seen

    plain, late = course(SOME, 0.0), course(SOME)
    assert [torch.equal(*pair) for pair in zip(plain, late, strict=True)] == [True, True, False, False, False]
    assert far(course(dataclasses.replace(SOME, s_m=0.0))[2], late[2]) > 1e-6


def test_the_formula_is_computed_in_single_precision_at_least():
    e_c, e_s, e_0 = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).half()
    given = dict(s_s=5000.0, lam=1.0, s_m=0.5, beta_m=0.7, clamp="max")
    gamma, nu = guided(e_c * 100, e_s, e_0, torch.zeros(100), **given)
    assert gamma.dtype == nu.dtype == torch.float32 and gamma.abs().max() > 1e5 and gamma.isfinite().all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision_it_acts_and_is_undone(dtype):
    model = ek.load(tiny_pipeline(), dtype=dtype)
    plain, edit = ours(model), sld.fit(model, "church", config=SOME)
    with edit.applied(model, 0.0):
        assert torch.equal(ours(model), plain)
    with edit.applied(model):
        found = ours(model)
    assert found.dtype is plain.dtype and found.isfinite().all() and far(found, plain) > 1e-2
    assert torch.equal(ours(model), plain)


# Rows of a call


def test_two_pictures_at_once_are_two_pictures_in_any_number_of_threads(model):
    prompts = [*PROMPTS, "a house", "dog", "castle", "a church"]
    seeds = list(range(len(prompts)))
    threads = torch.get_num_threads()
    with sld.fit(model, "church", config=SOME).applied(model):
        alone = torch.cat([ours(model, [p], [s]) for p, s in zip(prompts, seeds, strict=True)])
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                assert torch.equal(ours(model, prompts, seeds), alone)
        finally:
            torch.set_num_threads(threads)
    assert not torch.equal(ours(model, prompts, seeds), alone)


@torch.no_grad()
def asked(model, prompts, t=500, seed=0, **more) -> torch.Tensor:
    """One call of the UNet: the same latents for all prompts."""
    x = noise(model, [seed]).expand(len(prompts), -1, -1, -1)
    return model.unet(x, t, encoder_hidden_states=model.encode(prompts), **more).sample


def test_rows_of_the_empty_prompt_stay_and_the_others_take_e_0_from_them_or_compute_it(exact):
    plain = asked(exact, ["", "", "a dog", "church"])
    with sld.fit(exact, "church", config=ALL).applied(exact):
        together, mixed = asked(exact, ["", "", "a dog", "a church"]), asked(exact, ["a dog", "", "a church"])
        alone = asked(exact, ["a dog"])
    assert torch.equal(together[:2], plain[:2])
    wanted = plain[2] - (plain[3] - plain[0])
    for found in (together[2], mixed[0], alone[0]):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[0], alone[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed[1], plain[0], rtol=0, atol=1e-12)
    assert far(wanted, plain[2]) > 1e-3


def test_the_other_half_counts_as_e_0_only_with_the_same_latents(exact):
    """Else the difference of two noises would be taken for the concept."""
    x, rows = noise(exact, [0, 1]), exact.encode(["", "a dog"])
    with torch.no_grad(), sld.fit(exact, "church", config=ALL).applied(exact):
        found = exact.unet(x, 500, rows).sample[1]
        torch.testing.assert_close(found, asked(exact, ["a dog"], seed=1)[0], rtol=0, atol=1e-12)


def test_what_else_the_unet_is_told_goes_along_row_by_row(exact):
    """As a ControlNet adds residuals of its own to each row."""
    shapes = []
    hook = exact.unet.mid_block.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    asked(exact, ["a dog"])
    hook.remove()
    mids = torch.randn(2, *shapes[0][1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    beside = lambda rows: {
        "mid_block_additional_residual": rows,
        "down_block_additional_residuals": [torch.zeros(len(rows), 1, 1, 1, dtype=rows.dtype)] * downs,
    }
    downs = 1 + sum(len(b.resnets) + bool(b.downsamplers) for b in exact.unet.down_blocks)
    with sld.fit(exact, "church", config=ALL).applied(exact):
        found = asked(exact, ["a dog", "a house"], **beside(mids))
        for i, prompt in enumerate(["a dog", "a house"]):
            alone = asked(exact, [prompt], **beside(mids[i : i + 1]))
            torch.testing.assert_close(found[i], alone[0], rtol=0, atol=1e-12)
    assert (
        far(asked(exact, ["a dog"], **beside(mids[:1])), asked(exact, ["a dog"], **beside(mids[1:]))) > 1e-3
    )


def test_a_negative_prompt_is_filtered_as_any_text(exact):
    edit = sld.fit(exact, "church", config=ALL)
    plain = asked(exact, ["a house", "a dog", "church", ""])
    with edit.applied(exact):
        found = asked(exact, ["a house", "a dog"])
    torch.testing.assert_close(found, plain[:2] - (plain[2] - plain[3]), rtol=0, atol=1e-6)


def test_an_edit_of_the_text_encoder_beside_it_moves_the_empty_prompt_which_is_still_known(exact):
    name = "text_encoder.final_layer_norm.bias"
    name = (
        name
        if name.split(".", 1)[1] in dict(exact.text_encoder.named_parameters())
        else ("text_encoder.text_model.final_layer_norm.bias")
    )
    delta = torch.full_like(exact.text_encoder.get_parameter(name.split(".", 1)[1]), 0.3)
    moved, edit = ek.Edit.from_weight_delta({name: delta}, exact), sld.fit(exact, "church", config=ALL)
    before = exact.encode("")
    with moved.applied(exact):
        plain = asked(exact, ["", "a dog"])
        assert (exact.encode("") - before).norm() > 3 * NEAR * before.norm()
    for outer, inner in ((moved, edit), (edit, moved)):
        with outer.applied(exact), inner.applied(exact):
            found = asked(exact, ["", "a dog"])
        assert torch.equal(found[0], plain[0]) and far(found[1], plain[1]) > 1e-3


@pytest.mark.parametrize("form", ["a tuple", "an output", "by place"])
def test_a_call_is_answered_in_its_own_form(model, form):
    x, rows = noise(model, [0]), model.encode("a dog")
    with torch.no_grad(), sld.fit(model, "church", config=ALL).applied(model):
        wanted = asked(model, ["a dog"])
        if form == "a tuple":
            (found,) = model.unet(x, 500, encoder_hidden_states=rows, return_dict=False)
        elif form == "an output":
            found = model.unet(sample=x, timestep=torch.tensor(500), encoder_hidden_states=rows)["sample"]
        else:
            found = model.unet(x, torch.tensor([500]), rows).sample
    assert torch.equal(found, wanted)


def test_a_prompt_that_is_not_padded_is_refused(model):
    x, rows = noise(model, [0]), model.encode("a dog", length=5)
    with sld.fit(model, "church").applied(model), pytest.raises(ValueError, match="pad prompts to the limit"):
        model.unet(x, 500, rows)
    assert model.encode("a dog").shape[1] == LENGTH


# Calls that follow each other


def test_a_drawing_goes_on_where_the_time_step_falls_and_the_texts_stay():
    text = torch.ones(1, 2, 3)
    drawing = Drawing(900.0, text, text, last=900.0)
    assert drawing.goes_on(600.0, text.clone()) and not drawing.goes_on(600.0, 2 * text)
    assert not drawing.goes_on(900.0, text) and not drawing.goes_on(950.0, text)
    drawing.last = 600.0
    assert drawing.goes_on(600.0, text) and drawing.goes_on(1.0, text)
    assert not drawing.goes_on(601.0, text) and not drawing.goes_on(1.0, text.repeat(2, 1, 1))


def test_calls_with_gradients_or_time_steps_of_their_own_stand_by_themselves(exact):
    """As attacks make them: gamma without momentum and without warm-up, whatever was drawn before."""
    config = dataclasses.replace(SOME, s_m=0.9)
    by_itself = dataclasses.replace(config, delta=0, s_m=0.0)
    x, rows = noise(exact), exact.encode(PROMPTS)
    with sld.fit(exact, "church", config=by_itself).applied(exact):
        wanted = {t: exact.unet(x, torch.tensor(t), rows).sample.detach() for t in (900, 500)}
        with torch.no_grad():
            wanted["each"] = exact.unet(x, torch.tensor([900, 500]), rows).sample
    with sld.fit(exact, "church", config=config).applied(exact):
        for t in (900, 500):
            found = exact.unet(x, torch.tensor(t), rows).sample
            assert torch.equal(found.detach(), wanted[t]) and found.requires_grad
        with torch.no_grad():
            assert torch.equal(exact.unet(x, torch.tensor([900, 500]), rows).sample, wanted["each"])
            drawn = [exact.unet(x, t, rows).sample for t in (900, 500, 300)]  # the control: a drawing
            plain = [exact.unet.forward(x, t, rows).sample for t in (900, 500, 300)]
    assert [torch.equal(*pair) for pair in zip(drawn, plain, strict=True)] == [True, True, False]


def test_the_gradient_is_that_of_the_formula_in_the_text(exact):
    """By a difference, in the direction of the gradient."""
    x, rows = noise(exact, [0]), exact.encode("a dog")
    config = dataclasses.replace(ALL, clamp="min", s_s=0.5)
    with sld.fit(exact, "church", config=config).applied(exact):
        loss = lambda text: exact.unet(x, 500, text).sample.square().sum()
        (gradient,) = torch.autograd.grad(loss(rows.requires_grad_()), rows)
        step = 1e-5 * gradient / gradient.norm()
        slope = (loss(rows + step) - loss(rows - step)) / (2 * step.norm())
    torch.testing.assert_close(slope.detach(), gradient.norm(), rtol=1e-4, atol=0)
    (unfiltered,) = torch.autograd.grad(loss(rows), rows)
    assert far(gradient, unfiltered) > 1e-3 * float(gradient.abs().max())


def test_a_file_draws_the_same_and_nothing_is_left_after_an_exception(model, tmp_path):
    plain, edit = ours(model), sld.fit(model, ["church", "dog"], ["house"], config=SOME)
    assert torch.equal(edit.tensors["concept"], model.encode("church, dog"))
    edit.save(tmp_path / "edit.safetensors")
    with edit.applied(model):
        wanted = ours(model)
    with pytest.raises(KeyError), ek.Edit.load(tmp_path / "edit.safetensors").applied(model):
        assert torch.equal(ours(model), wanted) and far(wanted, plain) > 1e-3
        raise KeyError
    assert not model.unet._forward_hooks and torch.equal(ours(model), plain)


def test_it_tells_what_it_did_and_knows_its_presets(model):
    states = []
    edit = sld.fit(model, ["church", "dog"], callback=states.append)
    assert states == [{"step": 0, "concepts": 2}] and edit.kind == "guidance_filter"
    assert edit.metadata["filter"] == {
        "formula": "sld", "delta": 10, "s_s": 1000.0, "lam": 0.01, "s_m": 0.3, "beta_m": 0.4, "clamp": "min",
    }  # fmt: skip
    assert sld.PRESETS["sd14-object"] == sld.PRESETS["sd14-medium"] == Config()
    assert "guidance_filter, sld with delta=10" in edit.summary() and "dog" in edit.summary()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"erase": "church", "preserve": ["church"]}, "both erased and preserved"),
        ({"erase": []}, "nothing to erase"),
        ({"erase": "church", "anchor": "house"}, "nothing in the place of a concept"),
        ({"erase": [f"dog {'a ' * i}b" for i in range(19)]}, "shorten"),
    ],
)
def test_bad_input(model, given, said):
    with pytest.raises(ValueError, match=said):
        ek.sld.fit(model, **given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"delta": -1}, "delta must be"),
        ({"delta": 1.5}, "delta must be a whole number"),
        ({"s_s": -1}, "s_s must be"),
        ({"lam": float("nan")}, "lam must be"),
        ({"s_m": -1}, "s_m must be"),
        ({"beta_m": 1.0}, "beta_m must be below 1"),
        ({"clamp": "both"}, "clamp must be min or max"),
        ({"template": "x"}, "exactly one"),
    ],
)
def test_bad_settings(changes, said):
    with pytest.raises(ValueError, match=said):
        Config(**changes)


def test_another_family_is_refused(model, monkeypatch):
    monkeypatch.setattr(type(model), "own_loop", False)
    with pytest.raises(ValueError, match="erase by uce or rece"):
        ek.sld.fit(model, "church")


@pytest.mark.slow
def test_dogs_go_and_cats_stay_in_the_emoji_world(tmp_path):
    check_dogs_go_and_cats_stay(sld, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_an_accelerator():
    here = ek.load(tiny_pipeline())
    with sld.fit(here, "church", config=SOME).applied(here):
        wanted = ours(here)
    for dtype, close in ((torch.float32, 1e-2), (torch.float16, None), (torch.bfloat16, None)):
        there = ek.load(tiny_pipeline(), device="cuda", dtype=dtype)
        edit, plain = sld.fit(there, "church", config=SOME), ours(there)
        with edit.applied(there):
            found = ours(there)
        assert found.isfinite().all() and far(found, plain) > 1e-2
        assert close is None or far(found.cpu(), wanted) < close
        assert torch.equal(ours(there), plain)
