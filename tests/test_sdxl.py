"""SDXL in a loop of our own, and the methods that train on it: tiny random pipelines of the real classes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import tiny
from test_families import TRAINED, context, picture, sdxl

import erasekit as ek
from erasekit.conditioning import Conditioning, joined, predict
from erasekit.layers import cross_attention_kv, text_parameters
from erasekit.methods import advunlearn, mace
from erasekit.states import Picks, States
from erasekit.tokens import token_tables

KEEP = ["dog", "house"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    with torch.random.fork_rng(devices=[]):
        sdxl().save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved):
    return ek.load(saved)


def config(name: str, **changes):
    return replace(getattr(ek, name).Config(**TRAINED[name]), **changes)


def levels(pictures) -> np.ndarray:
    return np.stack([np.asarray(one) for one in pictures]).astype(int)


# The loop


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("size", [{}, {"height": 16, "width": 32}])
def test_the_loop_draws_what_the_stock_pipeline_draws(model, zeros, size):
    """Pooled text, sizes, and what guidance leads away from, are those of the pipeline."""
    model.pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    prompts, seeds = ["a church", "a dog"], [3, 4]
    stock = levels(
        model.generate(prompts, seeds, steps=3, guidance=4.0, **({"height": 16, "width": 16} | size))
    )
    told = model.conditioning(prompts)
    draw = lambda told, **more: levels(model.draw(told, seeds, steps=3, guidance=4.0, **size, **more))
    assert np.abs(draw(told) - stock).max() <= 1
    # controls: another pooled text, and guidance away from the other kind of nothing
    assert np.abs(draw(Conditioning(told.rows, told.pooled.flip(0), told.scale)) - stock).max() > 1
    other = model.conditioning("").each(lambda one: one if zeros else torch.zeros_like(one))
    assert np.abs(draw(told, uncond=other) - stock).max() > 1


def test_the_sizes_of_the_picture_are_told(model):
    told = model.conditioning("a church")
    sample, seen = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0)), []
    hook = model.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    with torch.no_grad():
        predict(model.unet, sample, 3, told)
    hook.remove()
    side = 8 * model.pipeline.vae_scale_factor
    assert seen[0]["time_ids"].tolist() == [[side, 2 * side, 0, 0, side, 2 * side]]
    assert torch.equal(seen[0]["text_embeds"], told.pooled)


def test_embeddings_without_pooled_text_are_refused_and_so_is_the_opposite(model, shared_model):
    with pytest.raises(ValueError, match="pooled text"):
        model.draw(model.encode("a church"), [0])
    with pytest.raises(ValueError, match="pooled text"):
        model.draw(model.conditioning("a church"), [0], uncond=model.encode("")[0])
    with pytest.raises(ValueError, match="pooled text"):
        shared_model.draw(Conditioning(shared_model.encode("church"), torch.zeros(1, 4)), [0])


def test_conditioning_is_what_the_pipeline_feeds(model):
    with pytest.raises(ValueError, match="FluxPipeline is drawn by its pipeline"):
        ek.load(tiny("flux")).conditioning("a church")
    with pytest.raises(ValueError, match="no prompt to encode"):
        model.conditioning([])
    stock, told = context(model.pipeline, "a church"), model.conditioning(["a dog", "a church"])[1:]
    assert torch.allclose(told.rows, stock["prompt_embeds"], atol=1e-5)
    assert torch.allclose(told.pooled, stock["pooled_prompt_embeds"], atol=1e-5)
    assert not torch.allclose(model.conditioning("a dog").pooled, told.pooled, atol=1e-2)


def test_parts_of_a_conditioning(model):
    a, b = model.conditioning(["a church", "a dog"]), model.conditioning("house")
    both = joined([a, b])
    assert len(both) == 3 and torch.equal(
        both[torch.tensor([2, 0])].pooled, torch.cat([b.pooled, a.pooled[:1]])
    )
    assert b.times(4).pooled.shape == (4, *b.pooled.shape[1:])
    rows = torch.arange(4.0).reshape(4, 1, 1)
    doubled = a.with_rows(rows)
    assert torch.equal(doubled.rows, rows) and torch.equal(doubled.pooled, a.pooled[[0, 0, 1, 1]])


@pytest.mark.parametrize("source", ["frozen", "cached"])
def test_states_are_points_of_the_pipelines_way(model, source, tmp_path):
    """x_t at the noisy end is the noise of the seed; what is predicted there for the prompt is the UNet's answer."""
    states = States(model, ["a church", "a dog"], 5, 3.0, 4, source, 2, folder=tmp_path)
    last = torch.tensor([3, 3])
    state = states.at(Picks(torch.tensor([0, 1]), torch.tensor([0, 1]), last, torch.zeros(2)))
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5 + 7919 * i + i)) for i in (0, 1)]
    assert torch.allclose(state.sample, torch.stack(noise), atol=1e-6)
    with torch.no_grad():
        call = lambda told: predict(model.unet, state.sample, state.timestep, told)
        assert torch.allclose(state.text, call(model.conditioning(["a church", "a dog"])), atol=1e-4)
        assert torch.allclose(state.uncond, call(model.unconditional().times(2)), atol=1e-4)
        assert not torch.allclose(state.text, call(model.conditioning(["a dog", "a church"])), atol=1e-3)


# Training


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "esd"])
def test_a_trained_edit_comes_back_from_disk_and_shows_in_the_stock_pipeline(model, name, saved, tmp_path):
    made = config(
        name, lr=1e-3 if name == "advunlearn" else 1e-2
    )  # long enough steps to be seen in a picture
    edit = getattr(ek, name).fit(model, "church", KEEP, config=made, folder=tmp_path)
    edit.save(tmp_path / "edit.safetensors")
    plain = picture(model.pipeline, prompt="a church")
    with edit.applied(model):
        edited = picture(model.pipeline, prompt="a church")
    assert np.abs(edited - plain).max() > 2
    np.testing.assert_array_equal(picture(model.pipeline, prompt="a church"), plain)
    fresh = ek.load(saved)
    with ek.Edit.load(tmp_path / "edit.safetensors").applied(fresh):
        np.testing.assert_array_equal(picture(fresh.pipeline, prompt="a church"), edited)


def test_adversarial_training_moves_both_text_encoders(model, tmp_path):
    edit = ek.advunlearn.fit(model, "church", KEEP, config=config("advunlearn", lr=1e-3), folder=tmp_path)
    moved = {name for name, tensor in edit.tensors.items() if tensor.any()}
    first, second = (
        {f"{part}.{name}" for name in text_parameters(encoder)}
        for part, encoder in model.text_encoders.items()
    )
    # the first encoder is read before its last layer; the pooled text is read from behind the second's
    last = {name for name in first if ".layers.2." in name or "final_layer_norm" in name}
    assert last and moved >= first - last and not moved & last and moved >= second
    assert set(edit.tensors) == moved and edit.kind == "weight_delta"


@pytest.mark.parametrize("placement", ["prefix", "suffix", "replace", "add"])
def test_the_attacker_writes_into_both_text_encoders(model, placement):
    """With the embeddings of real tokens in the free places it is the prompt with these tokens, pooled text as well."""
    settings = config("advunlearn", placement=placement)
    where = advunlearn.slots(model, ["a church"], settings)
    (dog,) = model.tokenizer("dog", add_special_tokens=False).input_ids
    words = token_tables(model.text_encoders.values())[dog].expand(1, 1, -1)
    given = torch.zeros_like(where.base) if placement == "add" else words
    written = {"prefix": "dog a church", "suffix": "a church dog", "add": "a church", "replace": None}[
        placement
    ]
    encoders = list(model.text_encoders.values())
    delta = given.clone().requires_grad_(True)
    found = where.text(encoders, delta)
    if written:
        stock = model.conditioning(written)
        assert torch.allclose(found.rows, stock.rows, atol=1e-4)
        assert torch.allclose(found.pooled, stock.pooled, atol=1e-4)
    (found.rows.square().sum() + found.pooled.square().sum()).backward()
    first = model.text_encoder.config.hidden_size
    assert delta.grad[..., :first].any() and delta.grad[..., first:].any()


def test_a_lora_takes_the_attention_from_the_concept(model, tmp_path):
    """MACE's second stage on SDXL lowers its own loss, on the pictures it was trained on; without training it stays."""
    (concept,) = model.concepts("church")
    settings = mace.Config(
        templates=("a {}",), iterations=30, lr=3e-2, batch=2, pictures=2, sampler=3, guidance=3.0, focal=False
    )
    pictures = mace.shown(model, concept, settings, 0)
    assert pictures.latents.shape == (2, 4, 8, 8) and 0 < pictures.masks.mean() <= 1
    seen = {}
    for rate in (3e-2, 1e-9):
        losses = []
        mace.suppress(
            model, concept, pictures, replace(settings, lr=rate), torch.Generator().manual_seed(0),
            lambda state, losses=losses: losses.append(float(state["loss"])), tmp_path,
        )  # fmt: skip
        seen[rate] = np.mean(losses[-5:]) / np.mean(losses[:5])
    assert seen[3e-2] < 0.8 < seen[1e-9]


@pytest.mark.parametrize("name", ["mace", "realera", "trce"])
def test_the_pooled_entry_has_what_the_closed_form_gives_it(model, name, tmp_path):
    """The stages that train leave the pooled text alone, and the keys and values of TRCE; of a LoRA those move."""
    made = config(name)
    closed = replace(made, **({"stages": "text"} if name == "trce" else {"lora": False}))
    fit = lambda config: getattr(ek, name).fit(model, "church", KEEP, config=config, folder=tmp_path)
    first, whole = fit(closed).merged(model).unet, fit(made).merged(model).unet
    was, closed_form, trained = (unet.get_parameter for unet in (model.unet, first, whole))
    pooled = "add_embedding.linear_1.weight"
    scale = (closed_form(pooled) - was(pooled)).abs().max()
    assert scale > 0 and (trained(pooled) - closed_form(pooled)).abs().max() < 2e-3 * scale
    moved = max(
        float((trained(key) - closed_form(key)).detach().abs().max())
        for key in cross_attention_kv(model.unet)
    )
    assert (moved > 1e-4) == (name != "trce")


@pytest.mark.parametrize("name", ["mace", "realera", "trce"])
def test_a_lora_of_a_trained_edit_draws_what_the_edit_draws(model, name, tmp_path):
    edit = getattr(ek, name).fit(
        model, "church", KEEP, config=config(name, lr=1e-2), folder=tmp_path / "training"
    )
    plain = picture(model.pipeline, prompt="a church")
    with edit.applied(model):
        edited = picture(model.pipeline, prompt="a church")
    edit.to_lora(tmp_path / "lora", model=model)
    model.pipeline.load_lora_weights(tmp_path / "lora")
    assert np.abs(picture(model.pipeline, prompt="a church") - edited).max() <= 2
    assert np.abs(plain - edited).max() > 2


def test_an_edit_of_two_text_encoders_is_a_whole_model(model, tmp_path):
    edit = ek.advunlearn.fit(
        model, "church", KEEP, config=config("advunlearn", lr=1e-3), folder=tmp_path / "training"
    )
    for refused in (edit.to_lora, edit.to_kohya, edit.to_lycoris, edit.to_projections, edit.to_text_encoder):
        with pytest.raises(ValueError, match="`merged`|use merged"):
            refused(tmp_path / "export.safetensors", model=model)
    merged = edit.merged(model)
    merged.save_pretrained(tmp_path / "model")
    stock = type(model.pipeline).from_pretrained(tmp_path / "model", add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    drawn = picture(merged.pipeline, prompt="a church")
    assert np.abs(picture(stock, prompt="a church") - drawn).max() <= 1
    assert np.abs(picture(model.pipeline, prompt="a church") - drawn).max() > 2


def test_what_is_not_drawn_from_noise_is_refused(model, tmp_path):
    from diffusers import StableDiffusionXLImg2ImgPipeline

    over = ek.load(StableDiffusionXLImg2ImgPipeline(**model.pipeline.components))
    for name in ("mace", "realera", "trce", "advunlearn"):
        with pytest.raises(ValueError, match="StableDiffusionXLImg2ImgPipeline is drawn by its pipeline"):
            getattr(ek, name).fit(over, "church", KEEP, config=config(name), folder=tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [name for name in TRAINED if name != "esd"])
def test_training_in_half_precision_on_a_gpu(saved, name, tmp_path):
    model = ek.load(saved, device="cuda", dtype="float16")
    edit = getattr(ek, name).fit(model, "church", KEEP, config=config(name, lr=1e-3), folder=tmp_path)
    assert all(tensor.isfinite().all() for tensor in edit.tensors.values())
    assert model.draw(model.conditioning("a church"), [0], steps=2)[0].size == (16, 16)
