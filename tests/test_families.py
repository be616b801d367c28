"""The closed forms on Stable Diffusion 2.x and SDXL: tiny random pipelines of the real classes, through a folder."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import LENGTH, WIDTH, tiny_pipeline, tiny_tokenizer
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import erasekit as ek
from erasekit.layers import cross_attention_kv


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
UCE = dataclasses.replace(ek.uce.PRESETS["sd14-object"], lam=1e3)
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
def test_training_knows_v_prediction_and_says_no_to_two_text_encoders(model, name, tmp_path):
    method = getattr(ek, name)
    config = method.Config(**TRAINED[name])
    fit = lambda: method.fit(model, "church", ["dog", "house"], config=config, folder=tmp_path)
    if hasattr(model.pipeline, "text_encoder_2"):
        with pytest.raises(ValueError, match="one text encoder"):
            fit()
        return
    edit = fit()
    before = picture(model.pipeline, **context(model.pipeline, "a church"))
    with edit.applied(model, scale=1000.0 if name in ("esd", "advunlearn", "trce") else 1.0):
        assert np.abs(picture(model.pipeline, **context(model.pipeline, "a church")) - before).max() > 0
    if name == "esd":  # in v as in noise, eta = -1 is what the model predicts anyway
        seen = []
        still = method.Config(**TRAINED[name] | {"iterations": 1}, eta=-1.0)
        method.fit(model, "church", config=still, folder=tmp_path, callback=seen.append)
        assert seen[0]["loss"] < 1e-10
