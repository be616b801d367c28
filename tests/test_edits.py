"""Edits: exact undo, one file, the right base, and the same pictures by every route."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import WIDTH, tiny_pipeline
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import erasekit as ek
from erasekit import models
from erasekit.closed_form import ContextMap, solve
from erasekit.edits import Edit
from erasekit.layers import cross_attention_kv, unet_parameters

PROMPTS = ["a church in flat style", "a dog", "a house"]


def pictures(model):
    return np.stack([np.asarray(p) for p in model.generate(PROMPTS, seeds=[0, 1, 2], steps=4)]).astype(int)


def stock_pictures(pipeline):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)]
    out = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=3.0, height=16, width=16, generator=generators
    )
    return np.stack([np.asarray(picture) for picture in out.images]).astype(int)


def weights(model):
    parts = {"unet": model.unet, "text_encoder": model.text_encoder, "vae": model.vae}
    return {f"{k}.{name}": t.clone() for k, part in parts.items() for name, t in part.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def map_edit(model, source="church", target="house"):
    rows = [model.encode(text)[0, 1:4] for text in (source, target)]
    return Edit.from_context_map(
        solve(*rows, lam=0.01), model, method="test", config={"lam": 0.01}, concepts={"erase": [source]}
    )


def delta_edit(model, seed=0, rank=3):
    generator = torch.Generator().manual_seed(seed)
    delta = {
        f"unet.{name}": torch.randn(layer.out_features, rank, generator=generator)
        @ torch.randn(rank, layer.in_features, generator=generator)
        * 0.3
        for name, layer in cross_attention_kv(model.unet).items()
    }
    return Edit.from_weight_delta(delta, model, method="test", concepts={"erase": ["dog"]})


both_kinds = pytest.mark.parametrize("make", [map_edit, delta_edit])


# ---- applying and undoing -----------------------------------------------------------------------


@both_kinds
def test_undo_is_bit_exact(model, make):
    edit, before, plain = make(model), weights(model), pictures(model)
    storage = [p.data_ptr() for p in model.unet.parameters()]
    with edit.applied(model) as same_model:
        assert same_model is model
        changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
        assert changed == {f"unet.{name}" for name in cross_attention_kv(model.unet)}
        assert np.abs(pictures(model) - plain).max() > 20
    assert same(weights(model), before)
    assert [p.data_ptr() for p in model.unet.parameters()] == storage  # the very same tensors
    assert np.array_equal(pictures(model), plain)


@both_kinds
def test_undo_after_an_exception_and_after_damage_inside(model, make):
    edit, before = make(model), weights(model)
    with pytest.raises(RuntimeError, match="stop"), edit.applied(model):
        for layer in cross_attention_kv(model.unet).values():
            layer.weight.data.fill_(float("nan"))  # training inside the block must not reach the originals
        raise RuntimeError("stop")
    assert same(weights(model), before)
    assert model._active == []


def test_undo_after_the_model_moved(model):
    edit, before = map_edit(model), weights(model)
    with edit.applied(model):
        model.unet.to(torch.float64)
    assert model.dtype == torch.float64
    assert all(torch.equal(value.double(), before[n].double()) for n, value in weights(model).items())


def test_scale(model):
    edit, plain = map_edit(model), weights(model)
    name, layer = next(iter(cross_attention_kv(model.unet).items()))
    with edit.applied(model, scale=0.0):
        assert same(weights(model), plain)
    with edit.applied(model):
        full = layer.weight.detach().clone()
    with edit.applied(model, scale=0.5):
        half = layer.weight.detach().clone()
    assert torch.allclose(half, (full + plain[f"unet.{name}"]) / 2, atol=1e-6)


def test_nested_blocks_undo_in_turn_and_equal_the_composition(model):
    one, two = map_edit(model), map_edit(model, "dog", "castle")
    before = weights(model)
    with one.applied(model):
        outer = weights(model)
        with two.applied(model):
            nested = weights(model)
        assert same(weights(model), outer)
    assert same(weights(model), before)
    with one.compose(two).applied(model):
        composed = weights(model)
    with two.compose(one).applied(model):
        other_order = weights(model)
    for name in cross_attention_kv(model.unet):
        name = f"unet.{name}"
        assert torch.allclose(composed[name], nested[name], atol=1e-5)
        assert not torch.allclose(other_order[name], nested[name], atol=1e-3)  # control: order matters


def test_blocks_left_in_another_order_are_all_undone_and_it_is_said(model):
    one, before = map_edit(model), weights(model)
    names = [
        f"unet.{next(iter(cross_attention_kv(model.unet)))}",
        "unet.conv_in.bias",
    ]  # the outer's, and not
    two = Edit.from_weight_delta({name: torch.ones_like(before[name]) for name in names}, model)
    outer, inner = one.applied(model), two.applied(model)
    outer.__enter__(), inner.__enter__()
    with pytest.raises(ValueError, match="left before a block inside it"):
        outer.__exit__(None, None, None)
    assert same(weights(model), before) and model.edits_in_force() == []
    with two.applied(model):  # a block between is not touched by the exit that is late
        new = weights(model)
        inner.__exit__(None, None, None)
        assert same(weights(model), new) and model.edits_in_force() == [two.digest]
    assert same(weights(model), before)


def test_every_model_around_a_denoiser_knows_the_edits_in_force(model, tmp_path):
    """What it would fit, merge or keep would be of the edited weights under the name of the unedited ones."""
    edit, other = map_edit(model), ek.load(model.pipeline)
    fingerprint, late = other.fingerprint(), ek.load(StableDiffusionPipeline(**model.pipeline.components))
    acts = (
        lambda: ek.rece.fit(other, "dog"),
        lambda: edit.merged(other),
        lambda: edit.to_lora(tmp_path / "lora", model=other),
        other.copy,
        late.fingerprint,
    )
    with edit.applied(model):
        assert other.edits_in_force() == late.edits_in_force() == [edit.digest]
        for act in acts:
            with pytest.raises(ValueError, match="an edit is applied to this"):
                act()
        with map_edit(model, "dog", "castle").applied(model):
            pass  # the control: the model itself
    assert other.edits_in_force() == [] and late.fingerprint() == fingerprint
    for act in acts:
        act()


@pytest.mark.parametrize("then", ["leave", "unload"])
def test_a_lora_fused_inside_the_block_is_said_at_its_end(model, then, tmp_path):
    edit, before = map_edit(model), weights(model)
    map_edit(model, "dog", "castle").to_lora(tmp_path, model=model)
    with pytest.raises(ValueError, match="a LoRA was fused inside the block"), edit.applied(model):
        model.pipeline.load_lora_weights(tmp_path)
        model.pipeline.fuse_lora()
        if then == "unload":
            model.pipeline.unload_lora_weights()
    model.pipeline.unfuse_lora()  # subtracts nothing
    model.pipeline.unload_lora_weights()
    assert same(weights(model), before)
    with edit.applied(model):  # the control: loaded and not fused
        model.pipeline.load_lora_weights(tmp_path)
    model.pipeline.unload_lora_weights()
    assert same(weights(model), before)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(model, scale):
    before = weights(model)
    for edit in (map_edit(model), delta_edit(model), ek.safree.fit(model, "church")):
        with pytest.raises(ValueError, match="scale must be a finite number"), edit.applied(model, scale):
            pass
        with edit.applied(model, 1e-3):  # the control
            pass
    assert same(weights(model), before)


def test_an_edit_has_memory_of_its_own(model, tmp_path):
    """Also where two parameters have one delta, which safetensors does not write."""
    names = [f"unet.{name}" for name, one in model.unet.named_parameters() if one.shape == (16,)][:2]
    shared = torch.ones(16)
    edit = Edit.from_weight_delta(dict.fromkeys(names, shared), model)
    digest = edit.digest
    shared.zero_()
    assert edit.digest == digest and all(one.eq(1).all() for one in edit.tensors.values())
    edit.save(tmp_path / "edit.safetensors")
    assert Edit.load(tmp_path / "edit.safetensors").digest == digest
    direction = torch.ones(2, WIDTH)
    seen = ek.semantic_surgery.fit(model, "church")
    own = Edit.from_filter({"direction": direction}, seen.metadata["filter"], model)
    direction.zero_()
    assert own.tensors["direction"].eq(1).all()


def test_deltas_compose_by_adding(model):
    one, two = delta_edit(model, 0), delta_edit(model, 1)
    both = one.compose(two)
    assert all(torch.equal(both.tensors[n], one.tensors[n] + two.tensors[n]) for n in one.tensors)
    assert both.metadata["concepts"]["erase"] == ["dog", "dog"] and both.metadata["method"] == "test + test"
    with pytest.raises(ValueError, match="cannot compose a context_map with a weight_delta"):
        map_edit(model).compose(one)


@both_kinds
def test_wrong_base_is_refused_and_nothing_changes(model, make, tmp_path):
    other = models.load(tiny_pipeline(seed=1))
    edit, before = make(model), weights(other)
    for attempt in (
        lambda: edit.applied(other).__enter__(),
        lambda: edit.merged(other),
        lambda: edit.to_lora(tmp_path, model=other),
    ):
        with pytest.raises(ValueError) as caught:
            attempt()
        assert model.fingerprint() in str(caught.value) and other.fingerprint() in str(caught.value)
    assert same(weights(other), before) and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="made for different models"):
        edit.compose(make(other))


def test_overflow_is_refused_before_anything_is_written(model):
    model = models.load(model.pipeline, dtype=torch.float16)
    edit = delta_edit(model)
    last = list(edit.tensors)[-1]
    edit.tensors[last].fill_(1e6)  # only the last of the layers overflows
    before = weights(model)
    with pytest.raises(ValueError, match="infinite or NaN in torch.float16"), edit.applied(model):
        pass
    assert same(weights(model), before)


def test_editing_the_weights_is_mapping_the_embeddings(model):
    """UNet(W T, X) = UNet(W, X T^T)."""
    edit, x = map_edit(model), model.encode(PROMPTS)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model.unet(latents, 500, x).sample
        mapped = model.unet(latents, 500, edit.context_map.apply(x)).sample
        with edit.applied(model):
            edited = model.unet(latents, 500, x).sample
    assert torch.allclose(edited, mapped, atol=1e-4)
    assert not torch.allclose(edited, plain, atol=1e-2)


# ---- the file -----------------------------------------------------------------------------------


@both_kinds
def test_saved_and_loaded_gives_the_same_pictures(model, make, tmp_path):
    edit = make(model)
    edit.save(tmp_path / "new" / "edit.safetensors")
    loaded = ek.Edit.load(tmp_path / "new" / "edit.safetensors")
    assert (loaded.kind, loaded.metadata, loaded.digest) == (edit.kind, edit.metadata, edit.digest)
    assert loaded.nbytes == edit.nbytes and loaded.summary() == edit.summary()
    with edit.applied(model):
        before_saving = pictures(model)
    with loaded.applied(model):
        assert np.array_equal(pictures(model), before_saving)
    assert os.listdir(tmp_path / "new") == ["edit.safetensors"]  # no temporary file is left


def test_the_file_says_where_it_comes_from(model, tmp_path):
    edit = map_edit(model)
    edit.save(tmp_path / "edit.safetensors")
    with safe_open(tmp_path / "edit.safetensors", "pt") as file:
        header = json.loads(file.metadata()["erasekit"])
    assert header["kind"] == "context_map"
    assert header["metadata"]["base"] == model.fingerprint()
    assert header["metadata"]["method"] == "test" and header["metadata"]["config"] == {"lam": 0.01}
    assert set(header["metadata"]["versions"]) == {"erasekit", "torch", "diffusers", "transformers"}
    assert "license" in header["metadata"]
    first = (tmp_path / "edit.safetensors").read_bytes()
    edit.save(tmp_path / "edit.safetensors")
    assert (tmp_path / "edit.safetensors").read_bytes() == first


def test_size_of_an_edited_row():
    """Under 10 kB per edited row at the width of Stable Diffusion 1.4."""
    model = models.DiffusionModel(tiny_pipeline())
    generator = torch.Generator().manual_seed(0)
    c, c_star = (torch.randn(1, 768, generator=generator) for _ in range(2))
    assert Edit.from_context_map(solve(c, c_star), model).nbytes == 2 * 768 * 4 < 10_000


def test_a_failed_save_keeps_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "edit.safetensors"
    map_edit(model).save(path)
    before = path.read_bytes()

    def full_disk(*args):
        raise OSError("no space left")

    monkeypatch.setattr("erasekit.edits.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        delta_edit(model).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["edit.safetensors"]


def test_bad_files(model, tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    map_edit(model).save(good)
    content = good.read_bytes()
    with pytest.raises(FileNotFoundError, match="there is no edit at"):
        Edit.load(bad)
    for damaged in (content[: len(content) // 2], content[:4], b"", b"hello, this is text"):
        bad.write_bytes(damaged)
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            Edit.load(bad)
    bad.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        Edit.load(bad)
    save_file({"left": torch.zeros(2, 2)}, bad)
    with pytest.raises(ValueError, match="not an edit"):
        Edit.load(bad)
    assert Edit.load(good)


@pytest.mark.parametrize("missing", ["kind", "digest", "metadata", "base", "text_base"])
def test_a_header_with_something_missing_is_no_edit(model, tmp_path, missing):
    path = tmp_path / "edit.safetensors"
    map_edit(model).save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["erasekit"])
    (header if missing in header else header["metadata"]).pop(missing)
    save_file(load_file(path), path, {"erasekit": json.dumps(header)})
    with pytest.raises(ValueError, match="not an edit of this version"):
        Edit.load(path)


def test_nothing_unusable_becomes_an_edit(model):
    name = f"unet.{next(iter(cross_attention_kv(model.unet)))}"
    shape = delta_edit(model).tensors[name].shape
    with pytest.raises(ValueError, match="NaN or infinity"):
        Edit.from_weight_delta({name: torch.full(shape, float("nan"))}, model)
    with pytest.raises(ValueError, match="has shape"):
        Edit.from_weight_delta({name: torch.zeros(2, 2)}, model)
    with pytest.raises(ValueError, match="no parameter 'unet.nothing.weight'"):
        Edit.from_weight_delta({"unet.nothing.weight": torch.zeros(2, 2)}, model)
    with pytest.raises(ValueError, match="unknown kind of edit 'magic'"):
        Edit("magic", {}, {})
    with pytest.raises(ValueError, match="not one map"):
        delta_edit(model).context_map  # noqa: B018


# ---- merged models and LoRA ---------------------------------------------------------------------


@both_kinds
def test_merged_is_a_model_of_its_own(model, make, tmp_path):
    edit, before = make(model), weights(model)
    merged = edit.merged(model)
    assert same(weights(model), before)
    with edit.applied(model):
        edited = pictures(model)
    assert np.array_equal(pictures(merged), edited)
    assert merged.fingerprint() != model.fingerprint()
    merged.save_pretrained(tmp_path)
    assert np.array_equal(pictures(ek.load(tmp_path)), edited)
    with pytest.raises(ValueError, match="made for the model"), edit.applied(merged):
        pass
    with edit.applied(model), pytest.raises(ValueError, match="an edit is applied"):
        edit.merged(model)


@both_kinds
def test_stock_diffusers_reads_the_lora(model, make, tmp_path):
    edit = make(model)
    edit.to_lora(tmp_path)
    with edit.applied(model):
        edited = pictures(model)
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    assert np.abs(stock_pictures(pipeline) - edited).max() > 20  # control
    pipeline.load_lora_weights(tmp_path)
    assert np.abs(stock_pictures(pipeline) - edited).max() <= 1
    with pytest.raises(ValueError, match="unload or fuse LoRA"):
        cross_attention_kv(pipeline.unet)
    pipeline.unload_lora_weights()
    assert np.abs(stock_pictures(pipeline) - edited).max() > 20


def test_lora_of_a_pipeline_on_disk(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    map_edit(model).to_lora(tmp_path / "lora")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "lora")
    with map_edit(model).applied(model):
        assert np.abs(stock_pictures(pipeline) - pictures(model)).max() <= 1


def test_lora_rank_is_the_rank_of_the_edit(model, tmp_path):
    for edit, rank in ((map_edit(model), 3), (delta_edit(model, rank=2), 2)):
        path = edit.to_lora(tmp_path)
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        assert len(shapes) == 2 * len(cross_attention_kv(model.unet))
        assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {rank}


def with_lora(folder):
    """What the stock pipeline draws with the LoRA of a folder."""
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(folder)
    return stock_pictures(pipeline)


def test_the_lora_of_esd_x_has_biases_and_stock_diffusers_reads_them(model, tmp_path):
    draw, unet = torch.Generator().manual_seed(0), dict(model.unet.named_parameters())
    names = unet_parameters(model.unet, "x")
    noise = {name: torch.randn(unet[name].shape, generator=draw) / 3 for name in names}
    edit = Edit.from_weight_delta({f"unet.{name}": value for name, value in noise.items()}, model)
    edit.to_lora(tmp_path)
    with edit.applied(model):
        edited = pictures(model)
    assert np.abs(with_lora(tmp_path) - edited).max() <= 1
    weights = {f"unet.{name}": value for name, value in noise.items() if not name.endswith("bias")}
    Edit.from_weight_delta(weights, model).to_lora(tmp_path / "without")
    assert np.abs(with_lora(tmp_path / "without") - edited).max() > 2  # control: the biases show


def test_both_stages_of_an_edit_become_one_lora(model, tmp_path):
    deltas = delta_edit(model, rank=2).tensors
    edit = Edit.from_weight_delta(deltas, model, context_map=map_edit(model).context_map)
    edit.to_lora(tmp_path)
    with edit.applied(model):
        edited = pictures(model)
    assert np.abs(with_lora(tmp_path) - edited).max() <= 1


@pytest.mark.parametrize("error", [0.5, 0.1, 0.01])
def test_a_lora_leaves_out_no_more_than_it_says(model, error, tmp_path):
    draw = torch.Generator().manual_seed(0)
    name = "unet." + next(iter(cross_attention_kv(model.unet)))
    delta = torch.randn(model.unet.get_parameter(name.removeprefix("unet.")).shape, generator=draw)
    edit = Edit.from_weight_delta({name: delta}, model)
    a, b = load_file(edit.to_lora(tmp_path, error=error)).values()
    left_out = lambda rank: float((delta - b[:, :rank] @ a[:rank]).norm() / delta.norm())
    assert left_out(len(a)) <= error < left_out(len(a) - 1)
    with pytest.raises(ValueError, match="share of the change"):
        edit.to_lora(tmp_path, error=1.0)


def test_lora_of_an_edit_that_does_nothing(model, tmp_path):
    edit = Edit.from_context_map(ContextMap.identity(WIDTH), model)
    assert edit.nbytes == 0
    edit.save(tmp_path / "edit.safetensors")
    Edit.load(tmp_path / "edit.safetensors").to_lora(tmp_path)
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(tmp_path)
    assert np.abs(stock_pictures(pipeline) - pictures(model)).max() <= 1


def test_lora_finds_its_base_by_fingerprint(model, tmp_path):
    """In memory first, then from where the model was loaded; else it asks."""
    model.save_pretrained(tmp_path / "model")
    edit = map_edit(ek.load(tmp_path / "model"))
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    first = loaded.to_lora(tmp_path / "a", model=model).read_bytes()
    models._live.clear()
    assert loaded.to_lora(tmp_path / "b").read_bytes() == first
    homeless = map_edit(model)
    models._live.clear()
    with pytest.raises(ValueError, match="is not loaded: pass model="):
        homeless.to_lora(tmp_path / "c")
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="is not loaded and not at .*model any more: pass model="):
        loaded.to_lora(tmp_path / "c")
    with edit.applied(model), pytest.raises(ValueError, match="an edit is applied"):
        edit.to_lora(tmp_path / "d", model=model)


def test_only_linear_layers_of_the_unet_become_a_lora(model, tmp_path):
    for name in ("unet.conv_in.weight", "text_encoder.final_layer_norm.weight"):
        part, _, rest = name.partition(".")
        shape = getattr(model, part).get_parameter(rest).shape
        edit = Edit.from_weight_delta({name: torch.ones(shape)}, model)
        with edit.applied(model):
            pass  # it is a fine edit otherwise
        with pytest.raises(ValueError, match="cannot become a LoRA"):
            edit.to_lora(tmp_path)


# Another base


def tuned(model, part: str = "unet", scale: float = 0.3) -> models.DiffusionModel:
    """A sibling: the weights of a part moved by noise, as fine-tuning moves them."""
    sibling, random = model.copy(), torch.Generator().manual_seed(3)
    for parameter in getattr(sibling, part).parameters():
        parameter.data = parameter.data + scale * parameter.std() * torch.randn(
            parameter.shape, generator=random
        )
    return sibling


def test_a_map_of_text_alone_is_what_fit_gives_on_a_sibling(model):
    """UCE looks at text alone; RECE, the control, at the weights as well."""
    sibling = tuned(model)
    for fit, equal in ((ek.uce.fit, True), (ek.rece.fit, False)):
        edit, anew = fit(model, "dog"), fit(sibling, "dog")
        with pytest.raises(ValueError, match=r"take edit.rebased\(model\)"), edit.applied(sibling):
            pass
        rebased = edit.rebased(sibling)
        same = all(torch.equal(rebased.tensors[name], anew.tensors[name]) for name in ("left", "right"))
        assert same == equal == (rebased.digest == anew.digest)
        with rebased.applied(sibling):
            sibling.generate("a dog", steps=1)


def test_a_delta_is_added_to_a_sibling_as_it_is(model):
    sibling, name = tuned(model), "unet.conv_in.weight"
    edit = ek.Edit.from_weight_delta({name: torch.ones_like(model.unet.conv_in.weight)}, model)
    before = sibling.unet.conv_in.weight.detach().clone()
    with edit.rebased(sibling).applied(sibling):
        assert torch.equal(sibling.unet.conv_in.weight, before + 1)


def test_an_edit_does_not_move_to_another_text_encoder_or_shape(model):
    edit = ek.uce.fit(model, "dog")
    with pytest.raises(ValueError, match="means something else there"):
        edit.rebased(tuned(model, "text_encoder"))
    delta = ek.Edit.from_weight_delta({"unet.conv_in.weight": torch.ones(16, 4, 3, 3)}, model)
    wider = tuned(model)
    wider.unet.conv_in = torch.nn.Conv2d(8, 16, 3)
    with pytest.raises(ValueError, match="has shape"):
        delta.rebased(ek.load(wider.pipeline))
