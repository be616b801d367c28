"""The closed forms and ESD on Stable Diffusion 2.x, SDXL and transformers: tiny random pipelines of the real classes,
through a folder."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import LENGTH, WIDTH, literal_erase, tiny_pipeline, tiny_tokenizer
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from families import FAMILIES, tiny
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import erasekit as ek
from erasekit import miniatures, pipelines, prompt_rows, settings
from erasekit.closed_form import ContextMap
from erasekit.layers import cross_attention_kv, denoiser_parameters
from erasekit.recorded import Recorded
from erasekit.text_entries import leaves, text_entries


def text_config(tokenizer, width: int, **changes) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=LENGTH, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, projection_dim=width, initializer_factor=10.0, **changes,
    )  # fmt: skip


def unet(width: int, **changes) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=width, use_linear_projection=True,
        **changes,
    )  # fmt: skip


def sd2() -> StableDiffusionPipeline:
    """As 2.1: another width, GELU, linear projections, v-prediction, padding with "!"."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "!"
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=tiny_pipeline().vae,
        text_encoder=CLIPTextModel(text_config(tokenizer, 48, hidden_act="gelu")),
        tokenizer=tokenizer,
        unet=unet(48),
        scheduler=DDIMScheduler(
            prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """Two text encoders side by side, several transformer layers per block, size and pooled text conditions."""
    tokenizer, second = tiny_tokenizer(), tiny_tokenizer()
    second.pad_token = "!"
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=tiny_pipeline().vae,
        text_encoder=CLIPTextModel(text_config(tokenizer, WIDTH)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(second, 40, hidden_act="gelu")),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=unet(
            WIDTH + 40, transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 40,
        ),
        scheduler=tiny_pipeline().scheduler,
        add_watermarker=False,
    )  # fmt: skip


@pytest.fixture(params=[sd2, sdxl], ids=["sd2", "sdxl"])
def model(request, tmp_path):
    with torch.random.fork_rng(devices=[]):
        request.param().save_pretrained(tmp_path / "model")
    return ek.load(tmp_path / "model")


def context(pipeline, prompt: str) -> dict[str, torch.Tensor]:
    """What the stock pipeline feeds to cross-attention, with and without the prompt, and the pooled text of SDXL."""
    found = pipeline.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=""
    )
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    return dict(zip(names, found, strict=False))


def picture(pipeline, **prompt):
    generator = torch.Generator().manual_seed(0)
    out = pipeline(
        **prompt, num_inference_steps=3, guidance_scale=4.0, height=16, width=16, generator=generator
    )
    return np.asarray(out.images[0]).astype(int)


def test_encode_is_what_the_stock_pipeline_feeds(model):
    stock = context(model.pipeline, "a church")
    assert torch.allclose(model.encode("a church"), stock["prompt_embeds"], atol=1e-5)
    assert torch.allclose(model.encode(""), stock["negative_prompt_embeds"], atol=1e-5)
    assert not torch.allclose(model.encode("a dog"), stock["prompt_embeds"], atol=1e-2)  # control


# Random encoders give rows of norm 600; the ridge keeps the map to what single precision can tell apart.
UCE = dataclasses.replace(ek.uce.PRESETS["sd14-object"], lam=1e3, entries="sequence")
RIDGE = {"uce": UCE, "rece": dataclasses.replace(ek.rece.PRESETS["sd14-object"], start=UCE, lambda_2=1e3)}


@pytest.mark.parametrize("method", ["uce", "rece"])
def test_one_matrix_on_the_embeddings(model, method):
    """Editing all keys and values of the UNet is mapping both halves of the guidance, in the stock pipeline."""
    edit = getattr(ek, method).fit(model, "church", ["house"], anchor="dog", config=RIDGE[method])
    assert edit.context_map.d == next(iter(cross_attention_kv(model.unet).values())).in_features
    plain = context(model.pipeline, "a church")
    mapped = {
        name: value if "pooled" in name else edit.context_map.apply(value.double()).float()
        for name, value in plain.items()
    }
    before = picture(model.pipeline, **plain)
    on_embeddings = picture(model.pipeline, **mapped)
    with edit.applied(model):
        on_weights = picture(model.pipeline, **plain)
    assert np.abs(on_weights - on_embeddings).max() <= 2
    assert np.abs(on_weights - before).max() > 2  # control: the edit shows


def test_the_refiner_of_sdxl_has_the_second_text_encoder_alone():
    """As stabilityai/stable-diffusion-xl-refiner: it draws over a picture, and closed forms edit it."""
    whole = sdxl()
    refiner = StableDiffusionXLImg2ImgPipeline(
        vae=whole.vae, text_encoder=None, tokenizer=None, text_encoder_2=whole.text_encoder_2,
        tokenizer_2=whole.tokenizer_2, scheduler=whole.scheduler, requires_aesthetics_score=False,
        unet=unet(
            40, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 40,
        ), add_watermarker=False,
    )  # fmt: skip
    model = ek.load(refiner)
    torch.testing.assert_close(model.encode("a church"), refiner.encode_prompt("a church")[0])
    start = Image.new("RGB", (16, 16), "teal")

    def over() -> np.ndarray:
        made = refiner(
            "a church",
            image=start,
            strength=0.9,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
        )
        return np.asarray(made.images[0]).astype(int)

    plain, edit = over(), ek.uce.fit(model, "church", ["house"])
    with edit.applied(model):
        assert np.abs(over() - plain).max() > 2
    np.testing.assert_array_equal(over(), plain)
    with pytest.raises(ValueError, match="SDXL"):
        ek.esd.fit(model, "church")


def test_lora_in_the_stock_pipeline(model, tmp_path):
    edit = ek.rece.fit(model, "church", ["house"], anchor="dog", config=RIDGE["rece"])
    edit.to_lora(tmp_path / "lora", model=model)
    plain = context(model.pipeline, "a church")
    before = picture(model.pipeline, **plain)
    with edit.applied(model):
        edited = picture(model.pipeline, **plain)
    model.pipeline.load_lora_weights(tmp_path / "lora")
    assert np.abs(picture(model.pipeline, **plain) - edited).max() <= 2
    assert np.abs(before - edited).max() > 2  # control: the edit shows


TRAINED = {
    "esd": dict(iterations=2, sampler=4),
    "advunlearn": dict(iterations=3, warmup=1, attack_steps=2, sampler=4, retain_batch=2),
    "trce": dict(iterations=2, sampler=4, early=2, noises=1, calm=2, lam=1e-3, templates=("a {}",)),
    "mace": dict(iterations=2, sampler=3, pictures=2, templates=("a {}",)),
    "realera": dict(iterations=2, sampler=4, noises=1, n=2, m=2, lora_n=1, lora_m=1, templates=("a {}",)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_knows_v_prediction_and_two_text_encoders(model, name, tmp_path):
    method = getattr(ek, name)
    config = method.Config(**TRAINED[name])
    edit = method.fit(model, "church", ["dog", "house"], config=config, folder=tmp_path)
    before = picture(model.pipeline, **context(model.pipeline, "a church"))
    with edit.applied(model, scale=1000.0 if name in ("esd", "advunlearn", "trce") else 1.0):
        assert np.abs(picture(model.pipeline, **context(model.pipeline, "a church")) - before).max() > 0
    if name == "esd":  # in v as in noise, eta = -1 is what the model predicts anyway
        seen = []
        still = method.Config(**TRAINED[name] | {"iterations": 1}, eta=-1.0)
        method.fit(model, "church", config=still, folder=tmp_path, callback=seen.append)
        assert seen[0]["loss"] < 1e-10


# Every family that its own pipeline draws. Small pictures: width 24 and few steps are enough to see a difference.


LONG = ("flux2", "sana")  # deep text encoder; a page of instructions in front of every prompt
EVERY = [pytest.param(one, marks=pytest.mark.slow if one in LONG else ()) for one in ("sdxl", *FAMILIES)]


@pytest.fixture(scope="module", params=EVERY)
def family(request, tmp_path_factory) -> ek.DiffusionModel:
    """A model read from a folder; a test leaves it as it was."""
    return read(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=["sdxl", "sd3", "flux"])
def pooled(request, tmp_path_factory) -> ek.DiffusionModel:
    """One that reads a pooled row beside the sequence."""
    return read(request.param, tmp_path_factory.mktemp(request.param))


def read(name: str, folder) -> ek.DiffusionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (sdxl() if name == "sdxl" else tiny(name)).save_pretrained(folder)
    return ek.load(folder)


def drawn(model, prompt: str, **changes) -> np.ndarray:
    side = 8 * model.pipeline.vae_scale_factor
    given = dict(steps=2, height=max(32, side), width=max(32, side)) | changes
    return np.asarray(model.generate(prompt, **given)[0]).astype(int)


def entry_inputs(model, prompt: str) -> dict[str, torch.Tensor]:
    """What the first layer of each space reads while the pipeline draws, float64 (n, columns); by plain hooks."""
    seen, hooks = {}, []

    def keep(entry):
        def hook(module, args, output):
            rows = args[0] if args[0].ndim == 2 else args[0][-1]
            seen.setdefault(entry.layer, rows[:, slice(*entry.columns)].double())

        return hook

    for entry in text_entries(model):
        hooks.append(model.denoiser.get_submodule(entry.layer).register_forward_hook(keep(entry)))
    try:
        side = max(32, 8 * model.pipeline.vae_scale_factor)
        pipelines.run(
            model.pipeline, prompt=prompt, height=side, width=side, num_inference_steps=1, guidance_scale=0.0
        )
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def test_a_family_is_read_drawn_and_encoded_by_its_own_pipeline(family, tmp_path):
    before = drawn(family, "a church")
    np.testing.assert_array_equal(drawn(family, "a church"), before)
    assert np.abs(drawn(family, "a dog") - before).max() > 0  # the prompt counts
    assert np.abs(drawn(family, "a church", seeds=[1]) - before).max() > 10
    both = family.generate(["a dog", "a church"], steps=2, height=before.shape[0], width=before.shape[1])
    np.testing.assert_array_equal(np.asarray(both[1]), before)  # whatever it is drawn beside
    family.save_pretrained(tmp_path)
    again = ek.load(tmp_path)
    assert again.fingerprint() == family.fingerprint()
    np.testing.assert_array_equal(drawn(again, "a church"), before)
    with torch.no_grad():
        again.pipeline.text_encoder.get_input_embeddings().weight[0, 0] += 1
    assert ek.load(again.pipeline).fingerprint() != family.fingerprint()


@pytest.mark.parametrize(
    ("sampler", "changes"),
    [(FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}), (FlowMatchLCMScheduler, {})],
)
@pytest.mark.parametrize("name", ["sd3", "flux", "lumina2", "qwen"])
def test_the_noise_on_the_way_of_a_flow_is_that_of_the_seed(name, sampler, changes):
    """Their stock pipelines do not hand their generators on to the sampler."""
    pipeline = tiny(name)
    pipeline.scheduler = sampler.from_config(pipeline.scheduler.config, **changes)
    pipeline.set_progress_bar_config(disable=True)
    model = ek.load(pipeline)
    before = drawn(model, "a dog", steps=3)
    np.testing.assert_array_equal(drawn(model, "a dog", steps=3), before)
    assert "step" not in vars(pipeline.scheduler)

    def stock() -> np.ndarray:
        how = dict(height=before.shape[0], width=before.shape[1], num_inference_steps=3)
        generator = torch.Generator().manual_seed(0)
        return np.asarray(pipeline(prompt="a dog", generator=generator, **how).images[0]).astype(int)

    assert np.abs(stock() - stock()).max() > 10  # control


def test_encode_is_what_the_denoiser_of_a_family_is_fed(family):
    """With the mask of AuraFlow on it, and before the norms of other families; Z-Image pads behind it."""
    found = family.encode("a church")[0].double()
    (entry,) = {e.space: e for e in text_entries(family) if not e.pooled}.values()
    fed = prompt_rows.read(family, [entry], "a church").before[entry.space].double()
    real = prompt_rows.read(family, [entry], "a church").encoded
    rows = min(len(fed), *(one.real[1] for one in real.values()))
    torch.testing.assert_close(found[:rows], fed[:rows], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, family.encode("a house")[0].double(), atol=1e-3)


CONFIG = ek.uce.Config(lam=0.1, preserve_scale=0.5, tokens="all", preserve_tokens="all")


def test_uce_is_the_literal_solution_in_every_space(family):
    """Rows by plain hooks, one outer product at a time and an explicit inverse, for every weight by itself."""
    erased, anchor, kept, null = (entry_inputs(family, p) for p in ("church", "dog", "house", ""))
    seen = {}
    given = ek.uce.entry_rows(family, family.concepts("church"), family.concepts(["house"]), "dog", CONFIG)
    maps = {space: ek.uce.solve(rows, CONFIG) for space, rows in given.items()}
    edit = ek.uce.fit(family, "church", ["house"], anchor="dog", config=CONFIG)
    plain = {e.layer: family.denoiser.get_parameter(e.weight).detach().double() for e in text_entries(family)}
    with edit.applied(family):
        edited = {
            e.layer: family.denoiser.get_parameter(e.weight).detach().double() for e in text_entries(family)
        }
    for entry in text_entries(family):
        columns = slice(*entry.columns)
        w = plain[entry.layer][:, columns]
        pairs = list(zip(erased[entry.layer], anchor[entry.layer], strict=False))
        expected = literal_erase(w, pairs, [*kept[entry.layer], *null[entry.layer]], 1.0, 0.5, 0.1)
        found = maps[entry.space].apply_to_weight(w)
        seen[entry.layer] = float((found - expected).norm() / expected.norm())
        assert seen[entry.layer] < 1e-6
        # an edit holds its factors in single precision
        assert (edited[entry.layer][:, columns] - expected).norm() < 2e-5 * expected.norm()
        assert (w - expected).norm() > 1e-3 * expected.norm()  # control: it is not what it was
        rest = [i for i in range(entry.width) if not entry.columns[0] <= i < entry.columns[1]]
        assert torch.equal(edited[entry.layer][:, rest], plain[entry.layer][:, rest])
    print(f"largest relative error {max(seen.values()):.1e}")


def test_the_entry_gives_for_the_concept_what_it_gave_for_the_anchor(family):
    """W' c + b = W c* + b: the bias stays out. With it among the targets, W' c = W c* + b, it would count twice."""
    config = dataclasses.replace(CONFIG, tokens="last_subject", preserve_null=False, lam=1e-9)
    given = ek.uce.entry_rows(family, family.concepts("church"), (), "dog", config)
    edit = ek.uce.fit(family, "church", anchor="dog", config=config)
    for entry in text_entries(family):
        layer = family.denoiser.get_submodule(entry.layer)
        weight, bias = layer.weight.detach().double()[:, slice(*entry.columns)], 0.0
        if layer.bias is not None:
            bias = layer.bias.detach().double()
        c, target = given[entry.space].sources, given[entry.space].targets @ weight.T + bias
        with edit.applied(family):
            found = c @ layer.weight.detach().double()[:, slice(*entry.columns)].T + bias
        assert (found - target).norm() < 1e-3 * target.norm()
        assert (c @ weight.T + bias - target).norm() > 1e-2 * target.norm()  # before the edit
        if layer.bias is not None and bias.norm() > 0:
            # the control: targets with the bias among them
            folded = torch.linalg.lstsq(c, target).solution
            assert (c @ folded + bias - target).norm() > 0.5 * (bias * torch.ones_like(target)).norm()


def test_an_edit_moves_the_picture_of_the_concept_and_one_that_is_all_ridge_does_not(family):
    before = drawn(family, "church", guidance=0.0)
    config = dataclasses.replace(CONFIG, lam=1e-6, preserve_null=False)
    edit = ek.uce.fit(family, "church", anchor="dog", config=config)
    with edit.applied(family):
        edited = drawn(family, "church", guidance=0.0)
    assert np.abs(edited - before).max() > 0
    residuals = []
    ek.uce.fit(family, "church", anchor="dog", config=config, callback=residuals.append)
    if max(state["erase_residual"] for state in residuals) < 1e-2:  # it can be mapped whole in this width
        assert np.abs(edited - drawn(family, "dog", guidance=0.0)).mean() < 0.5
    ridge = dataclasses.replace(CONFIG, lam=1e12)
    with ek.uce.fit(family, "church", ["church tower"], anchor="dog", config=ridge).applied(family):
        assert np.abs(drawn(family, "church", guidance=0.0) - before).max() <= 1
    np.testing.assert_array_equal(drawn(family, "church", guidance=0.0), before)


def test_an_edit_of_a_family_is_kept_merged_and_composed(family, tmp_path):
    edit = ek.uce.fit(family, "church", ["house"], anchor="dog", config=CONFIG)
    edit.save(tmp_path / "edit.safetensors")
    again = ek.Edit.load(tmp_path / "edit.safetensors")
    assert again.digest == edit.digest and again.metadata == edit.metadata
    assert edit.kind == "text_maps" and "rank" in edit.summary() and "church" in edit.summary()
    with again.applied(family):
        edited = drawn(family, "a church")
    merged = edit.merged(family)
    # a product rounds by where its factors lie in memory: the same weights may draw a level more or less
    assert np.abs(drawn(merged, "a church") - edited).max() <= 2
    assert np.abs(drawn(family, "a church") - edited).max() > 2
    merged.save_pretrained(tmp_path / "merged")
    read_back = ek.load(tmp_path / "merged")
    assert read_back.fingerprint() == merged.fingerprint() != family.fingerprint()
    assert np.abs(drawn(read_back, "a church") - edited).max() <= 2
    with pytest.raises(ValueError, match="made for the model"), edit.applied(merged):
        pass
    second = ek.uce.fit(family, "castle", anchor="house", config=CONFIG)
    name = text_entries(family)[0].weight
    unedited = family.denoiser.get_parameter(name).detach().clone()
    with edit.applied(family), second.applied(family):
        nested = family.denoiser.get_parameter(name).detach().clone()
    with edit.compose(second).applied(family):
        torch.testing.assert_close(family.denoiser.get_parameter(name), nested, atol=1e-4, rtol=1e-3)
    with edit.applied(family, scale=0.0):
        torch.testing.assert_close(family.denoiser.get_parameter(name), unedited)
    with pytest.raises(ValueError, match="key and value projections"):
        edit.to_projections(tmp_path / "kv.safetensors", model=family)
    with pytest.raises(ValueError, match="see edit.maps"):
        edit.context_map  # noqa: B018


def test_lora_of_a_family_in_its_stock_pipeline(family, tmp_path):
    edit = ek.uce.fit(family, "church", ["house"], anchor="dog", config=CONFIG)
    if not hasattr(family.pipeline, "load_lora_weights"):
        with pytest.raises(ValueError, match="PixArtSigmaPipeline reads no LoRA"):
            edit.to_lora(tmp_path, model=family)
        return
    edit.to_lora(tmp_path, model=family)
    before = drawn(family, "church")
    with edit.applied(family):
        edited = drawn(family, "church")
    copy = family.copy()
    copy.pipeline.load_lora_weights(tmp_path)
    assert np.abs(drawn(copy, "church") - edited).max() <= 2
    assert np.abs(before - edited).max() > 2  # control: the edit shows


def test_rows_are_those_of_the_last_token_of_the_phrase(family):
    """By the tokenizers: the ids up to that token read as the prompt up to the phrase, in every text encoder."""
    template = "an image of {} in ink style"
    (entry,) = {e.space: e for e in text_entries(family) if not e.pooled}.values()
    texts = [template.format(phrase) for phrase in ("garbage church", "dog", "")]
    old, new, blank = (prompt_rows.read(family, [entry], text) for text in texts)
    a, b = prompt_rows.paired(entry, old, new, blank, "last_subject")
    ends, spans = {}, []
    for part, one in old.encoded.items():
        tokenizer = getattr(family.pipeline, part.replace("text_encoder", "tokenizer"))
        end = prompt_rows._ends(part, old, new, blank)[0]
        text = "".join(tokenizer.decode(list(one.ids[: end + 1])).lower().split())
        assert text.endswith("imageofgarbagechurch")
        ends[part] = end
        if (span := prompt_rows._span(entry, old, part, end)) is not None:
            spans.append(span)
    assert len(a) == len(b) == len(spans) >= 1
    rows = old.rows[entry.space]
    assert torch.equal(a, torch.stack([rows[start] for start, _ in spans]))
    assert len(a) == (2 if type(family.pipeline).__name__ == "StableDiffusion3Pipeline" else 1)  # CLIP and T5
    to_end = prompt_rows.paired(entry, old, new, blank, "last_to_end")[0]
    assert torch.equal(to_end[0], a[0]) and len(to_end) > len(a)


def test_rece_of_a_family_is_the_literal_one(family):
    """One round: derive c' for the weights after UCE, erase it, with explicit inverses in float64."""
    config = ek.rece.Config(start=CONFIG, epochs=1, lam=0.3, lambda_1=0.2, lambda_2=0.5)
    given = ek.uce.entry_rows(family, family.concepts("church"), family.concepts(["house"]), "dog", CONFIG)
    seen = []
    ek.rece.fit(family, "church", ["house"], anchor="dog", config=config, callback=seen.append)
    for space, rows in given.items():
        entries = [e for e in text_entries(family) if e.space == space]
        weights = [
            family.denoiser.get_parameter(e.weight).detach().double()[:, slice(*e.columns)] for e in entries
        ]
        eye = torch.eye(weights[0].shape[1], dtype=torch.float64)
        kept = list(rows.preserved)
        t = literal_erase(eye, list(zip(rows.sources, rows.targets, strict=True)), kept, 1.0, 0.5, 0.1)
        old, new = torch.cat(weights), torch.cat(weights) @ t
        left = torch.linalg.inv(0.3 * eye + new.T @ new) @ new.T @ old
        derived = rows.sources @ left.T
        t = t @ literal_erase(eye, list(zip(derived, rows.targets, strict=True)), kept, 1.0, 0.2, 0.5)
        last = [s for s in seen if s["entry"].endswith(entries[0].layer)][-1]
        assert (last["context_map"].matrix() - t).norm() < 1e-6 * t.norm()
        assert (last["derived"] - derived).norm() < 1e-6 * derived.norm()
        assert last["attack_residual_before"] < last["attack_residual"]


TEMPLATES = dict(templates=("an image of {} in ink style", "{}"), keep_templates=("a photo of {}",))
CLOSED = {
    "mace": ek.mace.Config(lora=False, lam=0.1, lambda_1=0.5, **TEMPLATES),
    "trce": ek.trce.Config(stages="text", lam=0.1, eta=0.5, **TEMPLATES),
    "realera": ek.realera.Config(
        lora=False, lam=0.1, lambda_b=0.5, lambda_p=0.2, mode="shell", n=2, m=2, **TEMPLATES
    ),
}


@pytest.fixture
def solved(monkeypatch):
    """What every closed form is solved for, {space: rows}, and its solver."""
    seen, real = [], prompt_rows.solved

    def spy(model, found, solve, *rest, **named):
        seen.append((found, solve))
        return real(model, found, solve, *rest, **named)

    monkeypatch.setattr(prompt_rows, "solved", spy)
    return seen


@pytest.mark.parametrize("name", CLOSED)
def test_the_other_closed_forms_are_the_literal_solution_in_every_space(family, name, solved, tmp_path):
    """One outer product at a time, for every weight by itself; and the edit moves the picture."""
    config, told = CLOSED[name], []
    asked = dict(anchor="dog", config=config, callback=told.append)
    edit = getattr(ek, name).fit(family, "garbage church", ["house"], **asked)
    ((found, solve),) = solved
    first = {entry.space: entry for entry in reversed(text_entries(family))}
    assert found.keys() == first.keys()  # no space is left open
    names = {space: f"{family.denoiser_part}.{first[space].layer}" for space in found}
    assert [one["entry"] for one in told] == list(names.values())
    held = {"mace": 0.5, "trce": 0.5 / 2, "realera": 1.0}[name]  # TRCE's is a mean over two captions
    for entry in text_entries(family):
        given, t = found[entry.space], edit.maps[names[entry.space]]
        weight = 1 / (2 if name == "trce" else len(given.sources))  # and over two prompts
        w = family.denoiser.get_parameter(entry.weight).detach().double()[:, slice(*entry.columns)]
        pairs = list(zip(given.sources, given.targets, strict=True))
        expected = literal_erase(w, pairs, list(given.preserved), weight, held, 0.1)
        error = lambda one, w=w, expected=expected: (
            (one.apply_to_weight(w) - expected).norm() / expected.norm()
        )
        assert error(solve(given)) < 1e-6
        assert error(t) < 2e-5  # an edit holds its factors in single precision
        assert (w - expected).norm() > 1e-4 * w.norm()  # control: the concept has somewhere to go
    before = drawn(family, "garbage church", guidance=1.0)
    with edit.applied(family):
        assert np.abs(drawn(family, "garbage church", guidance=1.0) - before).max() > 0
    edit.save(tmp_path / "edit.safetensors")
    assert ek.Edit.load(tmp_path / "edit.safetensors").digest == edit.digest


def test_where_the_tokens_of_two_prompts_stand(family):
    """By the tokenizers: the phrase is the phrase, what stands beside reads alike in both prompts, the end follows."""
    template = "an image of {} in ink style"
    (entry,) = {e.space: e for e in text_entries(family) if not e.pooled}.values()
    old, new, blank = (
        prompt_rows.read(family, [entry], template.format(phrase)) for phrase in ("garbage church", "dog", "")
    )
    found = iter(prompt_rows.places(entry, old, new, blank))
    count = 0
    for part in old.encoded:
        rows = [prompt_rows._located(entry, one, part) for one in (old, new)]
        if not all(rows):
            continue
        at, count = next(found), count + 1
        tokenizer = getattr(family.pipeline, part.replace("text_encoder", "tokenizer"))
        ids = [
            {row: one.encoded[part].ids[i] for i, row in where.items()}
            for one, where in zip((old, new), rows, strict=True)
        ]
        read = lambda side, chosen, ids=ids, tokenizer=tokenizer: "".join(
            tokenizer.decode([ids[side][row] for row in chosen]).lower().split()
        )
        assert (read(0, at.phrase[0]), read(1, at.phrase[1])) == ("garbagechurch", "dog")
        beside = [read(side, at.beside[side]) for side in (0, 1)]
        assert beside[0] == beside[1] and "imageof" in beside[0] and "inkstyle" in beside[0]
        assert "church" not in beside[0] and "dog" not in beside[0]
        for side in (0, 1):
            assert at.end[side][0] > max(at.phrase[side])
            assert all(
                row < min(at.phrase[side]) for row in at.start[side]
            )  # none where a template is cut off
            between = read(side, range(max(at.phrase[side]) + 1, at.end[side][0]))
            assert between.startswith("ininkstyl")  # the end may be the last letter
    assert count >= 1 and next(found, None) is None
    blank_rows = prompt_rows.places(entry, old, blank, blank)[0]
    assert len(blank_rows.phrase[1]) == 1  # a blank phrase counts as the token before it


@pytest.mark.parametrize("name", CLOSED)
def test_on_a_unet_the_traced_rows_are_those_of_the_method(model, name):
    """The rows that the pipeline feeds, found by ids and content, against those that CLIP's tokenizer names."""
    template = TEMPLATES["templates"][0]
    old, new, blank = (template.format(phrase) for phrase in ("garbage church", "dog", ""))
    (entry,) = {e.space: e for e in text_entries(model) if not e.pooled}.values()
    prompts = [prompt_rows.read(model, [entry], text) for text in (old, new, blank)]
    (at,) = prompt_rows.places(entry, *prompts)
    rows = [one.rows[entry.space] for one in prompts]
    if name == "mace":
        expected = ek.mace.residue(model, [(old, new)])
        found = rows[0][at.beside[0]], rows[1][at.beside[1]]
    elif name == "trce":
        expected = ek.trce.rows(model, [(old, "garbage church", new, "church")], CLOSED["trce"])
        found = rows[0][at.end[0]], rows[1][at.end[1]]
    else:
        own = ek.realera.embedded(
            model, ek.realera.aligned(model.tokenizer, template, "garbage church", "dog")
        )
        traced = ek.realera.entry_embedded(entry, *prompts)
        expected, found = (
            (own.e[own.rows], own.e_g[own.targets]),
            (
                traced.e[traced.rows],
                traced.e_g[traced.targets],
            ),
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1.0)  # control: the two prompts differ


def test_what_only_clip_can_say_is_refused_elsewhere():
    flux = ek.load(tiny("flux"))
    with pytest.raises(ValueError, match="choose toward_gaussian or shell"):
        ek.realera.fit(flux, "church", config=dataclasses.replace(CLOSED["realera"], mode="subspace"))
    with pytest.raises(ValueError, match="counts words as the code does"):
        ek.trce.fit(flux, "church", config=dataclasses.replace(CLOSED["trce"], faithful=True))


def test_closing_one_entry_leaves_the_other_open(pooled):
    """Rows of the tokens and the pooled row both carry the concept; only both closed draw the anchor."""
    church, dog = (drawn(pooled, prompt, guidance=1.0) for prompt in ("church", "dog"))
    far, distance = np.abs(church - dog).mean(), {}
    for which in ("both", "sequence", "pooled"):
        config = dataclasses.replace(CONFIG, lam=1e-6, preserve_null=False, entries=which)
        edit = ek.uce.fit(pooled, "church", anchor="dog", config=config)
        with edit.applied(pooled):
            distance[which] = np.abs(drawn(pooled, "church", guidance=1.0) - dog).mean() / far
        if which != "sequence" or "transformer" in pooled.pipeline.components:
            pooled_ones = {f"{pooled.denoiser_part}.{e.layer}" for e in text_entries(pooled) if e.pooled}
            assert bool(pooled_ones & set(edit.maps)) == (which != "sequence")
    print(distance)
    assert distance["both"] < 0.5 * min(distance["sequence"], distance["pooled"])


@pytest.mark.parametrize("tokens", ["last_subject", "last_to_end", "all"])
def test_on_a_unet_the_traced_rows_are_those_of_uce(model, tokens):
    """Also with a phrase in the middle of a sentence, of more pieces than its anchor, and a blank anchor."""
    config = dataclasses.replace(CONFIG, tokens=tokens, preserve_tokens=tokens, entries="sequence")
    config = dataclasses.replace(config, templates=("{}", "a {} in flat style"))
    for anchor in ("dog", " "):
        asked = model, model.concepts(["garbage church", "castle"]), model.concepts("house"), anchor, config
        old = ek.uce.rows(*asked)
        (new,) = ek.uce.entry_rows(*asked).values()
        for name in ("sources", "targets", "preserved"):
            torch.testing.assert_close(getattr(new, name), getattr(old, name), atol=1e-3, rtol=1e-5)
        one, two = (ek.uce.solve(rows, config).matrix() for rows in (old, new))
        print(float((one - two).norm() / one.norm()))
        same = ContextMap.identity(model_width(model)).matrix()
        assert (one - two).norm() < 1e-6 * (one - same).norm()


def model_width(model) -> int:
    return next(iter(cross_attention_kv(model.unet).values())).in_features


@pytest.mark.parametrize("name", [one for one in TRAINED if one != "esd"])
def test_methods_that_train_a_unet_refuse_a_transformer(name):
    flux = ek.load(tiny("flux"))
    with pytest.raises(ValueError, match="FluxPipeline has a FluxTransformer2DModel: erase by a closed form"):
        getattr(ek, name).fit(flux, "church")


def test_nothing_asked_of_a_pipeline_is_dropped_in_silence():
    flux, sd1 = ek.load(tiny("flux")), ek.load(tiny_pipeline())
    size = dict(steps=1, height=32, width=32)
    with pytest.raises(ValueError, match="without a negative prompt"):
        flux.generate("a dog", negative="a church", **size)
    with pytest.raises(ValueError, match="drew 32 pixels for height=33"):
        flux.generate("a dog", steps=1, height=33, width=32)
    with pytest.raises(ValueError, match="has no UNet"):
        flux.unet  # noqa: B018
    with pytest.raises(ValueError, match="FluxPipeline is drawn by its pipeline"):
        flux.draw(flux.encode("a dog"), [0])
    with pytest.raises(ValueError, match="reads no pooled text"):
        ek.uce.fit(sd1, "church", config=ek.uce.Config(entries="pooled"))
    with pytest.raises(ValueError, match="text_encoder takes 22 tokens and cuts off the rest"):
        ek.uce.fit(flux, "abcdefghijklm nopqrstuvwxyz", anchor="dog")
    with pytest.raises(ValueError, match="no text entry of the kind 'pooled'"):
        ek.uce.fit(ek.load(tiny("chroma")), "church", config=ek.uce.Config(entries="pooled"))
    schnell = tiny("flux")
    schnell.transformer.register_to_config(guidance_embeds=False)
    schnell = ek.load(schnell)
    with pytest.raises(ValueError, match="needs guidance above 1"):
        schnell.generate("a dog", negative="a church", **size)
    klein = tiny("flux2")
    klein.register_to_config(is_distilled=True)
    with pytest.raises(ValueError, match="distilled and ignores guidance"):
        ek.load(klein).generate("a dog", guidance=4.0, **size)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_what_clip_cuts_off_is_refused_wherever_it_stands(name):
    """Behind the phrase, with the phrase, or in what is preserved, and whichever rows count; the control: as many
    tokens as fit."""
    model, long = ek.load(miniatures.pipeline(name)), "a in ink style of a " * 6
    said = pytest.raises(
        ValueError, match="text_encoder takes 22 tokens and cuts off the rest, and there are"
    )
    for tokens in ("last_subject", "all"):
        for template in ("a {} " + long, long + "{}"):
            with said:
                ek.uce.fit(
                    model, "church", config=dataclasses.replace(CONFIG, tokens=tokens, templates=(template,))
                )
    fits, over = (ek.Concept("dog " * count) for count in (22, 23))
    for method, config in (("uce", CONFIG), ("mace", ek.mace.Config(lora=False, keep_templates=("{}",)))):
        with said:
            getattr(ek, method).fit(model, "church", over, config=config)
        assert getattr(ek, method).fit(model, "church", fits, config=config).kind == "text_maps"


@pytest.mark.parametrize(
    ("name", "limit"), [("sd3", 255), ("flux", 511), ("chroma", 511), ("zimage", 493), ("qwen", 512)]
)
def test_the_limit_is_what_the_pipeline_takes_of_a_text_encoder_without_one(name, limit):
    """T5 with its end token, a chat template and what stands in it; Qwen-Image pads nothing and cuts rows."""
    longer = {"length": 600} if name in ("sd3", "flux") else {}  # their CLIP is not asked here
    model = ek.load(miniatures.pipeline(name, **longer) if longer else tiny(name))
    prompt = prompt_rows.reader(model)
    *_, part = prompt("a").encoded
    tokenizer = getattr(model.pipeline, part.replace("text_encoder", "tokenizer"))
    text = "church" + " dog" * (limit - len(tokenizer("church", add_special_tokens=False).input_ids))
    assert prompt(text).text == text
    with pytest.raises(ValueError, match=f"{part} takes {limit} tokens and cuts off the rest, and there are"):
        prompt(text + " dog")


# ESD, where the pipeline draws


ESD = ek.esd.Config(
    iterations=3, lr=1e-3, sampler=4, states="frozen", noises=3, guidance=3.0, templates=("a {}",), pixels=32
)


OTHER = "flat style image of castle in ink"


@pytest.fixture(params=["sdxl", "sd3", "flux"])
def learner(request, tmp_path) -> ek.DiffusionModel:
    return learning(request.param, tmp_path / "model")


def learning(name: str, folder) -> ek.DiffusionModel:
    """One that can learn: random keys so large that a softmax has hardly a gradient are made smaller."""
    model = read(name, folder)
    gains = {"attn2.to_k.weight": 0.05, "attn2.to_v.weight": 3} if name == "sdxl" else {}
    gains = {"context_embedder.weight": 0.1} if name == "sd3" else gains
    with torch.no_grad():
        for layer, weight in model.denoiser.named_parameters():
            for ending, gain in gains.items():
                if layer.endswith(ending):
                    weight.mul_(gain)
    model.save_pretrained(folder)
    return ek.load(folder)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("erasekit.states.FOLDER", tmp_path / "training")


def esd(model, config=ESD, seed=0, **more):
    """Loss at every update, and the edit."""
    seen = []
    edit = ek.esd.fit(
        model, "church", config=config, generator=torch.Generator().manual_seed(seed),
        callback=lambda state: seen.append(state["loss"]), **more,
    )  # fmt: skip
    return seen, edit


def points(model, prompts=("a church",), others=(OTHER,), **changes) -> Recorded:
    side = max(32, 8 * model.pipeline.vae_scale_factor)
    given = dict(seed=11, guidance=3.0, sampler=4, states="frozen", noises=3, pixels=side) | changes
    return Recorded(model, list(prompts), list(others), **given)


def sized(model, config=ESD, **changes):
    return dataclasses.replace(config, pixels=max(32, 8 * model.pipeline.vae_scale_factor), **changes)


def literal(model, denoiser, x, t, prompt: str, guidance: float) -> torch.Tensor:
    """What the denoiser predicts, as each pipeline calls it, for pictures of 32 pixels."""
    pipe = model.pipeline
    if "unet" in pipe.components:
        text, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        sizes = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]])}
        return denoiser(x, t, encoder_hidden_states=text, added_cond_kwargs=sizes).sample
    if "text_encoder_3" in pipe.components:
        text, _, pooled, _ = pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        return denoiser(x, timestep=t[None], encoder_hidden_states=text, pooled_projections=pooled).sample
    text, pooled, ids = pipe.encode_prompt(prompt, None)
    where = pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    return denoiser(
        x, timestep=t[None] / 1000, guidance=torch.tensor([guidance]), encoder_hidden_states=text,
        pooled_projections=pooled, txt_ids=ids, img_ids=where,
    ).sample  # fmt: skip


def on_the_way(model, prompt: str, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and t before a step of the pipeline's own guided call."""
    seen = []

    def note(pipe, i, t, tensors):
        seen.append(tensors["latents"])
        return {}

    model.pipeline(
        prompt, height=32, width=32, num_inference_steps=4, guidance_scale=3.0, output_type="latent",
        generator=torch.Generator().manual_seed(seed), callback_on_step_end=note,
    )  # fmt: skip
    t = model.pipeline.scheduler.timesteps[step]
    if step == 0:  # the pipeline's own noise
        start = model.pipeline.prepare_latents
        size = (32, 32, torch.float32, "cpu", torch.Generator().manual_seed(seed))
        made = start(1, 4, *size)
        return made[0] if isinstance(made, tuple) else made, t
    return seen[step - 1], t


def test_the_target_at_a_recorded_call_is_the_literal_one(learner):
    """x_t by the stock call, and each prediction by the arguments that its pipeline gives the denoiser."""
    way, eta = points(learner), 1.5
    for node in range(4):
        state = way.at(0, 1, node)
        x, t = on_the_way(learner, "a church", 11 + 1, 3 - node)
        args, kwargs = way.fed(state, "a church")
        assert torch.equal(args[0] if args else kwargs["hidden_states"], x)
        with torch.no_grad():
            c, empty = (literal(learner, learner.denoiser, x, t, text, 3.0) for text in ("a church", ""))
            said, uncond = (way.predict(learner.denoiser, state, text) for text in ("a church", ""))
        target, wanted = uncond - eta * (said - uncond), (empty - eta * (c - empty)).flatten()
        assert (target - wanted).norm() < 1e-5 * wanted.norm()
        assert (target - c.flatten()).norm() > 1e-2 * wanted.norm()  # control
    if "guidance_embeds" in learner.denoiser.config:  # the number that FLUX.1 reads is among what is recorded
        assert float(kwargs["guidance"]) == 3.0
        other = literal(learner, learner.denoiser, x, t, "a church", 1.0)
        assert not torch.allclose(other, c, atol=1e-3)


@pytest.mark.parametrize("anchor", [None, "house"])
def test_esd_of_a_family_is_the_literal_algorithm(learner, anchor):
    """x_t by the stock call, predictions by the denoiser's own arguments, torch's Adam."""
    found, edit = esd(learner, dataclasses.replace(ESD, eta=1.5), seed=3, anchor=anchor)
    base = learner.copy()
    trained, generator = learner.copy(), torch.Generator().manual_seed(3)
    seed = int(torch.randint(2**31, (), generator=generator))
    names = denoiser_parameters(trained.denoiser, "x")
    optimizer = torch.optim.Adam([trained.denoiser.get_parameter(name) for name in names], lr=ESD.lr)
    wanted, unled, prompt = [], [], f"a {anchor or 'church'}"
    for _ in range(ESD.iterations):
        draw = lambda high: int(torch.randint(high, (1,), generator=generator))
        draw(1)  # the prompt
        noise, node = draw(3), draw(4)
        x, t = on_the_way(base, prompt, seed + noise, 3 - node)
        of = lambda model, text: literal(model, model.denoiser, x, t, text, 3.0)  # noqa: B023
        with torch.no_grad():
            f, c, empty = (of(base, text) for text in (prompt, "a church", ""))
            y = f - 2.5 * (c - empty)
        predicted = of(trained, prompt)
        loss = torch.nn.functional.mse_loss(predicted, y)
        unled.append(float(torch.nn.functional.mse_loss(predicted, f).detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wanted.append(float(loss.detach()))
    print(max(abs(a - b) / b for a, b in zip(found, wanted, strict=True)))
    assert found == pytest.approx(wanted, rel=1e-3)
    assert found != pytest.approx(unled, rel=0.1)  # control
    change, wrong = 0.0, 0.0
    for name in names:
        if not name.endswith(("to_v.weight", "add_v_proj.weight", "to_out.0.weight")):
            continue  # a saturated softmax gives no gradient but rounding, which Adam makes as large as any
        wanted = trained.denoiser.get_parameter(name).detach() - base.denoiser.get_parameter(name).detach()
        change += float(wanted.square().sum())
        wrong += float((edit.tensors[f"{learner.denoiser_part}.{name}"].float() - wanted).square().sum())
    print(f"the edit is {(wrong / change) ** 0.5:.1e} of its size away")
    assert wrong < 0.05**2 * change


def test_velocity_and_noise_have_the_same_target():
    """With x = (1 - s) x_0 + s e, in float64: the target of the noise, and the loss, from those of the velocity."""
    draw = lambda: torch.randn(4, 5, generator=torch.Generator().manual_seed(next(seeds))).double()
    seeds = iter(range(9))
    x, c, empty, found, s, eta = draw(), draw(), draw(), draw(), 0.3, 1.7
    noise = lambda v: x + (1 - s) * v
    target = lambda text, uncond: uncond - eta * (text - uncond)
    torch.testing.assert_close(target(noise(c), noise(empty)), noise(target(c, empty)), rtol=0, atol=1e-12)
    both = [
        (noise(found) - target(noise(c), noise(empty))).square().sum(),
        (found - target(c, empty)).square().sum(),
    ]
    torch.testing.assert_close(both[0], (1 - s) ** 2 * both[1], rtol=1e-12, atol=0)
    sums_to_two = lambda text, uncond: uncond + text  # control: no such target
    assert not torch.allclose(sums_to_two(noise(c), noise(empty)), noise(sums_to_two(c, empty)))


def test_esd_trains_every_family_or_says_why_not(family):
    """Where the target is what the model predicts anyway there is nothing to learn; else only what is asked changes."""
    if "callback_on_step_end" not in pipelines.known(family.pipeline.__call__):
        with pytest.raises(
            ValueError, match="PixArtSigmaPipeline does not report its steps: erase by a closed"
        ):
            esd(family)
        return
    before = {name: p.clone() for name, p in family.denoiser.named_parameters()}
    still = sized(family, eta=-1.0, iterations=1, lr=1e-2)
    (nothing,) = losses_of(family, still)
    (control,) = losses_of(family, dataclasses.replace(still, eta=1.0))
    assert nothing < 1e-9 * control
    _, edit = esd(family, sized(family, parameters="x-strict"))
    wanted = denoiser_parameters(family.denoiser, "x-strict")
    part = family.denoiser_part
    assert edit.kind == "weight_delta" and set(edit.tensors) == {f"{part}.{name}" for name in wanted}
    owners = {name.split(".")[-2] for name in wanted}
    assert owners <= {"to_k", "to_v", "add_k_proj", "add_v_proj"} and {"to_k", "to_v"} <= owners
    for name, parameter in family.denoiser.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None and parameter.requires_grad
    with edit.applied(family):
        changed = {n for n, p in family.denoiser.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= set(wanted)


def test_text_is_swapped_as_the_pipeline_of_a_family_would(family):
    """Guidance away from the empty prompt predicts with both texts at one state: so does a recorded call with each."""
    if "callback_on_step_end" not in pipelines.known(family.pipeline.__call__):
        return
    way, steps, rows = points(family), [], []

    def keep(module, args, kwargs, output):
        for _, one in leaves(output):  # a batch, or a list of pictures
            batch = len(args[0]) if isinstance(args[0] if args else None, list) else len(one)
            rows.extend((len(steps), row.flatten()) for row in (one if batch == len(one) else one[None]))

    def count(pipe, i, t, tensors):
        steps.append(i)
        return {}

    side = max(32, 8 * family.pipeline.vae_scale_factor)
    handle = family.denoiser.register_forward_hook(keep, with_kwargs=True)
    try:
        pipelines.run(
            family.pipeline, prompt=["a church"], height=side, width=side, num_inference_steps=4,
            generator=[torch.Generator().manual_seed(11 + 1)], output_type="latent", callback_on_step_end=count,
            **pipelines.guided(family.pipeline, family.denoiser, 3.0, None),
        )  # fmt: skip
    finally:
        handle.remove()
    far = {"a church": [], "": [], OTHER: []}
    for step in (0, 2):
        own, state = [row for when, row in rows if when == step], way.at(0, 1, 3 - step)
        with torch.no_grad():
            for text, distances in far.items():
                one = way.predict(family.denoiser, state, text)
                distances.append(min(float((one - row).norm() / one.norm()) for row in own))
    print(type(family.pipeline).__name__, far)
    assert max(far["a church"]) < 1e-3 and max(far[OTHER]) > 5e-3  # the second is the control
    if type(family.pipeline).__name__ not in NOT_FROM_EMPTY:
        assert max(far[""]) < 1e-3 and len(own) == 2


# SDXL leads away from zeros, Qwen-Image from " ", Sana and Lumina 2 from "" without their instructions before it,
# and FLUX.1 reads its guidance as a number.
NOT_FROM_EMPTY = (
    "StableDiffusionXLPipeline", "QwenImagePipeline", "SanaPipeline", "Lumina2Pipeline", "FluxPipeline"
)  # fmt: skip


def losses_of(model, config) -> list[float]:
    """Losses, also of a training that changes nothing."""
    seen = []
    try:
        ek.esd.fit(model, "church", config=config, callback=lambda state: seen.append(state["loss"]))
    except ValueError as error:
        assert "changed no weight" in str(error)
    return seen


@pytest.mark.parametrize("source", ["trained", "frozen", "cached"])
def test_where_the_states_of_a_family_come_from(learner, source, monkeypatch):
    """The frozen model's are the same whether kept or not; those of a copy in training move with it."""
    copy = learner.copy().denoiser
    with torch.no_grad():
        for name in denoiser_parameters(copy, "x"):
            copy.get_parameter(name).mul_(1.5)
    plain = points(learner)
    found = points(learner, states=source, walker=copy if source == "trained" else None)
    calls, forward = [], learner.denoiser.forward
    monkeypatch.setattr(learner.denoiser, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    for node in range(4):
        one, other = found.at(0, 1, node), plain.at(0, 1, node)
        assert one.keys() == other.keys()
        same = all(torch.allclose(one[path], other[path], atol=1e-5) for path in one)
        assert same == (source != "trained" or node == 3)  # all begin with the same noise
    times = {"trained": 3 + 2 + 1, "frozen": 2 * (3 + 2 + 1), "cached": 3 + 3 + 2 + 1}
    assert len(calls) == times[source]
    assert learner.denoiser is not copy


@pytest.mark.slow
def test_esd_of_a_family_comes_nearer_to_its_target(learner):
    """At points that are not trained on; the prediction for another prompt moves less."""
    lr = 1e-3 if learner.denoiser_part == "unet" else 3e-3
    config = dataclasses.replace(ESD, iterations=50, batch=2, lr=lr, states="cached")
    seen, edit = esd(learner, config)
    mean = lambda part: sum(part) / len(part)
    way = points(learner, seed=99)
    at = [way.at(0, noise, node) for noise in range(2) for node in range(4)]

    @torch.no_grad()
    def predicted(prompt):
        return torch.stack([way.predict(learner.denoiser, state, prompt) for state in at])

    church, other, empty = (predicted(prompt) for prompt in ("a church", OTHER, ""))
    target = empty - config.eta * (church - empty)
    with edit.applied(learner):
        moved, beside = predicted("a church"), predicted(OTHER)
    nearer = float((moved - target).norm() / (church - target).norm())
    share = float((beside - other).norm() / (moved - church).norm())
    print(
        f"loss {mean(seen[:8]):.4f} -> {mean(seen[-8:]):.4f}, distance x {nearer:.3f}, other prompt moves {share:.2f}"
    )
    assert mean(seen[-8:]) < 0.7 * mean(seen[:8])
    assert nearer < 0.85 and share < 0.9


def test_an_esd_edit_of_a_family_is_kept_and_drawn(learner, tmp_path):
    _, edit = esd(learner, dataclasses.replace(ESD, lr=3e-2, parameters="x-strict"))
    edit.save(tmp_path / "esd.safetensors")
    again = ek.Edit.load(tmp_path / "esd.safetensors")
    assert again.digest == edit.digest and "church" in edit.summary()
    before = drawn(learner, "a church")
    with again.applied(learner):
        edited = drawn(learner, "a church")
    assert np.abs(edited - before).max() > 2
    np.testing.assert_array_equal(drawn(learner, "a church"), before)
    merged = edit.merged(learner)
    assert np.abs(drawn(merged, "a church") - edited).max() <= 2
    merged.save_pretrained(tmp_path / "merged")
    assert np.abs(drawn(ek.load(tmp_path / "merged"), "a church") - edited).max() <= 2
    edit.to_lora(tmp_path / "lora", model=learner)
    copy = learner.copy()
    copy.pipeline.load_lora_weights(tmp_path / "lora")
    assert np.abs(drawn(copy, "a church") - edited).max() <= 2


def test_an_interrupted_esd_of_a_family_goes_on(learner, tmp_path, monkeypatch):
    monkeypatch.setattr("erasekit.tuning.SAVE_EVERY", 2)
    config = dataclasses.replace(ESD, iterations=5, states="trained")
    whole, edit = esd(learner, config, folder=tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("esd-*"))  # no checkpoint outlives its use

    def stop(state):
        if state["step"] == 3:
            raise KeyboardInterrupt

    start = torch.Generator().manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        ek.esd.fit(
            learner, "church", config=config, generator=start, callback=stop, folder=tmp_path / "again"
        )
    rest, resumed = esd(learner, config, folder=tmp_path / "again")
    assert rest == whole[2:] and resumed.digest == edit.digest
    assert esd(learner, config, seed=1)[1].digest != edit.digest  # control
    unet = learner.pipeline.components[learner.denoiser_part]
    assert unet is learner.denoiser and learner.fingerprint() == ek.load(learner.pipeline).fingerprint()


def test_esd_sees_what_a_scheduler_rescales():
    """Euler's sigmas: the state is what the UNet is given, not the latents of the sampler."""
    pipeline = sdxl()
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    model = ek.load(pipeline)
    way = points(model)
    latents, t = on_the_way(model, "a church", 11 + 1, 2)
    (args, kwargs) = way.fed(way.at(0, 1, 1), "a church")
    pipeline.scheduler._step_index = 2
    torch.testing.assert_close(args[0], pipeline.scheduler.scale_model_input(latents, t))
    assert args[1] == t and not torch.allclose(args[0], latents, atol=0.1)


def test_esd_refuses_what_would_be_dropped_or_have_no_effect():
    flux, sd1 = ek.load(tiny("flux")), ek.load(tiny_pipeline())
    fit = lambda model, **changes: ek.esd.fit(model, "church", config=dataclasses.replace(ESD, **changes))
    with pytest.raises(ValueError, match="must be one of x, x-strict, full in a FluxTransformer2DModel"):
        fit(flux, parameters="u")
    with pytest.raises(ValueError, match="changed no weight"):
        fit(flux, lr=0.0)
    with pytest.raises(ValueError, match="the lag of the code for Stable Diffusion 1"):
        fit(flux, faithful=True)
    with pytest.raises(ValueError, match="pixels must be a multiple of 4"):
        fit(flux, pixels=33)
    with pytest.raises(ValueError, match="pixels is for SDXL and transformers"):
        fit(sd1)
    with pytest.raises(ValueError, match="whole number"):
        dataclasses.replace(ESD, pixels=32.0)
    sd3 = tiny("sd3")
    sd3.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(
        ValueError, match="FlowMatchHeunDiscreteScheduler looks at a picture more than once a step"
    ):
        fit(ek.load(sd3))
    klein = tiny("flux2")
    klein.register_to_config(is_distilled=True)
    with pytest.raises(ValueError, match="distilled and ignores guidance: set guidance=0"):
        fit(ek.load(klein))
    assert fit(ek.load(klein), guidance=0.0).tensors


def test_settings_of_esd_are_those_of_the_family(learner):
    """The script for SDXL of 2025, and that for FLUX.1, where eta is one less than its negative_guidance."""
    found = settings.chosen(ek.esd.PRESETS, learner, None, "sd14-object")
    if learner.denoiser_part == "unet":
        assert (found.eta, found.guidance, found.lr, found.iterations, found.states) == (
            0,
            2,
            2e-4,
            200,
            "frozen",
        )
    else:
        assert (found.eta, found.guidance, found.lr, found.sampler, found.pixels) == (0, 3.5, 1e-4, 28, 512)
    assert settings.chosen(ek.uce.PRESETS, learner, None, "sd14-object") == ek.uce.PRESETS["sd14-object"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
@pytest.mark.parametrize("source", ["trained", "cached"])
def test_esd_of_a_family_on_a_gpu(name, source, tmp_path):
    """In half precision: the loss falls, and the edit moves the picture."""
    learning(name, tmp_path)
    model = ek.load(tmp_path, device="cuda")
    assert model.dtype is (torch.float16 if name == "sdxl" else torch.bfloat16)
    seen, edit = esd(model, dataclasses.replace(ESD, iterations=40, batch=2, lr=1e-3, states=source))
    assert sum(seen[-8:]) < 0.9 * sum(seen[:8])
    before = drawn(model, "a church")
    with edit.applied(model):
        assert np.abs(drawn(model, "a church") - before).max() > 0
    np.testing.assert_array_equal(drawn(model, "a church"), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_on_a_gpu(name, tmp_path):
    """In bfloat16, which a transformer is read in there; the edit of the CPU belongs to it as well."""
    with torch.random.fork_rng(devices=[]):
        tiny(name).save_pretrained(tmp_path)
    cpu, gpu = ek.load(tmp_path, device="cpu"), ek.load(tmp_path)
    assert gpu.device.type == "cuda" and gpu.dtype is torch.bfloat16
    assert gpu.fingerprint() == cpu.fingerprint()
    before = drawn(gpu, "church")
    for model in (cpu, gpu):
        edit = ek.uce.fit(model, "church", ["house"], anchor="dog", config=CONFIG)
        with edit.applied(gpu):
            assert np.abs(drawn(gpu, "church") - before).max() > 0
    np.testing.assert_array_equal(drawn(gpu, "church"), before)
