"""Ways of use: each does what its name says, and leaves the model as it was, bit for bit."""

import copy

import numpy as np
import pages
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import StableDiffusionImg2ImgPipeline, UniPCMultistepScheduler
from test_families import sdxl

import erasekit as ek
from erasekit.closed_form import ContextMap
from erasekit.emoji import data
from erasekit.evaluate import deployment, protocols, records, runs
from erasekit.evaluate.deployment import Step
from erasekit.evaluate.protocols import Measure, Prompt, Protocol
from erasekit.experiments import deployment as experiment
from erasekit.figures import METHOD_NAMES
from erasekit.tokens import layout

PROMPTS = ["a dog in ink style", "a dog in flat style"]
SEEDS = [3, 4]
SAMPLING = {"steps": 5, "guidance": 3.0}


def context_edit(model, seed: int = 0) -> ek.Edit:
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(32, 3, generator=random, dtype=torch.float64) * 0.4 for _ in range(2))
    return ek.Edit.from_context_map(ContextMap(left, right), model, method="random")


def delta_edit(model, part: str = "unet", seed: int = 0, with_map: bool = False) -> ek.Edit:
    """Noise on the attention layers of a part, behind a map or not."""
    random = torch.Generator().manual_seed(seed)
    module = model.unet if part == "unet" else model.text_encoder
    names = {"unet": ("to_q.weight", "to_out.0.weight"), "text_encoder": ("fc1.weight",)}[part]
    delta = {
        f"{part}.{name}": torch.randn(one.shape, generator=random) * 0.3
        for name, one in module.named_parameters()
        if name.endswith(names)
    }
    first = context_edit(model).context_map if with_map else None
    return ek.Edit.from_weight_delta(delta, model, first, method="random")


EDITS = {
    "context_map": context_edit,
    "weight_delta": delta_edit,
    "two stages": lambda model: delta_edit(model, with_map=True),
    "text_encoder": lambda model: delta_edit(model, "text_encoder"),
}


@pytest.fixture(params=EDITS)
def edit(request, model):
    return EDITS[request.param](model)


def lora_of(model, folder):
    delta_edit(model, seed=7).to_lora(folder, model=model)
    return folder / "pytorch_lora_weights.safetensors"


def every_step(model, folder):
    random = torch.Generator().manual_seed(5)
    return deployment.steps(
        ["dog", "house"], "church", number=5, sibling=delta_edit(model, seed=9), lora=lora_of(model, folder),
        word=torch.randn(2, 32, generator=random),
    )  # fmt: skip


def drawn(step: Step, model, edit, **changes):
    return step.draw(model, edit, PROMPTS, SEEDS, **SAMPLING | changes)


def same(a, b) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def distance(a, b) -> int:
    """Largest difference of a level, 0 to 255."""
    levels = [np.stack([np.asarray(one) for one in pictures]).astype(int) for pictures in (a, b)]
    return int(abs(levels[0] - levels[1]).max())


def state(model) -> dict:
    parts = {"unet": model.unet, "text": model.text_encoder, "vae": model.vae}
    weights = {
        f"{p} {n}": (t, t.clone(), t.data_ptr()) for p, m in parts.items() for n, t in m.named_parameters()
    }
    kinds = [type(m).__name__ for one in parts.values() for m in one.modules()]
    return {
        "weights": weights,
        "kinds": kinds,
        "scheduler": model.scheduler,
        "config": dict(model.scheduler.config),
    }


def unchanged(model, before: dict) -> bool:
    now = state(model)
    weights = all(
        now["weights"][name][0] is one and torch.equal(one, value) and one.data_ptr() == where
        for name, (one, value, where) in before["weights"].items()
    )
    others = [key for key in before if key != "weights"]
    return weights and all(now[key] == before[key] for key in others if key != "scheduler") and (
        now["scheduler"] is before["scheduler"]
    )  # fmt: skip


@pytest.mark.parametrize("erased", ["dog", "weapon", "ink", "noto"])
def test_what_was_not_erased_is_drawn_in_all_other_styles(erased):
    """Control: the plain stride, which at 25 dogs takes every fifth prompt, one style."""
    left = {*data.STYLES} - {erased}
    for pictures in (13, 25, 50, 100):
        asked = protocols.deployment(erased, pictures, others=True).prompts
        assert len(asked) == pictures and {p.style for p in asked} == left
        assert not {p.concept for p in asked} & {erased}
    whole = [style for _ in range(103) for style in data.STYLES]
    assert len({*whole[:: len(whole) // 25][:25]}) == 1


NAMES = list(deployment.steps("dog", "church", number=5, sibling=1, lora=1, word=1))[1:]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_draws_otherwise_and_undoes_itself(name, model, tmp_path):
    edit, step = context_edit(model), every_step(model, tmp_path)[name]
    plain = model.generate(PROMPTS, SEEDS, **SAMPLING)
    with edit.applied(model):
        edited = model.generate(PROMPTS, SEEDS, **SAMPLING)
    before = state(model)
    first = drawn(step, model, edit)
    assert unchanged(model, before)
    if "LoRA" not in name:  # stock diffusers wraps layers and unwraps them: equal, not the same
        assert same(first, drawn(step, model, edit))
    capitals = name.endswith("capitals")  # to CLIP's tokenizers the same tokens
    assert same(first, edited) == capitals, "the step does nothing"
    assert not same(first, plain)
    assert same(plain, model.generate(PROMPTS, SEEDS, **SAMPLING))


@pytest.mark.parametrize("name", NAMES)
def test_an_error_while_drawing_leaves_the_model_as_it_was(name, model, tmp_path, monkeypatch):
    edit, step = context_edit(model), every_step(model, tmp_path)[name]
    before = state(model)

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.unet, "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        drawn(step, model, edit)
    assert unchanged(model, before) and not model._active


# Weights


@pytest.mark.parametrize("form", ["int8", "int4", "int3"])
def test_groups_of_weights_take_at_most_so_many_values(form, model):
    weight = model.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight
    exact, bias = weight.detach().clone(), model.unet.conv_in.bias.detach().clone()
    with deployment.rounded(model, form):
        near = weight.detach().clone()
        assert torch.equal(model.unet.conv_in.bias, bias)
    bits = int(form[3:])
    for row, was in zip(near, exact, strict=True):  # 32 inputs: one group a row
        assert len(row.unique()) <= 2**bits
        half = (was.max() - was.min()) / (2**bits - 1) / 2
        assert (row - was).abs().max() <= half * 1.001
    assert not torch.equal(near, exact)
    assert torch.equal(weight, exact)


def test_rows_that_no_group_divides_keep_their_own_range(model):
    odd = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    near = deployment._whole(odd, 8)
    assert near.shape == odd.shape
    assert (near - odd).abs().max() <= (odd.max() - odd.min()) / 255


def test_bf16_is_the_model_that_was_stored_so(model):
    stored = ek.load(copy.deepcopy(model.pipeline))
    for part in (stored.unet, stored.text_encoder):
        part.to(torch.bfloat16).float()
    with deployment.rounded(model, "bf16"):
        assert same(model.generate(PROMPTS, SEEDS, **SAMPLING), stored.generate(PROMPTS, SEEDS, **SAMPLING))
    assert not same(model.generate(PROMPTS, SEEDS, **SAMPLING), stored.generate(PROMPTS, SEEDS, **SAMPLING))


def test_pruning_takes_the_smallest(model):
    weight = model.unet.conv_in.weight
    exact = weight.detach().clone()
    with deployment.pruned(model, 0.25):
        gone = weight == 0
        assert gone.sum() == int(0.25 * weight.numel())
        assert exact[gone].abs().max() <= exact[~gone].abs().min()
        assert torch.equal(weight[~gone], exact[~gone])


@pytest.mark.parametrize(
    "change", [lambda m: deployment.rounded(m, "int2"), lambda m: deployment.pruned(m, 1.0)]
)
def test_unknown_changes_of_weights_are_refused(change, model):
    with pytest.raises(ValueError, match=r"choose bf16|between 0 and 1"), change(model):
        pass


def test_weights_that_nothing_is_computed_with_are_not_rounded(model):
    model.unet.fuse_qkv_projections()
    for change in (deployment.rounded(model, "int4"), deployment.pruned(model, 0.5)):
        with pytest.raises(ValueError, match="unfuse_qkv_projections"), change:
            pass


@pytest.mark.parametrize("name", deployment.PACKAGES)
def test_a_package_is_not_given_such_weights_either(name, model):
    model.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        drawn(Step(name, "weights", deployment._packaged, {"by": name}), model, None)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_strength_is_the_average_of_weights(share, model, edit):
    """For every kind of edit, whose change of a weight is linear in its strength."""
    edited, averaged = edit.merged(model), model.copy()
    for part in ("unet", "text_encoder"):
        own = dict(getattr(edited, part).named_parameters())
        for name, parameter in getattr(averaged, part).named_parameters():
            parameter.data = torch.lerp(parameter.data, own[name].data, share)
    step = Step("averaged", "weights", deployment._merged, {"scale": share})
    got, wanted = drawn(step, model, edit), averaged.generate(PROMPTS, SEEDS, **SAMPLING)
    assert distance(got, wanted) <= 1
    assert distance(got, edited.generate(PROMPTS, SEEDS, **SAMPLING)) > 1  # control


def test_by_difference_is_the_sum_of_both_changes(model, edit):
    sibling = delta_edit(model, seed=9)
    edited, tuned, summed = edit.merged(model), sibling.merged(model), model.copy()
    for part in ("unet", "text_encoder"):
        a, b = (dict(getattr(one, part).named_parameters()) for one in (edited, tuned))
        for name, parameter in getattr(summed, part).named_parameters():
            parameter.data = a[name].data + b[name].data - parameter.data
    step = Step(
        "summed", "weights", deployment._merged, {"scale": 1.0, "sibling": sibling, "sibling_scale": 1.0}
    )
    assert distance(drawn(step, model, edit), summed.generate(PROMPTS, SEEDS, **SAMPLING)) <= 1


def test_a_lora_is_loaded_into_the_edited_model(model, edit, tmp_path):
    step = Step("LoRA", "weights", deployment._with_lora, {"lora": lora_of(model, tmp_path)})
    both = edit.merged(model)
    both.pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert distance(drawn(step, model, edit), both.generate(PROMPTS, SEEDS, **SAMPLING)) <= 1


def test_a_lora_that_is_already_there_is_not_taken_away(model, tmp_path):
    step = Step("LoRA", "weights", deployment._with_lora, {"lora": lora_of(model, tmp_path)})
    model.pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="a LoRA or another adapter is loaded"):
        drawn(step, model, None)
    assert model.pipeline.get_list_adapters()


@pytest.mark.parametrize("name", deployment.PACKAGES)
def test_a_package_changes_a_model_of_its_own(name, model, edit):
    """Near what the edited model draws, and not the same."""
    pytest.importorskip(deployment.PACKAGES[name][0])
    step, before = deployment.steps("dog", "cat")[name], state(model)
    got = drawn(step, model, edit)
    assert unchanged(model, before)
    with edit.applied(model):
        edited = model.generate(PROMPTS, SEEDS, **SAMPLING)
    assert 0 < distance(got, edited)
    assert same(got, drawn(step, model, edit))
    assert distance(got, edited) < distance(got, drawn(step, model, None))


def test_steps_of_packages_are_there_where_the_package_is():
    names = deployment.steps("dog", "cat").keys()
    for name, (module, _) in deployment.PACKAGES.items():
        assert (name in names) == deployment.installed(module)
    assert not deployment.installed("no_such_package.of_ours") and deployment.installed("torch.nn")


# Handover


@pytest.mark.parametrize("first", ["edited", "unedited"])
def test_a_handover_at_either_end_is_one_model_alone(first, model, edit):
    handed = lambda at: drawn(
        Step("", "handover", deployment._handed_over, {"at": at, "first": first}), model, edit
    )
    plain = model.generate(PROMPTS, SEEDS, **SAMPLING)
    with edit.applied(model):
        edited = model.generate(PROMPTS, SEEDS, **SAMPLING)
    assert same(handed(5), edited if first == "edited" else plain)
    assert same(handed(0), plain if first == "edited" else edited)
    assert not same(handed(2), plain) and not same(handed(2), edited)


def test_handing_over_to_itself_is_drawing(model):
    """With a sampler that does not look back; one that does begins anew, as a refiner's."""
    step = Step("", "handover", deployment._handed_over, {"at": 2, "first": "edited"})
    assert same(drawn(step, model, None), model.generate(PROMPTS, SEEDS, **SAMPLING))
    model.pipeline.scheduler = UniPCMultistepScheduler.from_config(model.scheduler.config)
    assert not same(drawn(step, model, None), model.generate(PROMPTS, SEEDS, **SAMPLING))


def test_a_part_of_the_way_needs_steps(model):
    told = model.conditioning(PROMPTS)
    for part in ({"skip": 5}, {"skip": 2, "stop": 2}, {"stop": 6}):
        with pytest.raises(ValueError, match="skip < stop"):
            model.draw(told, SEEDS, **SAMPLING, **part)
    with pytest.raises(ValueError, match="latents for 1 pictures"):
        model.draw(told, SEEDS, start=torch.zeros(1, 4, 8, 8), **SAMPLING)


def test_the_curve_of_handovers(tmp_path):
    emoji = ek.load("emoji", device="cpu")
    edit = ek.uce.fit(emoji, "dog", ["cat"])
    asked = protocols.deployment("dog", 3)
    curve = deployment.handover(emoji, edit, asked, at=(0, asked.steps), folder=tmp_path)
    counts = curve.set_index(["first", "at"])["k"]
    assert counts["unedited", 0] == counts["edited", asked.steps] == 0
    assert counts["edited", 0] == counts["unedited", asked.steps] == 3
    inpaint = deployment.steps("dog", "cat")["half of a picture of it painted anew"]
    with pytest.raises(deployment.NoMeaning, match="4 or 9 channels, not of 16"):
        drawn(inpaint, emoji, edit)


# Prompts


def test_a_weight_moves_the_rows_of_the_phrase_alone(model, edit):
    step = lambda factor: Step("", "prompt", deployment._weighted, {"phrases": ["dog"], "factor": factor})
    with edit.applied(model):
        told, empty = model.conditioning(PROMPTS), model.conditioning("")
        plain = model.draw(told, SEEDS, **SAMPLING)
        rows = told.rows.clone()
        rows[:, 2] = 3 * rows[:, 2] - 2 * empty.rows[:, 2]  # start, a, dog
        wanted = model.draw(told.with_rows(rows), SEEDS, **SAMPLING)
    assert distance(drawn(step(1.0), model, edit), plain) <= 1
    assert distance(drawn(step(3.0), model, edit), wanted) <= 1 < distance(wanted, plain)


def test_a_blend_goes_from_one_prompt_to_the_other(model, edit):
    blended = lambda share: drawn(
        Step("", "prompt", deployment._blended, {"phrases": ["dog"], "other": "castle", "share": share}),
        model,
        edit,
    )
    other = [text.replace("dog", "castle") for text in PROMPTS]
    with edit.applied(model):
        ends = [model.generate(texts, SEEDS, **SAMPLING) for texts in (PROMPTS, other)]
    assert same(blended(0.0), ends[0]) and same(blended(1.0), ends[1])
    assert not same(blended(0.5), ends[0]) and not same(blended(0.5), ends[1])


@pytest.mark.parametrize("form, text", [("{}s", "a dogs in ink style"), ("upper", "a DOG in ink style")])
def test_another_spelling_is_that_prompt(form, text, model, edit):
    step = Step("", "prompt", deployment._reworded, {"phrases": ["dog"], "form": form})
    with edit.applied(model):
        wanted = model.generate([text, text.replace("ink", "flat")], SEEDS, **SAMPLING)
    assert same(drawn(step, model, edit), wanted)


def test_a_prompt_without_the_phrase_is_an_error(model):
    step = Step("", "prompt", deployment._reworded, {"phrases": ["church"], "form": "{}s"})
    with pytest.raises(ValueError, match="holds none of church"):
        drawn(step, model, None)
    assert deployment._found(["a dog house"], ["dog", "dog house"]) == [("a dog house", "dog house")]


def test_a_spared_negative_branch_is_the_unedited_models(model):
    """e = e_0 + w (e_edited(c) - e_0) with the unedited model's e_0, step by step."""
    edit = context_edit(model)
    step = Step("", "prompt", deployment._spared, {})
    edited, scheduler = edit.merged(model), copy.deepcopy(model.scheduler)
    told, empty = model.encode(PROMPTS[:1]), model.encode("")
    scheduler.set_timesteps(5)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(SEEDS[0]))
    with torch.no_grad():
        for t in scheduler.timesteps:
            away = model.unet(x, t, empty).sample
            x = scheduler.step(away + 3.0 * (edited.unet(x, t, told).sample - away), t, x).prev_sample
    wanted = model.decode(x)
    assert distance(step.draw(model, edit, PROMPTS[:1], SEEDS[:1], **SAMPLING), wanted) <= 1
    with edit.applied(model):
        assert distance(model.generate(PROMPTS[:1], SEEDS[:1], **SAMPLING), wanted) > 1  # control
    with pytest.raises(ValueError, match="not one map"):
        drawn(step, model, delta_edit(model))


def test_a_word_in_place_of_the_phrase(model, edit):
    """The phrase's own row in the token table gives the plain picture, another one does not."""
    own = model.tokenizer("dog", add_special_tokens=False).input_ids
    table = model.text_encoder.get_input_embeddings().weight.detach()
    step = lambda rows: Step("", "prompt", deployment._learned, {"phrases": ["dog"], "rows": rows})
    with edit.applied(model):
        plain = model.generate(PROMPTS, SEEDS, **SAMPLING)
    assert distance(drawn(step(table[own].clone()), model, edit), plain) <= 1
    assert distance(drawn(step(-table[own]), model, edit), plain) > 1
    assert layout(model.tokenizer, [own])[1].sum() == 0


# Pictures


def test_image_to_image_is_the_stock_pipelines(model, edit):
    step = Step("", "picture", deployment._from_picture, {"strength": 0.5})
    shown = model.generate(PROMPTS, [seed + deployment.FAR for seed in SEEDS], **SAMPLING)
    pipeline = StableDiffusionImg2ImgPipeline(
        **edit.merged(model).pipeline.components, requires_safety_checker=False
    )
    wanted = pipeline(
        PROMPTS, shown, strength=0.5, num_inference_steps=5, guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    ).images  # fmt: skip
    got = drawn(step, model, edit)
    assert distance(got, wanted) <= 1
    assert distance(got, drawn(Step("", "picture", step.how, {"strength": 1.0}), model, edit)) > 1


# Runs


def deployed(**changes) -> Protocol:
    measure = Measure("seen", ("target",), "emoji-object", labels=("dog",))
    return Protocol("tiny", (Prompt("a dog in ink style", "dog", "ink", "target"),), (measure,), **changes)


def test_runs_of_steps_are_kept_apart_and_go_on(tmp_path, monkeypatch):
    emoji = ek.load("emoji", device="cpu")
    edits = [ek.uce.fit(emoji, "dog", kept) for kept in (["cat"], ["fox"])]
    asked = deployed(steps=2, seeds=(0, 1))
    steps = deployment.steps("dog", "cat", number=2)
    folders = {
        runs.run(emoji, edit, asked, step=steps[name], folder=tmp_path, progress=False).folder
        for edit in [None, *edits]
        for name in (deployment.AS_IT_IS, "strength 1.5", "strength 2.0", "rounded to int3")
    }
    assert len(folders) == 12
    monkeypatch.setattr(Step, "draw", lambda *args, **kwargs: pytest.fail("drawn again"))
    again = runs.run(emoji, edits[0], asked, step=steps["strength 2.0"], folder=tmp_path, progress=False)
    assert again.manifest["last"]["drawn"] == 0
    with pytest.raises(ValueError, match="not both"):
        runs.run(emoji, None, asked, attack=torch.eye(2), step=steps["strength 2.0"], folder=tmp_path)


@pytest.mark.parametrize("erased, n", [("dog", 1), ("ink", 40), ("weapon", 7)])
def test_prompts_of_deployment(erased, n):
    aimed, rest = protocols.deployment(erased, 40), protocols.deployment(erased, 40, others=True)
    assert len(aimed.prompts) == len(rest.prompts) == 40 and aimed.hash != rest.hash
    assert len({p.concept for p in aimed.prompts}) == n
    holds = lambda p: erased in (p.concept, p.style) or p.concept in aimed.erased
    assert all(map(holds, aimed.prompts)) and not any(map(holds, rest.prompts))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name, tmp_path):
    model = ek.load(tiny_pipeline(), device="cuda")
    edit, step = context_edit(model), every_step(model, tmp_path)[name]
    before = state(model)
    assert len(drawn(step, model, edit)) == 2 and unchanged(model, before)


@pytest.mark.slow
def test_what_an_edit_survives_is_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "UPDATES", 1)
    monkeypatch.setattr(experiment, "word", lambda *where: None)
    emoji = ek.load("emoji", device="cpu")
    edit = ek.uce.fit(emoji, "dog", ["cat"])
    only = ["averaged with the unedited, 25% edited", "an ordinary LoRA loaded"]
    settings = {"pictures": 4, "only": only, "folder": tmp_path}
    before = experiment.measure(emoji, None, "dog", "cat", **settings)
    after = experiment.measure(emoji, edit, "dog", "cat", command="x", **settings)
    records.save(after, tmp_path / "after.json")
    assert records.read(tmp_path / "after.json") == after
    count = lambda result, step: [
        m.value["k"] for m in result.measurements if (m.step, m.measure) == (step, "target")
    ]
    assert [count(before, "as it is"), count(after, "as it is")] == [[4], [0]]
    assert count(before, only[0]) == []  # of an unedited model it is the model
    k = count(after, only[0])[0]
    assert after.details["against as it is"][only[0]]["target"] == {"back": k, "gone": 0} and k > 0
    for m in after.measurements:
        seen = records.verdicts(records.about(after, m.step), m.measure)
        assert (sum(seen.values()), len(seen)) == (m.value["k"], m.value["n"])
    plain, averaged = (records.about(after, step) for step in ("as it is", only[0]))
    assert records.paired(plain, averaged, "target")["difference"] == k / 4
    with pytest.raises(ValueError, match="there is no step soup"):
        experiment.measure(emoji, edit, "dog", "cat", only=["soup"], folder=tmp_path)
    again = experiment.sibling(emoji, "dog", tmp_path)  # read, not trained anew
    monkeypatch.setattr(experiment, "optimize", lambda *args, **more: pytest.fail("trained anew"))
    assert again.digest == experiment.sibling(emoji, "dog", tmp_path).digest
    assert {name.rpartition(".")[0].rpartition("attn")[2][2:] for name in again.tensors} == set(
        experiment.ATTENTION
    )


SDXL_NAMES = ("rounded to int4", "first 2 of 5 steps unedited", "weighted by 2.0", "blended with church, half",
              "negative prompt: church", "a word learned on the unedited model",
              "from a picture of it, strength 0.5")  # fmt: skip


@pytest.mark.parametrize("name", SDXL_NAMES)
def test_steps_of_sdxl(name):
    model = ek.load(sdxl())
    edit = ek.uce.fit(model, "dog", "castle", config=ek.uce.PRESETS["sd14-object"])
    width = sum(one.get_input_embeddings().embedding_dim for one in model.text_encoders.values())
    word = torch.randn(2, width, generator=torch.Generator().manual_seed(5))
    step = deployment.steps("dog", "church", number=5, word=word)[name]
    before = state(model)
    pictures = drawn(step, model, edit, guidance=5.0)
    assert len(pictures) == 2 and unchanged(model, before)
    with edit.applied(model):
        assert not same(pictures, model.generate(PROMPTS, SEEDS, **SAMPLING | {"guidance": 5.0}))


FORMS = ("bf16", "fp8", "int8", "int4", "int3")
SAID = {  # rows of docs/models.md: steps
    "used as it is": ["as it is"],
    "averaged half and half with the unedited model": ["averaged with the unedited, 50% edited"],
    "the same with a fine-tuned sibling of it": ["averaged with a fine-tuned sibling, half each"],
    "added to that sibling by difference": ["added to a fine-tuned sibling, by difference"],
    "an ordinary LoRA loaded into it": ["an ordinary LoRA loaded"],
    "the first two of ten steps by an unedited base": ["first 2 of 10 steps unedited"],
    "the last two of ten steps by an unedited refiner": ["first 8 of 10 steps edited, the rest not"],
    "rounded to int4": ["rounded to int4"],
    '"cat" as the negative prompt': ["negative prompt: cat"],
    "started from a picture of a dog, strength 0.3": ["from a picture of it, strength 0.3"],
    "the same, strength 0.7": ["from a picture of it, strength 0.7"],
}  # fmt: skip


def test_the_docs_say_what_edits_survive():
    head, *rows = pages.table("docs/models.md", "done to the edited model")
    methods = {name: key for key, name in METHOD_NAMES.items()}
    columns = [methods[one] for one in head[1:-1]]
    results = {key: records.read(f"deployment_{key}_dog") for key in columns}
    count = lambda key, step: next(
        m.value["k"] for m in results[key].measurements if (m.step, m.measure) == (step, "target")
    )
    said = {row[0]: row[1:-1] for row in rows}
    assert said == {
        label: [", ".join(str(count(key, step)) for step in steps) for key in columns]
        for label, steps in SAID.items()
    }
    plain = [
        m.value
        for one in records.all_of("deployment").values()
        for m in one.measurements
        if m.measure == "target"
    ]
    assert {value["n"] for value in plain} == {50}
