"""Loading, generating and encoding on tiny pipelines of the real classes."""

import functools
import hashlib
import itertools
import json
import logging
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import LENGTH, WIDTH, tiny_pipeline
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

import erasekit as ek
from erasekit import concepts, exercises, miniatures, models, worlds
from erasekit.concepts import Concept, as_concepts
from erasekit.evaluate.runs import sampled_by
from erasekit.sampling import config_of

PROMPTS = ["a church in flat style", "a dog", "garbage in ink style", "a castle", "a house"]
SEEDS = [3, 1, 4, 1, 5]


def arrays(pictures):
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


def largest_difference(a, b):
    return int(np.abs(arrays(a) - arrays(b)).max())


# ---- generate -----------------------------------------------------------------------------------


def test_batch_size_where_the_caller_does_not_say(shared_model):
    """Four of a small model on the CPU, many of one on an accelerator, some of a large one."""
    assert shared_model.batch_size == shared_model.fixed_batch == 4
    config = types.SimpleNamespace(sample_size=8)
    unet = types.SimpleNamespace(config=config, device=torch.device("cuda"))
    model = models.DiffusionModel(types.SimpleNamespace(unet=unet))
    assert (model.fixed_batch, model.batch_size) == (None, 64)
    config.sample_size = 64
    assert model.batch_size == 16


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_pictures_do_not_depend_on_batch_size_or_order(shared_model, batch_size):
    together = arrays(shared_model.generate(PROMPTS, SEEDS, steps=4))
    assert np.array_equal(
        arrays(shared_model.generate(PROMPTS, SEEDS, steps=4, batch_size=batch_size)), together
    )
    order = [4, 2, 0, 3, 1]
    shuffled = shared_model.generate([PROMPTS[i] for i in order], [SEEDS[i] for i in order], steps=4)
    assert np.array_equal(arrays(shuffled), together[order])
    alone = shared_model.generate(PROMPTS[2], SEEDS[2], steps=4)
    assert np.array_equal(arrays(alone)[0], together[2])
    assert np.abs(together[1] - together[3]).max() > 20  # control: same seed, another prompt


@pytest.mark.parametrize("make", [tiny_pipeline, miniatures.sdxl], ids=["own loop", "pipeline"])
@pytest.mark.parametrize(
    ("sampler", "changes"),
    [
        (EulerAncestralDiscreteScheduler, {}),
        (LCMScheduler, {}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (DPMSolverSDEScheduler, {}),
    ],
)
def test_the_noise_on_the_way_is_that_of_the_seed(make, sampler, changes):
    """Of samplers that add noise at each step, beside whatever is drawn and whatever was drawn before."""
    pipeline = make()
    pipeline.scheduler = scheduler = sampler.from_config(pipeline.scheduler.config, **changes)
    model = models.DiffusionModel(pipeline)
    how = dict(steps=4, height=16, width=16)
    first = arrays(model.generate(PROMPTS[:3], [3, 1, 1], **how))
    moved = torch.get_rng_state()
    alone = arrays(model.generate(PROMPTS[1:2], [1], **how))
    assert np.abs(alone[0] - first[1]).max() <= 1
    assert torch.equal(torch.get_rng_state(), moved)
    assert (
        np.abs(arrays(model.generate(PROMPTS[1:2], [2], **how)) - alone).max() > 10
    )  # control: another seed
    assert "step" not in vars(scheduler) and getattr(scheduler, "noise_sampler_seed", None) is None


def test_pictures_do_not_depend_on_the_number_of_threads(shared_model):
    before, seeds, found = torch.get_num_threads(), range(9), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(np.stack(shared_model.generate(["a church"], seeds, steps=2)))
            assert torch.get_num_threads() == threads
            with pytest.raises(ZeroDivisionError):
                shared_model.generate(["a church"], seeds, steps=2, callback=lambda _: 1 / 0)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(one, found[0]) for one in found)
    assert len(np.unique(found[0], axis=0)) == 9  # control: nine noises, nine pictures


def test_real_batches_agree_to_one_level(shared_model, monkeypatch):
    """Without the fixed batch (large models, GPU) the noise is the same and the rest differs by rounding."""
    fixed = shared_model.generate(PROMPTS, SEEDS, steps=4)
    monkeypatch.setattr(models.DiffusionModel, "fixed_batch", None)
    for batch_size in (1, 2, 16):
        assert (
            largest_difference(shared_model.generate(PROMPTS, SEEDS, steps=4, batch_size=batch_size), fixed)
            <= 1
        )


def test_noise_is_the_seed_alone(shared_model, monkeypatch):
    first = []
    monkeypatch.setattr(
        models, "denoise", lambda *args, **kwargs: first.append(args[4]) or torch.zeros(len(args[2]), 4, 8, 8)
    )
    shared_model.generate(PROMPTS, SEEDS)
    shared_model.generate(PROMPTS[::-1], SEEDS[::-1])
    noise = {seed: [] for seed in SEEDS}
    for generator in itertools.chain(*first):
        noise[generator.initial_seed()].append(torch.randn(3, generator=generator))
    assert all(torch.equal(one, draws[0]) for draws in noise.values() for one in draws)
    assert not torch.equal(noise[3][0], noise[1][0])


def test_zip_and_broadcast(shared_model):
    five = shared_model.generate(["a dog"], seeds=range(5), steps=2)
    assert len(five) == 5 and largest_difference(five[:1], five[1:2]) > 20
    paired = shared_model.generate(["a dog", "a church"], seeds=[0, 1], steps=2)
    assert len(paired) == 2 and np.array_equal(arrays(paired)[0], arrays(five)[0])
    assert len(shared_model.generate(["a dog", "a church"], steps=2)) == 2
    with pytest.raises(ValueError, match="2 prompts and 3 seeds"):
        shared_model.generate(["a dog", "a church"], seeds=[0, 1, 2])


def test_another_sampler_does_not_clip_latents(shared_model, monkeypatch):
    """A pipeline saved with a scheduler that knows no `clip_sample`, in front of one that clips unless it is told."""
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    plain = DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False)
    saved = DPMSolverMultistepScheduler(**noise)
    how = {"prompts": PROMPTS, "seeds": SEEDS, "steps": 4}

    def drawn(scheduler):
        monkeypatch.setattr(shared_model.pipeline, "scheduler", scheduler)
        with sampled_by(shared_model, "DDIMScheduler"):
            return [np.asarray(picture) for picture in shared_model.generate(**how)]

    assert all(map(np.array_equal, drawn(saved), drawn(plain)))
    clipping = DDIMScheduler.from_config(saved.config)  # control: what diffusers makes of it
    assert not all(map(np.array_equal, drawn(clipping), drawn(plain)))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", [None, PNDMScheduler, EulerAncestralDiscreteScheduler])
def test_agrees_with_the_stock_pipeline(model, guidance, scheduler):
    if scheduler is not None:
        model.pipeline.scheduler = scheduler.from_config(model.scheduler.config, skip_prk_steps=True)
    ours = model.generate(PROMPTS, SEEDS, steps=6, guidance=guidance, negative="a picture of art")
    stock = model.pipeline(
        PROMPTS,
        negative_prompt=["a picture of art"] * len(PROMPTS),
        num_inference_steps=6,
        guidance_scale=guidance,
        height=16,
        width=16,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    ).images
    assert largest_difference(ours, stock) <= 1
    assert largest_difference(ours, model.generate(PROMPTS[::-1], SEEDS, steps=6, guidance=guidance)) > 20


def test_the_exercises_on_noise_are_what_diffusers_computes():
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    scheduler.set_timesteps(10)
    for t in (100, 500, 900):
        abar = float(scheduler.alphas_cumprod[t])
        x_t = scheduler.add_noise(x_0, noise, torch.tensor([t, t]))
        torch.testing.assert_close(exercises.add_noise(x_0, noise, abar), x_t)
        stepped = scheduler.step(noise, t, x_t)
        torch.testing.assert_close(exercises.x0_from_eps(x_t, noise, abar), stepped.pred_original_sample)


def test_the_exercises_on_noise_tell_what_is_wrong():
    with pytest.raises(AssertionError, match="shares of the variance"):
        exercises.check_add_noise(lambda x_0, e, abar: abar * x_0 + (1 - abar) * e)
    with pytest.raises(AssertionError, match="the picture alone"):
        exercises.check_add_noise(lambda x_0, e, abar: (1 - abar) ** 0.5 * x_0 + abar**0.5 * e)
    with pytest.raises(AssertionError, match="with the true noise"):
        exercises.check_x0_from_eps(lambda x_t, e, abar: x_t - (1 - abar) ** 0.5 * e)


def test_callback_sees_every_step(shared_model):
    states = []
    pictures = shared_model.generate(PROMPTS, SEEDS, steps=3, callback=states.append)
    assert [(s["first"], s["step"]) for s in states] == [(0, 0), (0, 1), (0, 2), (4, 0), (4, 1), (4, 2)]
    assert states[0]["timestep"] > states[1]["timestep"]
    assert states[2]["latents"].shape == (4, 4, 8, 8) and states[5]["pred_x0"].shape == (1, 4, 8, 8)
    last = shared_model.decode(states[2]["latents"])
    assert np.array_equal(arrays(last), arrays(pictures[:4]))


def test_generating_twice_leaves_no_state_behind(shared_model):
    once = shared_model.generate(["a dog"], steps=3)
    shared_model.generate(["a church"], steps=7)
    assert largest_difference(shared_model.generate(["a dog"], steps=3), once) == 0
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    shared_model.generate(["a dog"], steps=3)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is not touched


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([],), "at least one prompt"),
        (([""],), r"says something.*encode\(\"\"\)"),
        ((["  "],), "says something"),
        (([3],), "says something"),
        ((["a dog"], []), "at least one prompt and one seed"),
        ((["a dog"], [0], 0), "steps must be"),
        ((["a dog"], [0], 2.5), "steps must be"),
        ((["a " * 30],), "30 tokens, the limit is 22"),
        ((["a dog"], [0.2, 0.9]), "seeds must be whole numbers"),
        ((["a dog"], ["3"]), "seeds must be whole numbers"),
        ((["a dog"], [0], 1, 3.0, ["castle", "house"]), "negative must be one text"),
    ],
)
def test_bad_requests_are_one_clear_error(shared_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        shared_model.generate(*arguments)


def test_seeds_are_whole_numbers_of_any_library(shared_model):
    wanted = shared_model.generate(["a dog"], [3], steps=1)
    for seeds in (3, np.int64(3), [np.int32(3)], torch.tensor([3]), np.array([3])):
        assert largest_difference(shared_model.generate(["a dog"], seeds, steps=1), wanted) == 0


# ---- encode and token positions -----------------------------------------------------------------


def test_encode_is_what_the_pipeline_feeds_the_unet(shared_model):
    ours = shared_model.encode(PROMPTS)
    stock, null = shared_model.pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    assert ours.shape == (5, LENGTH, WIDTH)
    assert torch.allclose(ours, stock, atol=1e-5)
    assert torch.allclose(shared_model.encode(""), null[:1], atol=1e-5)
    assert torch.equal(shared_model.encode(PROMPTS[2])[0], ours[2])
    with pytest.raises(ValueError, match="at least one"):
        shared_model.encode([])


def test_the_first_rows_do_not_depend_on_the_rest(shared_model):
    """The encoder is causal: without the padding they are the same."""
    whole, first = shared_model.encode(PROMPTS), shared_model.encode(PROMPTS, length=5)
    assert first.shape == (5, 5, WIDTH)
    assert torch.allclose(first, whole[:, :5], atol=1e-5)


def test_a_prompt_that_just_fits(shared_model):
    assert shared_model.encode("a " * (LENGTH - 2)).shape == (1, LENGTH, WIDTH)
    with pytest.raises(ValueError, match=f"{LENGTH - 1} tokens, the limit is {LENGTH - 2}"):
        shared_model.encode("a " * (LENGTH - 1))


def test_unknown_characters_are_refused(shared_model):
    with pytest.raises(ValueError, match="does not know"):
        shared_model.encode("a <|endoftext|> dog")


@pytest.mark.parametrize(
    "prompt, phrase, expected",
    [
        ("a church in flat style", "church", range(2, 3)),
        ("a GARBAGE in flat style", "garbage", range(2, 8)),  # six pieces
        ("a church house in flat style", "church house", range(2, 4)),
        ("an image of a dog.", "dog", range(5, 6)),
        ("garbage", "garbage", range(1, 7)),
    ],
)
def test_phrases_are_found_by_token_ids(shared_model, prompt, phrase, expected):
    tokenizer = shared_model.tokenizer
    span = concepts.subject_span(tokenizer, prompt, phrase)
    assert span == expected
    ids = concepts.token_ids(tokenizer, [prompt])[0]
    assert tokenizer.decode(ids[span.start : span.stop].tolist()).strip() == phrase
    assert concepts.last_subject_token(tokenizer, prompt, phrase) == expected[-1]


def test_part_of_a_word_is_not_the_word(shared_model):
    assert concepts.subject_span(shared_model.tokenizer, "a dog in ink style", "ink") == range(4, 5)
    for prompt, phrase in [("an inkpot", "ink"), ("a dog", "church"), ("a dog", " ")]:
        with pytest.raises(ValueError, match="not among the tokens|empty"):
            concepts.subject_span(shared_model.tokenizer, prompt, phrase)


def test_end_of_text_is_the_first_of_many(shared_model):
    ids = concepts.token_ids(shared_model.tokenizer, ["a church", "", "garbage"])
    assert ids.shape == (3, LENGTH)
    assert (ids[:, -1] == shared_model.tokenizer.eos_token_id).all()  # padding is the same token
    assert concepts.eot_position(shared_model.tokenizer, ids).tolist() == [3, 1, 7]
    assert int(concepts.eot_position(shared_model.tokenizer, ids[0])) == 3
    with pytest.raises(ValueError, match="no end-of-text"):
        concepts.eot_position(shared_model.tokenizer, ids[:, :1])


@pytest.mark.parametrize(
    "template, phrase, expected",
    [
        ("{}", "church", 1),
        ("{}", " ", 0),
        ("a {} in flat style", "garbage", 7),
        ("a {} in flat style", "", 1),
    ],
)
def test_slot_token(shared_model, template, phrase, expected):
    assert concepts.slot_token(shared_model.tokenizer, template, phrase) == expected


def test_a_slot_inside_a_word_is_refused(shared_model):
    with pytest.raises(ValueError, match="spaces around"):
        concepts.slot_token(shared_model.tokenizer, "a {}pot", "ink")


# ---- concepts -----------------------------------------------------------------------------------


def test_as_concepts():
    church = Concept("church", ("a {}",))
    assert as_concepts("dog") == (Concept("dog"),)
    assert as_concepts(["dog", church, "dog"]) == (Concept("dog"), church)
    assert as_concepts([]) == ()
    words = {"dog": (Concept("dog"),), "pets": (Concept("dog"), Concept("cat"))}
    assert as_concepts([" Dog ", "pets"], words) == (Concept("dog"), Concept("cat"))
    assert as_concepts(Concept("doge"), words) == (Concept("doge"),)  # a free phrase, said explicitly
    with pytest.raises(ValueError, match=r"unknown concept 'doge': did you mean 'dog'\?"):
        as_concepts("doge", words)
    with pytest.raises(ValueError, match="unknown concept 'zzz': use a name"):
        as_concepts(["dog", "zzz"], words)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Concept(""), "needs a name"),
        (lambda: Concept("dog", ("a dog",)), "exactly one"),
        (lambda: Concept("dog", "a {}"), "sequence of prompts"),
        (lambda: as_concepts([3]), "expected text"),
    ],
)
def test_bad_concepts(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_emoji_words_stand_for_concepts(shared_model, monkeypatch):
    monkeypatch.setattr(shared_model, "preset", "emoji")
    (church,) = shared_model.concepts("church")
    assert church.name == "church"
    (flat,) = shared_model.concepts("flat")
    assert flat.templates and "style" in flat.templates[0]
    assert len(shared_model.concepts("weapon")) > 5
    with pytest.raises(ValueError, match="unknown concept 'chruch': did you mean 'church'"):
        shared_model.concepts("chruch")
    monkeypatch.setattr(shared_model, "preset", "sd")
    assert shared_model.concepts("chruch") == (Concept("chruch"),)


# ---- load, save, fingerprint --------------------------------------------------------------------


def test_saved_and_loaded_from_disk(shared_model, tmp_path):
    shared_model.save_pretrained(tmp_path / "tiny")
    loaded = ek.load(tmp_path / "tiny")
    assert loaded.fingerprint() == shared_model.fingerprint()
    assert loaded.preset == "sd" and loaded.dtype == torch.float32
    pictures = shared_model.generate(PROMPTS, SEEDS, steps=3)
    assert largest_difference(loaded.generate(PROMPTS, SEEDS, steps=3), pictures) == 0
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "tiny", safety_checker=None)
    assert largest_difference(ek.load(stock).generate(PROMPTS, SEEDS, steps=3), pictures) == 0


def test_a_saved_folder_holds_json_alone(tmp_path):
    """No -Infinity, as diffusers writes it for DPM-Solver: json reads it, other languages do not."""
    pipeline, strict = tiny_pipeline(), functools.partial(json.loads, parse_constant=pytest.fail)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    models.DiffusionModel(pipeline).save_pretrained(tmp_path / "ours")
    for file in (tmp_path / "ours").rglob("*.json"):
        strict(file.read_text())
    loaded = ek.load(tmp_path / "ours", device="cpu").scheduler
    assert config_of(pipeline.scheduler).items() <= config_of(loaded).items()
    pipeline.scheduler.save_pretrained(tmp_path / "stock")
    with pytest.raises(pytest.fail.Exception, match="-Infinity"):  # control
        strict((tmp_path / "stock" / "scheduler_config.json").read_text())


def test_half_precision_on_disk_is_single_in_memory(tmp_path):
    half = models.DiffusionModel(tiny_pipeline().to(torch.float16), "emoji")
    half.save_pretrained(tmp_path)
    loaded = ek.load(str(tmp_path), device="cpu")
    parts = (loaded.unet, loaded.text_encoder, loaded.vae)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert loaded.preset == "emoji"  # which world it is travels with the folder
    assert loaded.fingerprint() == half.fingerprint()
    assert ek.load(str(tmp_path), device="cpu", dtype="bfloat16").unet.dtype == torch.bfloat16


def test_fingerprint_is_of_the_weights(shared_model, model):
    assert shared_model.fingerprint() == model.fingerprint()
    assert models.load(tiny_pipeline(seed=1)).fingerprint() != model.fingerprint()
    with torch.no_grad():
        model.text_encoder.get_input_embeddings().weight[0, 0] += 1
    assert models.load(model.pipeline).fingerprint() != shared_model.fingerprint()


def test_a_saved_model_does_not_say_where_it_was_read_from(shared_model, tmp_path):
    shared_model.save_pretrained(tmp_path / "one")
    models.load(tmp_path / "one").save_pretrained(tmp_path / "two")
    configs = sorted((tmp_path / "two").rglob("*.json"))
    assert configs and not any(str(tmp_path) in file.read_text() for file in configs)


def test_vae_has_a_fingerprint_of_its_own(model, shared_model):
    """An edit fits a model with another VAE; a measured picture does not."""
    with torch.no_grad():
        model.vae.decoder.conv_out.bias += 1
    assert models.load(model.pipeline).fingerprint() == shared_model.fingerprint()
    assert model.vae_fingerprint() != shared_model.vae_fingerprint()


def test_a_pipeline_object_is_not_copied():
    pipeline = tiny_pipeline()
    model = ek.load(pipeline)
    assert model.pipeline is pipeline and model.unet is pipeline.unet and model.source is None
    assert ek.load(pipeline, dtype="float64").unet.dtype == torch.float64
    for dtype in ("float33", "int8", torch.int8, "float8_e4m3fn", torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"unknown dtype {dtype!r}"):
            ek.load(pipeline, dtype=dtype)
    assert pipeline.unet.dtype == torch.float64  # nothing was cast


def test_a_pipeline_object_keeps_its_world():
    world = models.DiffusionModel(tiny_pipeline(), "emoji")
    for model in (world, world.copy()):
        again = ek.load(model.pipeline)
        assert (again.preset, again.steps, again.vocabulary) == ("emoji", 10, world.vocabulary)
    assert ek.load(tiny_pipeline()).preset == "sd"  # control


def test_edits_of_the_files_fit_a_copy_in_bfloat16_until_its_weights_change(model, tmp_path):
    model.save_pretrained(tmp_path)
    edit, half = ek.uce.fit(model, "church"), ek.load(tmp_path, dtype="bfloat16")
    copy = half.copy()
    for one in (copy, half.copy().copy()):
        with edit.applied(one):
            pass
    assert copy.fingerprint() == half.fingerprint() == model.fingerprint()
    changed = half.copy()
    changed.unet.conv_in.bias.data += 1
    for other in (changed, edit.merged(half), ek.load(tiny_pipeline().to(torch.bfloat16))):  # controls
        assert other.fingerprint() != model.fingerprint()


def test_saving_leaves_other_files_of_the_folder_as_they_are(model, tmp_path):
    """The user's own, and another model's further down."""
    other = {
        "scores.json": "[1, 2]",
        "mine.json": '{"_name_or_path": "keep me"}',
        "runs/config.json": '{"architectures": ["CLIPTextModel"], "_name_or_path": "x"}',
        "unet/scores.json": "[1, 2]",
    }
    for name, text in other.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    save_file({"weight": torch.ones(1)}, tmp_path / "runs" / "model.safetensors")
    model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in other} == other
    assert load_file(tmp_path / "runs" / "model.safetensors").keys() == {"weight"}
    # control: what was written has its old names and its world
    assert all(
        name.startswith("text_model.") for name in load_file(tmp_path / "text_encoder" / "model.safetensors")
    )
    assert json.loads((tmp_path / models.NOTE).read_text()) == {"preset": "sd"}


@pytest.mark.parametrize("note", ["{}", "[]", "{", '"sd"'])
def test_a_damaged_note_of_the_world_is_named(shared_model, tmp_path, note):
    shared_model.save_pretrained(tmp_path)
    (tmp_path / models.NOTE).write_text(note)
    with pytest.raises(ValueError, match="erasekit.json is damaged"):
        ek.load(tmp_path)
    (tmp_path / models.NOTE).unlink()
    assert ek.load(tmp_path).preset == "sd"  # control


def test_a_file_that_the_world_does_not_list_is_named(tmp_path):
    (tmp_path / worlds.CHECKSUMS).write_text(json.dumps({"a": hashlib.sha256(b"a").hexdigest()}))
    for name in "ab":
        (tmp_path / name).write_text(name)
    assert worlds.verified("a", tmp_path) == b"a"  # control
    with pytest.raises(ValueError, match="b is not a file of this world"):
        worlds.verified("b", tmp_path)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_truncated_weights_are_named(shared_model, tmp_path, part):
    shared_model.save_pretrained(tmp_path)
    assert ek.load(tmp_path)  # control
    (file,) = (tmp_path / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="truncated or damaged") as caught:
        ek.load(tmp_path)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_models(tmp_path, monkeypatch):
    monkeypatch.setitem(worlds.WORLDS, "emoji", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="emoji model is not in .*git checkout"):
        ek.load("emoji")
    with pytest.raises(FileNotFoundError, match="no model_index.json"):
        ek.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder here, and the hub did not give it"):
        ek.load("nobody/nothing")


def test_public_names():
    for name in ek.__all__:
        assert getattr(ek, name) is not None
    assert callable(ek.load) and ek.uce.fit and ek.closed_form.solve
    with pytest.raises(AttributeError, match="erasekit has no 'foo'; its public names are load"):
        ek.foo  # noqa: B018


def test_a_copy_reads_and_writes_text_as_the_model_does(model):
    ids = model.tokenizer("a church in flat").input_ids
    for other in (model.copy(), ek.uce.fit(model, "church", ["house"]).merged(model)):
        assert other.tokenizer.decode(ids) == model.tokenizer.decode(ids)
        assert other.unet is not model.unet and other.text_encoder is not model.text_encoder


# ---- quietly ------------------------------------------------------------------------------------


def test_the_embedded_model_loads_without_a_word():
    """Neither bars nor the notice that torchvision is missing, in a process of its own: notices come once."""
    load = "import erasekit; erasekit.load('emoji')"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("bars", [True, False])
def test_quietly_puts_back_what_it_silenced(bars):
    loggers = diffusers_logging, transformers_logging
    notices = logging.getLogger("transformers.utils.import_utils")
    state = lambda: [notices.level, *(log.is_progress_bar_enabled() for log in loggers)]
    before = state()
    with pytest.raises(RuntimeError, match="in between"):
        with models.quietly(bars=bars):
            assert state() == [logging.ERROR, *(now and bars for now in before[1:])]
            raise RuntimeError("in between")
    assert state() == before


def test_weights_that_are_missing_are_still_told(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    file = tmp_path / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file, {"format": "pt"})
    told, handler = [], logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    transformers_logging.add_handler(handler)
    try:
        models.load(tmp_path)
    finally:
        transformers_logging.remove_handler(handler)
    assert any("MISSING" in one for one in told)


def test_a_saved_model_has_the_names_that_old_and_new_transformers_read(model, tmp_path):
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "text_encoder" / "model.safetensors")
    own = model.text_encoder.state_dict()
    assert written.keys() == {f"text_model.{name}" for name in own}
    assert all(torch.equal(written[f"text_model.{name}"], tensor) for name, tensor in own.items())
    again = ek.load(tmp_path)
    assert again.fingerprint() == model.fingerprint()
    assert torch.equal(again.encode("a church"), model.encode("a church"))
    vocabulary = json.loads((tmp_path / "tokenizer" / "vocab.json").read_text())
    assert vocabulary == model.tokenizer.get_vocab()
    merges = (tmp_path / "tokenizer" / "merges.txt").read_text().splitlines()
    old = CLIPTokenizer(vocab=vocabulary, merges=[tuple(line.split()) for line in merges[1:]])
    for text in ("a church in flat style", "a guitar"):
        assert old(text).input_ids == model.tokenizer(text).input_ids
