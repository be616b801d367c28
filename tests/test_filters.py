"""Edits at inference: they act wherever the model draws, are gone afterwards, and are refused where they could not."""

import copy
import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import LENGTH, tiny_pipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from test_attacks import DARK, Brightness, short

import erasekit as ek
from erasekit import cli_methods, edits, filters
from erasekit.attacks import fine_tuning, unlearndiff
from erasekit.attacks.common import sees
from erasekit.edits import Edit
from erasekit.evaluate import deployment, judges, runs
from erasekit.evaluate.protocols import Measure, Prompt, Protocol

judges.register(Brightness())
PROMPTS = ["a church in flat style", "a dog"]
MAKERS = {"attention_filter": ek.adavd, "prompt_filter": ek.semantic_surgery, "guidance_filter": ek.sld}
STRONG = {
    "attention_filter": {"b": 0.5},
    "prompt_filter": {"beta": 0.0, "gamma": 0.1},
    "guidance_filter": {"delta": 0, "lam": 1.0},
}
WEAK = {"attention_filter": {"c": 0.5}, "prompt_filter": {"strength": 0.5}, "guidance_filter": {"lam": -0.2}}
each = pytest.mark.parametrize("kind", MAKERS)


def made(model, kind: str, erase="church") -> Edit:
    """Strong enough to be seen on a random model, whose prompts are much alike."""
    module = MAKERS[kind]
    edit = module.fit(model, erase, config=dataclasses.replace(module.Config(), **STRONG[kind]))
    assert edit.kind == kind
    return edit


def pictures(model, prompts=PROMPTS):
    return np.stack([np.asarray(p) for p in model.generate(prompts, seeds=[0, 1], steps=3)]).astype(int)


def stock(pipeline, prompts=PROMPTS, **changes):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    drawn = pipeline(
        prompts,
        num_inference_steps=3,
        guidance_scale=3.0,
        height=16,
        width=16,
        generator=generators,
        **changes,
    )
    return np.stack([np.asarray(picture) for picture in drawn.images]).astype(int)


def hooks(model) -> int:
    parts = (model.unet, model.text_encoder)
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for part in parts for m in part.modules())


def far(a, b) -> int:
    return int(np.abs(a - b).max())


@pytest.fixture
def quiet(model):
    model.pipeline.set_progress_bar_config(disable=True)
    return model


# Applied, undone, saved


@each
def test_it_acts_by_both_ways_of_drawing_and_is_gone_afterwards(quiet, kind):
    plain, edit = pictures(quiet), made(quiet, kind)
    weights = {id(p): p.data_ptr() for p in quiet.unet.parameters()}
    with edit.applied(quiet):
        assert quiet.edits_in_force() == [edit.digest]
        drawn = pictures(quiet)
        assert far(stock(quiet.pipeline), drawn) <= 1
        assert weights == {id(p): p.data_ptr() for p in quiet.unet.parameters()}
    assert far(drawn, plain) > 10
    assert hooks(quiet) == 0 and np.array_equal(pictures(quiet), plain)


@each
def test_it_is_gone_after_an_exception(quiet, kind):
    plain = pictures(quiet)
    with pytest.raises(KeyError), made(quiet, kind).applied(quiet):
        raise KeyError
    assert hooks(quiet) == 0 and quiet._active == [] and np.array_equal(pictures(quiet), plain)


@each
def test_no_strength_is_no_change_and_strengths_are_told_apart(quiet, kind):
    plain, edit, drawn = pictures(quiet), made(quiet, kind), {}
    for scale in (0.0, 0.5, 1.0):
        with edit.applied(quiet, scale):
            drawn[scale], named = pictures(quiet), quiet.edits_in_force()
        assert named == [edit.digest if scale == 1 else f"{edit.digest} x {scale!r}"]
    assert np.array_equal(drawn[0.0], plain)
    assert 0 < np.abs(drawn[0.5] - plain).mean() != np.abs(drawn[1.0] - plain).mean()


@each
def test_a_file_gives_the_same_pictures(quiet, kind, tmp_path):
    edit = made(quiet, kind)
    edit.save(tmp_path / "filter.safetensors")
    loaded = Edit.load(tmp_path / "filter.safetensors")
    assert (
        loaded.digest == edit.digest and loaded.nbytes == edit.nbytes and loaded.summary() == edit.summary()
    )
    with edit.applied(quiet):
        drawn = pictures(quiet)
    with loaded.applied(quiet):
        assert np.array_equal(pictures(quiet), drawn)


@each
def test_settings_are_part_of_the_digest_and_of_the_summary(quiet, kind):
    """The tensors are the same."""
    module, edit = MAKERS[kind], made(quiet, kind)
    name = {"attention_filter": "a", "prompt_filter": "gamma", "guidance_filter": "s_s"}[kind]
    settings = module.Config(**edit.metadata["config"] | {"template": "{}", name: 3.0})
    other = module.fit(quiet, "church", config=settings)
    assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in edit.tensors.items())
    assert edit.digest != other.digest and f"{name}=3.0" in other.summary() != edit.summary()
    assert edit.metadata["concepts"]["erase"] == ["church"] and "erases church" in edit.summary()


def test_a_file_that_names_no_formula_is_refused(quiet):
    edit = made(quiet, "prompt_filter")
    for wrong in ({}, {"filter": {"formula": "magic"}}, {"filter": {"formula": "adavd"}}):
        with pytest.raises(ValueError, match="has one of the formulas semantic_surgery"):
            Edit("prompt_filter", edit.tensors, edit.metadata | {"filter": None} | wrong)


@each
def test_beside_an_edit_of_the_weights_it_acts_on_what_they_give_whichever_is_outside(quiet, kind):
    """A filter is a function of the model at hand, so the order of nesting does not matter."""
    plain, one, other = pictures(quiet), made(quiet, kind), ek.uce.fit(quiet, "dog", "house")
    alone = {}
    for edit in (one, other):
        with edit.applied(quiet):
            alone[edit.kind] = pictures(quiet)
    found = []
    for outer, inner in ((one, other), (other, one)):
        with outer.applied(quiet), inner.applied(quiet):
            found.append(pictures(quiet))
            assert quiet.edits_in_force() == [outer.digest, inner.digest]
    assert np.array_equal(*found) and all(far(found[0], before) > 5 for before in alone.values())
    assert hooks(quiet) == 0 and np.array_equal(pictures(quiet), plain)


@pytest.mark.parametrize("kinds", [*combinations(MAKERS, 2)])
def test_filters_of_two_kinds_nest_in_any_order(quiet, kinds):
    one, other = made(quiet, kinds[0]), made(quiet, kinds[1], "dog")
    found = []
    for outer, inner in ((one, other), (other, one)):
        with outer.applied(quiet), inner.applied(quiet):
            found.append(pictures(quiet))
    assert np.array_equal(*found)


@pytest.mark.parametrize("kind", ["attention_filter", "guidance_filter"])
def test_two_filters_of_one_kind_do_both_act(quiet, kind):
    one, other = made(quiet, kind), made(quiet, kind, "dog")
    with one.applied(quiet):
        alone = pictures(quiet)
        with other.applied(quiet):
            assert far(pictures(quiet), alone) > 5
        assert np.array_equal(pictures(quiet), alone)


def test_a_filter_of_prompts_or_of_guidance_fits_any_model_with_that_text_encoder(quiet):
    sibling = quiet.copy()
    sibling.unet.conv_in.weight.data += 0.1
    sibling = ek.load(sibling.pipeline)
    for kind in ("prompt_filter", "guidance_filter"):
        with made(quiet, kind).applied(sibling):
            pass
    with (
        pytest.raises(ValueError, match="made for the model"),
        made(quiet, "attention_filter").applied(sibling),
    ):
        pass


# What has no place for a filter


@each
@pytest.mark.parametrize(
    "export",
    "merged to_lora to_kohya to_lycoris to_text_encoder to_projections compose rebased".split(),
)
def test_no_export_pretends_to_hold_it(quiet, kind, export, tmp_path):
    edit, other = made(quiet, kind), ek.uce.fit(quiet, "dog")
    given = {"merged": quiet, "rebased": quiet, "compose": other}.get(export, tmp_path / "out.safetensors")
    with pytest.raises(
        ValueError,
        match=f"{export} needs an edit of weights, not the kind {kind}: a filter acts when .* is in no weight",
    ):
        getattr(edit, export)(given)
    assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(ValueError, match=f"compose needs an edit of weights, not the kind {kind}"):
        other.compose(edit)


@each
def test_a_model_is_not_written_or_copied_while_a_filter_acts(quiet, kind, tmp_path):
    edit = made(quiet, kind)
    with edit.applied(quiet):
        for write in (quiet.save_pretrained, quiet.save_single_file):
            with pytest.raises(ValueError, match="a filter is in force, which cannot be saved"):
                write(tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="leave its `with` block"):
            quiet.copy()
        with pytest.raises(ValueError, match="leave its `with` block to fit"):
            ek.uce.fit(quiet, "dog")
    assert not list(tmp_path.iterdir())


@each
def test_another_model_around_the_same_pipeline_does_not_mistake_what_it_keeps(quiet, kind):
    """Its runs and caches would be those of the unfiltered model: the weights are the same. With a denoiser of its own
    it cannot know which filter acts, only that one does.
    """
    edit, other = made(quiet, kind), ek.load(quiet.pipeline)
    unet = tiny_pipeline(seed=1).unet
    beside = ek.load(type(quiet.pipeline)(**quiet.pipeline.components | {"unet": unet}))
    with edit.applied(quiet):
        assert other.edits_in_force() == [edit.digest]
        if kind == "prompt_filter":
            with pytest.raises(ValueError, match="a filter is in force on this pipeline"):
                beside.edits_in_force()
        else:
            assert beside.edits_in_force() == []
        for act in (other.copy, lambda: ek.uce.fit(other, "dog")):
            with pytest.raises(ValueError, match="leave its `with` block"):
                act()
    assert other.edits_in_force() == []


@each
def test_a_family_that_reads_text_elsewhere_is_refused(quiet, kind, monkeypatch):
    edit = made(quiet, kind)
    monkeypatch.setattr(type(quiet), "own_loop", False)
    with pytest.raises(ValueError, match="for Stable Diffusion 1 and 2"), edit.applied(quiet):
        pass
    with pytest.raises(ValueError, match="erase by uce or rece"):
        MAKERS[kind].fit(quiet, "church")


# What would pass it by


def test_fused_projections_are_refused_before_and_inside(quiet):
    edit = made(quiet, "attention_filter")
    with (
        pytest.raises(ValueError, match="values of cross-attention passed by the filter"),
        edit.applied(quiet),
    ):
        quiet.unet.fuse_qkv_projections()
        pictures(quiet)
    assert hooks(quiet) == 0
    with pytest.raises(ValueError, match="unfuse_qkv_projections"), edit.applied(quiet):
        pass
    quiet.unet.unfuse_qkv_projections()
    with edit.applied(quiet):
        pictures(quiet)


@each
@pytest.mark.parametrize("how", ["wrapped", "in place", "one block"])
def test_compiled_code_is_refused_before_and_after(quiet, kind, how):
    edit, part = made(quiet, kind), "text_encoder" if kind == "prompt_filter" else "unet"

    def compile():
        module = getattr(quiet.pipeline, part)
        if how == "wrapped":
            setattr(quiet.pipeline, part, torch.compile(module, backend="eager"))
        else:
            next(iter(module.children() if how == "one block" else [module])).compile(backend="eager")

    with pytest.raises(ValueError, match=f"the {part} is compiled"), edit.applied(quiet):
        compile()
    with pytest.raises(ValueError, match=f"the {part} is compiled"), edit.applied(quiet):
        pass
    assert hooks(quiet) == 0 and quiet._active == []


def test_a_compiled_unet_would_have_drawn_without_the_filter(quiet):
    """The control: hooks that come after the first call of compiled code do nothing."""
    edit = made(quiet, "attention_filter")
    compiled = torch.compile(quiet.unet, backend="eager")
    x, rows = torch.ones(1, 4, 8, 8), quiet.encode("a church")
    call = lambda unet: unet(x, 5, encoder_hidden_states=rows).sample
    with torch.no_grad():
        plain = call(compiled)
        with edit.applied(quiet):
            assert torch.allclose(call(compiled), plain) and not torch.allclose(call(quiet.unet), plain)


def test_a_lora_over_the_values_is_refused(quiet):
    with (
        pytest.raises(ValueError, match="load no LoRA"),
        made(quiet, "attention_filter").applied(quiet),
    ):
        quiet.unet.add_adapter(LoraConfig(r=2, target_modules=["to_v"]))
        pictures(quiet)


def test_a_processor_that_does_without_the_layer_is_refused(quiet):
    class Own(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            value = torch.nn.functional.linear(text, attn.to_v.weight)
            return attn.to_out[0](value.mean(1, keepdim=True).expand_as(hidden_states))

    with (
        pytest.raises(ValueError, match=r"passed by the filter \(Own, Linear\)"),
        made(quiet, "attention_filter").applied(quiet),
    ):
        next(iter(filters.cross_attention(quiet.unet).values())).set_processor(Own())
        pictures(quiet)


def test_hidden_states_of_other_layers_are_refused(quiet):
    """What the pipeline takes with clip_skip; `return_dict` makes no difference."""
    ids = torch.tensor([quiet.tokenizer("a church", padding="max_length").input_ids])
    read = lambda **how: quiet.text_encoder(ids, **how)
    plain = read()[0]
    with made(quiet, "prompt_filter").applied(quiet):
        for returned in (True, False):
            with pytest.raises(ValueError, match="leave out clip_skip"):
                read(output_hidden_states=True, return_dict=returned)
            assert not torch.equal(read(return_dict=returned)[0], plain)
        assert torch.equal(read()[0], read().last_hidden_state)
    assert torch.equal(read()[0], plain)


def test_a_prompt_that_is_not_padded_is_refused(quiet):
    with (
        made(quiet, "prompt_filter").applied(quiet),
        pytest.raises(ValueError, match="pad prompts to the limit"),
    ):
        quiet.encode("a church", length=5)
    assert quiet.encode("a church").shape[1] == LENGTH


@each
def test_a_copy_of_a_part_takes_the_filter_along(quiet, kind):
    """As the fine-tuning attack copies its victim."""
    edit = made(quiet, kind)
    with edit.applied(quiet):
        drawn = stock(quiet.pipeline)
        victim = copy.deepcopy(quiet.pipeline)
    assert far(stock(victim), drawn) <= 1 < far(stock(quiet.pipeline), drawn)


# Runs, attacks, ways of use


def protocol(**changes) -> Protocol:
    measure = Measure("dark", ("target",), "brightness", labels=("dark",))
    return Protocol("test", tuple(Prompt(p, role="target", seed=0) for p in PROMPTS), (measure,), steps=2)


@each
def test_a_run_keeps_pictures_of_two_filters_apart(quiet, kind, tmp_path):
    edit, given = made(quiet, kind), dict(folder=tmp_path, progress=False)
    half = dataclasses.replace(
        edit, metadata=edit.metadata | {"filter": edit.metadata["filter"] | WEAK[kind]}
    )
    found = {
        name: runs.run(quiet, one, protocol(), **given)
        for name, one in {"none": None, "whole": edit, "half": half}.items()
    }
    assert len({run.folder for run in found.values()}) == 3
    assert len({tuple(run.hashes()) for run in found.values()}) == 3
    with edit.applied(quiet):
        assert runs.run(quiet, None, protocol(), **given).folder == found["whole"].folder


@each
def test_an_attack_sees_the_filter_and_its_gradient(quiet, kind, tmp_path):
    """UnlearnDiffAtk: another loss than on the plain model from the same start, and tokens that move."""
    targets, course = quiet.generate(PROMPTS, seeds=[0, 1], steps=2), {}
    for name, scale in (("plain", 0.0), ("filtered", 1.0)):
        with made(quiet, kind).applied(quiet, scale):
            result = unlearndiff.run(
                quiet, PROMPTS, goal=DARK, seeds=[0, 1], targets=targets, config=short(unlearndiff),
                folder=tmp_path / "attacks",
            )  # fmt: skip
        course[name] = [step["loss"] for one in result.attempts for step in one.trace]
        assert len(result.edit) == 1
    assert course["plain"] != course["filtered"]
    rows = quiet.encode("a church").requires_grad_()
    with made(quiet, kind).applied(quiet):
        x = quiet.unet(torch.ones(1, 4, 8, 8), 5, encoder_hidden_states=rows).sample
        embedded = quiet.text_encoder.get_input_embeddings().weight
        ids = torch.tensor([quiet.tokenizer("a church", padding="max_length").input_ids])
        y = quiet.text_encoder(ids)[0]
        gradients = torch.autograd.grad(x.sum(), rows) + torch.autograd.grad(y.square().sum(), embedded)
    assert all(one.isfinite().all() and one.any() for one in gradients)


@each
def test_a_fine_tuned_victim_keeps_its_filter(quiet, kind, tmp_path):
    given = dict(pictures=quiet.generate(PROMPTS, steps=2), captions=["a house", "a castle"], seeds=[0, 1])
    with made(quiet, kind).applied(quiet):
        result = fine_tuning.run(
            quiet, PROMPTS, goal=sees("dark", judge="brightness"), config=short(fine_tuning, alpha=0.0),
            folder=tmp_path / "attacks", **given,
        )  # fmt: skip
    assert len(result.attempts) == 2 and hooks(quiet) == 0


@each
def test_the_command_line_attacks_a_model_with_the_filter_on(quiet, kind, tmp_path, monkeypatch):
    """Other edits are merged into the victim, which a filter cannot be."""
    seen, edit = [], made(quiet, kind)
    edit.save(tmp_path / "filter.safetensors")

    def attack(name, victim, original, *args, **kwargs):
        seen.extend([victim.edits_in_force(), original.edits_in_force(), hooks(victim) > 0])
        raise InterruptedError

    monkeypatch.setattr(ek, "load", lambda name: quiet)
    monkeypatch.setattr(cli_methods.stages, "attack", attack)
    monkeypatch.setattr(cli_methods.stages, "stage", lambda *args: None)
    with pytest.raises(InterruptedError):
        out = tmp_path / "result.json"
        cli_methods._attack(
            "unlearndiff", unlearndiff, {}, "church", out, tmp_path / "filter.safetensors", False, 2, 1
        )
    assert seen == [[edit.digest], [], True]


@each
def test_ways_of_use_that_need_weights_have_no_meaning(quiet, kind, tmp_path):
    edit, given = made(quiet, kind), dict(steps=2, guidance=3.0)
    use = lambda how, **settings: deployment.Step("it", "weights", how, settings).draw(
        quiet, edit, PROMPTS, [0, 1], **given
    )
    with pytest.raises(deployment.NoMeaning, match="is in no weight"):
        use(deployment._merged, scale=0.5)
    with pytest.raises(deployment.NoMeaning, match="not one map"):
        use(deployment._spared)
    if kind == "attention_filter":
        with pytest.raises(deployment.NoMeaning, match="behind it"):
            use(deployment._with_lora, lora=tmp_path / "none.safetensors")
    plain = quiet.generate(PROMPTS, seeds=[0, 1], **given)
    for how, settings in (
        (deployment._rounded, {"form": "int8"}),
        (deployment._negative, {"negative": "a house"}),
    ):
        without = deployment.Step("it", "weights", how, settings).draw(quiet, None, PROMPTS, [0, 1], **given)
        changed = [
            far(np.asarray(a).astype(int), np.asarray(b))
            for a, b in zip(use(how, **settings), without, strict=True)
        ]
        assert max(changed) > 5, how
    again = quiet.generate(PROMPTS, seeds=[0, 1], **given)
    assert all(np.array_equal(a, b) for a, b in zip(plain, again, strict=True))


def test_every_kind_of_filter_is_a_kind_of_edit():
    assert set(filters.KINDS) < set(edits.get_args(edits.Kind)) and set(filters.FORMULAS.values()) == set(
        filters.KINDS
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each
def test_on_an_accelerator(kind):
    here, there = ek.load(tiny_pipeline()), ek.load(tiny_pipeline().to("cuda"))
    edit, plain = made(here, kind), pictures(there)
    with edit.applied(here), edit.applied(there):
        assert np.abs(pictures(there) - pictures(here)).mean() < 5
        assert far(pictures(there), plain) > 10
    assert np.array_equal(pictures(there), plain)
