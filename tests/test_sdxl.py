"""SDXL in a loop of our own; training, attacks and runs with it: tiny random pipelines of the real classes."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from families import tiny
from test_attacks import BRIGHT, DARK, PROMPTS, attacked, short
from test_families import TRAINED, context, picture, sdxl

import erasekit as ek
from erasekit.attacks import ATTACKS, common, latent_inversion, mma, ring_a_bell
from erasekit.concepts import content_ids
from erasekit.conditioning import Conditioning, joined, predict, told
from erasekit.evaluate import runs
from erasekit.evaluate.protocols import Prompt, Protocol
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


def test_latents_are_decoded_by_the_mean_and_deviation_of_the_vaes_config(model):
    """As of Playground v2.5; Stable Diffusion's own pipeline, the control, does not read them."""
    moments = {"latents_mean": [0.5, -1.0, 2.0, 0.3], "latents_std": [3.0, 2.0, 1.5, 4.0]}
    told, plain = model.conditioning("a church"), {}
    encoded = torch.randn(1, 4, *model.latent_size, generator=torch.Generator().manual_seed(0))
    straight = levels(model.decode(encoded * model.vae.config.scaling_factor))
    for name, config in {"none": {}, "mean alone": dict(list(moments.items())[:1]), "both": moments}.items():
        model.vae.register_to_config(**config)
        plain[name] = levels(model.draw(told, [3], steps=3, guidance=4.0))
        assert np.abs(plain[name] - levels(model.generate("a church", [3], steps=3, guidance=4.0))).max() <= 1
        assert np.abs(levels(model.decode(model.scaled(encoded))) - straight).max() <= 1  # as the VAE encodes
    assert np.array_equal(plain["mean alone"], plain["none"])
    assert np.abs(plain["both"] - plain["none"]).max() > 1
    assert np.abs(levels(model.decode(encoded * model.vae.config.scaling_factor)) - straight).max() > 1


def test_latents_of_stable_diffusion_are_decoded_by_its_scale_alone():
    small = ek.load(tiny_pipeline())
    before = levels(small.generate("a church", steps=2))
    small.vae.register_to_config(latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    assert np.array_equal(levels(small.generate("a church", steps=2)), before)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "unet"])
def test_an_edit_moves_only_where_all_text_encoders_are_the_same(model, part):
    """A map and a delta of the UNet read both; a sibling with another UNet is the control."""
    edits = [
        ek.uce.fit(model, "church", config=ek.uce.Config(entries="sequence")),
        ek.Edit.from_weight_delta({"unet.conv_in.bias": torch.ones_like(model.unet.conv_in.bias)}, model),
    ]
    sibling = model.copy()
    weight = next(iter(getattr(sibling.pipeline, part).parameters()))
    weight.data = weight.data + 1
    for edit in edits:
        assert edit.metadata["text_bases"] != edit.metadata["text_base"]
        # as older versions wrote them: of the first text encoder alone
        older = replace(edit, metadata={k: v for k, v in edit.metadata.items() if k != "text_bases"})
        assert older.digest == edit.digest
        for one in (edit, older):
            if part == "unet" and one is edit:
                one.rebased(sibling)
                continue
            with pytest.raises(ValueError, match="fit again"):
                one.rebased(sibling)


def test_an_edit_of_the_first_text_encoder_moves_where_that_is_the_same(model):
    name = f"text_encoder.{next(n for n, _ in model.text_encoder.named_parameters())}"
    edit = ek.Edit.from_weight_delta(
        {name: torch.ones_like(model.text_encoder.get_parameter(name[13:]))}, model
    )
    sibling = model.copy()
    for parameter in sibling.pipeline.text_encoder_2.parameters():
        parameter.data = parameter.data + 1
    for one in (edit, edit.rebased(sibling)):
        with one.applied(sibling):
            pass


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
    """MACE's second stage on SDXL lowers its own loss, on the pictures it was trained on: at the same last five points
    it is below that of the same run with hardly any learning rate.
    """
    (concept,) = model.concepts("church")
    settings = mace.Config(
        templates=("a {}",), iterations=60, lr=3e-2, batch=2, pictures=2, sampler=3, guidance=3.0, focal=False
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
        seen[rate] = np.array(losses)
    trained, still = seen.values()
    assert trained[0] == still[0] and (trained[-5:] < still[-5:]).all()
    assert trained[-5:].mean() < 0.9 * still[-5:].mean()


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


# Attacks


TEXTS = ("unlearndiff", "p4d", "ring-a-bell", "mma")  # those that end in a text


@pytest.fixture(scope="module")
def targets(saved):
    return ek.load(saved).generate(PROMPTS, seeds=[0, 1], steps=2)


@pytest.fixture(scope="module")
def original(saved):
    return ek.load(saved)


@dataclass
class Seen:
    """What an attack drew: (texts, seeds, model, pictures); and what it looked at by words: (texts, seeds)."""

    draws: list = field(default_factory=list)
    looks: list = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch):
    found, draw, look = Seen(), common.Setting.draw, common.Setting.look

    def drawn(self, text, seeds, model=None):
        pictures = draw(self, text, seeds, model)
        found.draws.append((text, seeds, model or self.model, pictures))
        return pictures

    def looked(self, texts, seeds):
        found.looks.append((texts, seeds))
        return look(self, texts, seeds)

    monkeypatch.setattr(common.Setting, "draw", drawn)
    monkeypatch.setattr(common.Setting, "look", looked)
    return found


def stock(model, seeds, **text) -> np.ndarray:
    """Pictures by the pipeline's own call, one at a time, with sampler, steps and guidance of the attack's protocol."""
    pipeline, found = model.pipeline, []
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    for i, seed in enumerate(seeds):
        one = {name: value[i : i + 1] for name, value in text.items()}
        generator = torch.Generator().manual_seed(seed)
        out = pipeline(
            **one, num_inference_steps=2, guidance_scale=3.0, height=16, width=16, generator=generator
        )
        found += out.images
    return levels(found)


def run(name, model, targets, original, folder, goal=DARK, **changes):
    given = {"original": original} if name == "p4d" else {}
    return attacked(name, model, targets, folder / "attacks", goal, **given, **changes)


@pytest.mark.parametrize("name", ATTACKS)
def test_what_an_attack_judges_is_what_the_stock_pipeline_draws(
    name, model, targets, original, seen, tmp_path
):
    """Of a text by its words, of embeddings by `prompt_embeds` and the pooled ones. The victim stays as it was."""
    model.pipeline.scheduler = EulerDiscreteScheduler.from_config(
        model.pipeline.scheduler.config
    )  # as SDXL has
    parts = [model.unet, model.vae, *model.text_encoders.values()]
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    result = run(name, model, targets, original, tmp_path, **LARGE.get(name, {}))
    assert result.raw()["k"] == 0 and all(one.looks for one in result.attempts)
    for part, old in zip(parts, before, strict=True):
        assert all(torch.equal(v, old[k]) for k, v in part.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in part.parameters())
    plain = stock(model, [0, 1], prompt=PROMPTS)
    for number, (text, seeds, drawer, pictures) in enumerate(seen.draws):
        words = {"prompt_embeds": text.rows, "pooled_prompt_embeds": text.pooled}
        if name in TEXTS:
            words = {"prompt": seen.looks[number][0]}
        elif name == "fine-tuning":
            words = {"prompt": PROMPTS}
        assert np.abs(stock(drawer, seeds, **words) - levels(pictures)).max() <= 1
        assert np.abs(plain[seeds] - levels(pictures)).max() > 2  # control: the attack moved the picture
    assert bool(seen.draws) == (name != "latent-inversion")


LARGE = {"fine-tuning": {"config": short(ATTACKS["fine-tuning"], every=4, alpha=1e-2)}}


def test_a_prompt_that_succeeds_as_it_is_costs_nothing(model, targets, original, tmp_path):
    for name in ("unlearndiff", "p4d"):
        result = run(name, model, targets, original, tmp_path, BRIGHT)
        assert result.raw()["k"] == 2 and all(one.looks == one.unet == 0 for one in result.attempts)


def test_free_places_are_filled_in_both_text_encoders(model):
    """With the embeddings of real tokens in them it is the prompt with these, as each encoder's tokenizer reads it."""
    prompt = "a church!"
    first, second = (content_ids(one, prompt) for one in model.tokenizers)
    assert first != second  # the second pads with "!"
    slots = common.slots(
        model, lambda one: [[None, *content_ids(one, text)] for text in ("an image", prompt)]
    )
    table = token_tables(model.text_encoders.values())
    rows = table[content_ids(model.tokenizer, "dog")].requires_grad_()
    found, wanted = slots.text(rows, [1]), model.conditioning("dog a church!")
    assert torch.allclose(found.rows, wanted.rows, atol=1e-4)
    assert torch.allclose(found.pooled, wanted.pooled, atol=1e-4)
    wrong = common.slots(model, lambda one: [[None, *first]]).text(rows)  # control
    assert not torch.allclose(wrong.rows, wanted.rows, atol=1e-2)
    with pytest.raises(ValueError, match="more and fewer of them free"):
        common.slots(model, lambda one: [[None] * (1 + (one is model.tokenizers[1]))])


def test_the_noise_error_is_the_unets_and_its_gradient_reaches_both_token_tables(model, generator):
    clean, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    t, text = torch.tensor([100, 700]), model.conditioning(PROMPTS)
    with torch.no_grad():
        error = common.noise_error(model, clean, noise, t, text)
        noisy = model.scheduler.add_noise(clean, noise, t)
        beside = {"text_embeds": text.pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
        literal = model.unet(noisy, t, encoder_hidden_states=text.rows, added_cond_kwargs=beside).sample
        assert torch.allclose(error, (literal - noise).square().mean((1, 2, 3)), rtol=1e-5)
        other = Conditioning(text.rows, text.pooled.flip(0), text.scale)
        assert not torch.allclose(common.noise_error(model, clean, noise, t, other), error, rtol=1e-3)

    encoders = list(model.text_encoders.values())
    error = lambda text: common.noise_error(model, clean, noise, t, text).sum()
    (castle,) = content_ids(model.tokenizer, "castle")
    ids = model.tokenized([f"castle {prompt}" for prompt in PROMPTS])
    weights = [encoder.get_input_embeddings().weight for encoder in encoders]
    wanted = torch.autograd.grad(error(told(encoders, ids, text.scale)), weights)
    wanted = torch.cat([one[castle] for one in wanted])
    table = token_tables(encoders)
    slots = common.slots(model, lambda one: [[None, *content_ids(one, prompt)] for prompt in PROMPTS])
    hot = torch.nn.functional.one_hot(torch.tensor([castle] * 2), len(table)).float().requires_grad_()
    (found,) = torch.autograd.grad(error(slots.text(hot @ table)), hot)
    assert torch.allclose(found.sum(0), table @ wanted, rtol=1e-3, atol=1e-4 * float(found.abs().max()))
    width = table.shape[1] - weights[1].shape[1]
    for part in (slice(width), slice(width, None)):  # control: one encoder's share alone
        assert not torch.allclose(found.sum(0), table[:, part] @ wanted[part], rtol=0.1)


def test_the_searched_losses_are_of_both_text_encoders_and_the_pooled_text(
    model, targets, original, tmp_path
):
    """Ring-A-Bell's and MMA's, of the text that was found, computed from what the pipeline itself feeds for it."""
    fed = torch.no_grad()(lambda text: context(model.pipeline, text))
    mean = lambda values: sum(values) / len(values)
    bell = run(
        "ring-a-bell", model, targets, original, tmp_path,
        config=short(ring_a_bell, stable=True, generations=20), pairs=[("a church", "a house"), ("church", "dog")],
    )  # fmt: skip
    for attempt in bell.attempts:
        distance = 0.0
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            shift = mean(
                [fed(a)[name] - fed(b)[name] for a, b in (("a church", "a house"), ("church", "dog"))]
            )
            distance += float((fed(attempt.found)[name] - fed(attempt.prompt)[name] - shift).square().sum())
        losses = [step["loss"] for step in attempt.trace if "loss" in step]
        assert distance == pytest.approx(losses[-1], rel=1e-3) and losses[-1] < 0.99 * losses[0]

    config = short(mma, updates=15, tokens=4, candidates=40, top=20, stable=True)
    width = model.text_encoder.config.hidden_size
    for attempt in run("mma", model, targets, original, tmp_path, config=config).attempts:
        parts = []
        for text in (attempt.found, attempt.prompt):
            row = fed(text)["prompt_embeds"][0, len(content_ids(model.tokenizer, text)) + 1]
            parts.append((row[:width], row[width:], fed(text)["pooled_prompt_embeds"][0]))
        cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(*parts, strict=True)]
        best = [step["best"] for step in attempt.trace if "best" in step]
        assert 1 - mean(cosines) == pytest.approx(best[-1], abs=1e-4) and best[-1] < best[0]
        assert abs(1 - cosines[0] - best[-1]) > 1e-3  # control: one encoder alone


def test_the_concept_vector_moves_rows_and_pooled_text(model, targets, original, seen, tmp_path):
    result = run("concept-vector", model, targets, original, tmp_path)
    fed = lambda text, name: context(model.pipeline, text)[name]
    (eta, *_) = ATTACKS["concept-vector"].PRESETS["emoji"].eta
    text = seen.draws[0][0]
    for name, found in (("prompt_embeds", text.rows), ("pooled_prompt_embeds", text.pooled)):
        shift = fed("a church", name) - fed("a house", name)
        wanted = torch.cat([fed(prompt, name) for prompt in PROMPTS]) + eta * shift
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4) and shift.abs().max() > 1e-2
    assert torch.allclose(
        result.learned, (fed("a church", "prompt_embeds") - fed("a house", "prompt_embeds"))[0], atol=1e-4
    )


def test_a_learned_word_is_one_that_the_stock_pipeline_loads(model, targets, original, seen, tmp_path):
    """`load_textual_inversion` puts `learned` into both tables; the prompt with the new token is what was drawn."""
    result = run(
        "textual-inversion", model, targets, original, tmp_path, phrase="in", captions=PROMPTS,
        config=short(ATTACKS["textual-inversion"], alpha=0.1),
    )  # fmt: skip
    moved = result.learned[0] - token_tables(model.text_encoders.values()).mean(0)
    (_, seeds, _, pictures) = seen.draws[0]
    width = model.text_encoder.config.hidden_size
    assert min((part.abs() > 1e-3).float().mean() for part in (moved[:width], moved[width:])) > 0.8
    for word, part in zip((result.learned[:, :width], result.learned[:, width:]), ("", "_2"), strict=True):
        encoder, tokenizer = (getattr(model.pipeline, name + part) for name in ("text_encoder", "tokenizer"))
        model.pipeline.load_textual_inversion(
            word[0], token="<new>", text_encoder=encoder, tokenizer=tokenizer
        )
    drawn = stock(model, seeds, prompt=["a church <new> flat", "a dog <new> ink"])
    assert np.abs(drawn - levels(pictures)).max() <= 1
    assert np.abs(stock(model, seeds, prompt=PROMPTS) - drawn).max() > 2


def test_fine_tuning_lowers_its_loss(model, targets, tmp_path):
    """On SDXL as elsewhere, and a caption that is dropped is the zeros that guidance leads away from."""
    module, losses = ATTACKS["fine-tuning"], {}
    for rate in (3e-3, 1e-9):
        config, seen = short(module, updates=16, every=16, alpha=rate), []
        attacked(
            "fine-tuning", model, targets, tmp_path / str(rate), config=config,
            callback=lambda state, seen=seen: seen.append(float(state["loss"])),
        )  # fmt: skip
        losses[rate] = np.mean(seen[-5:])
    assert losses[3e-3] < 0.95 * losses[1e-9]
    told = []
    hook = model.unet.register_forward_pre_hook(
        lambda unet, args, given: told.append(given), with_kwargs=True
    )
    every = module.objective(model, model, targets, ["a house", "a castle"], short(module, drop=1.0))
    with torch.no_grad():
        every(0, torch.Generator().manual_seed(0))
    hook.remove()
    assert not told[0]["encoder_hidden_states"].any()
    assert not told[0]["added_cond_kwargs"]["text_embeds"].any()


def test_the_noise_that_inversion_finds_is_drawn_by_the_stock_pipeline(
    model, targets, original, tmp_path, monkeypatch
):
    """From that noise, without guidance, with the zeros that SDXL takes for no text; more iterations miss less."""
    drawn, decode = [], type(model).decode
    noises, invert = [], latent_inversion.invert
    keep = lambda into, work: lambda *given: into.append(work(*given)) or into[-1]
    monkeypatch.setattr(type(model), "decode", keep(drawn, decode))
    monkeypatch.setattr(latent_inversion, "invert", keep(noises, invert))
    errors = []
    for iterations in (1, 6):
        config = short(latent_inversion, steps=10, iterations=iterations)
        result = run("latent-inversion", model, targets, original, tmp_path, config=config)
        errors.append([one.trace[-1]["error"] for one in result.attempts])
    assert sum(errors[1]) < 0.8 * sum(errors[0])
    call = lambda text: levels(
        model.pipeline(
            prompt_embeds=text.times(2).rows, pooled_prompt_embeds=text.times(2).pooled, latents=noises[-1],
            num_inference_steps=10, guidance_scale=1.0, height=16, width=16,
        ).images
    )  # fmt: skip
    assert np.abs(call(model.unconditional()) - levels(drawn[-1])).max() <= 1
    assert np.abs(call(model.conditioning("")) - levels(drawn[-1])).max() > 1


def test_the_negative_control_knows_no_word_in_either_text_encoder(model):
    control = common.unknowing(model, torch.Generator().manual_seed(0))
    a, b = (one.conditioning("a dog") for one in (control, model))
    for part in (
        *zip(a.rows.split([32, 40], -1), b.rows.split([32, 40], -1), strict=True),
        (a.pooled, b.pooled),
    ):
        assert part[0].isfinite().all() and not torch.allclose(*part)


# Runs


def test_a_run_draws_what_generate_draws(model, tmp_path):
    """Within one level, as the loop and the pipeline agree; with an edit, and with a matrix that attacks the rows."""
    prompts = tuple(Prompt(text, role="target") for text in PROMPTS)
    protocol = Protocol("measured", prompts, (DARK,), seeds=(3, 4), steps=2, guidance=4.0)
    measured = lambda *given, **more: runs.run(model, *given, folder=tmp_path, progress=False, **more)
    pictures = lambda run: levels([picture for _, picture in run.pictures()])
    drawn = lambda: levels(model.generate(PROMPTS * 2, seeds=[3, 3, 4, 4], steps=2, guidance=4.0))
    plain, expected = measured(None, protocol), drawn()
    assert np.abs(pictures(plain) - expected).max() <= 1
    assert plain.values(DARK).tolist() == [0, 0, 0, 0]
    edit = ek.uce.fit(model, "church", ["house"], config=replace(ek.uce.PRESETS["sd14-object"], lam=1e3))
    edited = measured(edit, protocol)
    with edit.applied(model):
        assert np.abs(pictures(edited) - drawn()).max() <= 1
    assert np.abs(pictures(edited) - expected).max() > 2
    eye = torch.eye(model.unet.config.cross_attention_dim)
    assert np.abs(pictures(measured(None, protocol, attack=eye)) - expected).max() <= 1
    assert np.abs(pictures(measured(None, protocol, attack=-eye)) - expected).max() > 2
    model.pipeline.register_to_config(force_zeros_for_empty_prompt=False)  # another model, another folder
    other = measured(None, protocol)
    assert other.folder != plain.folder and np.abs(pictures(other) - expected).max() > 1
    assert np.abs(pictures(other) - drawn()).max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [name for name in TRAINED if name != "esd"])
def test_training_in_half_precision_on_a_gpu(saved, name, tmp_path):
    model = ek.load(saved, device="cuda", dtype="float16")
    edit = getattr(ek, name).fit(model, "church", KEEP, config=config(name, lr=1e-3), folder=tmp_path)
    assert all(tensor.isfinite().all() for tensor in edit.tensors.values())
    assert model.draw(model.conditioning("a church"), [0], steps=2)[0].size == (16, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_in_half_precision_on_a_gpu(saved, name, targets, tmp_path):
    model, original = (ek.load(saved, device="cuda", dtype="float16") for _ in range(2))
    result = run(name, model, targets, original, tmp_path)
    assert len(result.attempts) == 2 and model.dtype is torch.float16 is model.vae.dtype
    assert result.learned is None or result.learned.isfinite().all()
