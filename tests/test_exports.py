"""Files for other people's tools: LoRA in kohya's names, LyCORIS, one file in the original layout; the stock pipelines
read them back."""

import numpy as np
import pages
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils
from families import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_families import sd2, sdxl
from torch import nn

import erasekit as ek
from erasekit import checkpoints
from erasekit.edits import Edit
from erasekit.evaluate import records
from erasekit.layers import cross_attention_kv

MAKE = {"sd1": tiny_pipeline, "sd2": sd2, "sdxl": sdxl}
CHURCH = ek.uce.Config(lam=1.0)  # random encoders give rows of norm 600


def made(name: str) -> ek.DiffusionModel:
    """With weights none of which is a constant, so that no two of one shape can be confused."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = MAKE[name]()
        for part in pipeline.components.values():
            for parameter in part.parameters() if isinstance(part, nn.Module) else ():
                parameter.data += 0.01 * torch.randn_like(parameter)
    return ek.load(pipeline)


@pytest.fixture(params=MAKE)
def model(request) -> ek.DiffusionModel:
    return made(request.param)


def drawn(pipeline: DiffusionPipeline) -> np.ndarray:
    """What the stock pipeline draws, of a prompt with the erased word and of one without."""
    pictures = pipeline(
        ["a church", "a dog"], num_inference_steps=3, guidance_scale=4.0, height=16, width=16,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    ).images  # fmt: skip
    return np.stack([np.asarray(one) for one in pictures]).astype(int)


def applied(edit: Edit, model: ek.DiffusionModel, scale: float = 1.0) -> np.ndarray:
    with edit.applied(model, scale):
        return drawn(model.pipeline)


def far(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a - b).max())


def weights(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {
        f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()
    }


def noise(model: ek.DiffusionModel, names: list[str], size: float = 0.3, seed: int = 0) -> Edit:
    """Noise on these parameters of the UNet."""
    draw = torch.Generator().manual_seed(seed)
    delta = {n: size * torch.randn(model.unet.get_parameter(n).shape, generator=draw) for n in names}
    return Edit.from_weight_delta({f"unet.{name}": value for name, value in delta.items()}, model)


def linear_weights(model: ek.DiffusionModel) -> list[str]:
    return [f"{n}.weight" for n, one in model.unet.named_modules() if type(one) is nn.Linear]


# ---- kohya --------------------------------------------------------------------------------------


def test_the_stock_pipeline_reads_the_lora_of_kohyas_names(model, tmp_path):
    """Of a closed form, and of noise on every Linear of the UNet."""
    plain = drawn(model.pipeline)
    church = ek.uce.fit(model, "church", ["house"], anchor="dog", config=CHURCH)
    everywhere = noise(model, linear_weights(model), 0.05)
    for edit, name in ((church, "church"), (everywhere, "everywhere")):
        path = edit.to_kohya(tmp_path / f"{name}.safetensors", model=model)
        edited = applied(edit, model)
        pipeline = model.copy().pipeline
        pipeline.load_lora_weights(path)
        print(name, far(drawn(pipeline), edited), far(plain, edited))
        assert far(drawn(pipeline), edited) <= 1
        assert far(plain, edited) > 2  # control: the edit shows
        pipeline.unload_lora_weights()
        np.testing.assert_array_equal(drawn(pipeline), plain)


def test_names_are_those_that_kohya_trains(tmp_path):
    """Those of diffusers, but of SDXL the original ones, where the pooled text is read by label_emb."""
    names = {}
    for name in MAKE:
        model = made(name)
        edit = ek.uce.fit(model, "church", ["house"], config=CHURCH)
        tensors = load_file(edit.to_kohya(tmp_path / "lora.safetensors", model=model))
        names[name] = {key.partition(".")[0] for key in tensors}
        for stem in names[name]:
            down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
            assert tensors[f"{stem}.alpha"] == len(down) == up.shape[1] and tensors[f"{stem}.alpha"].ndim == 0
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k" in names["sd1"]
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v" in names["sd2"]
    assert "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k" in names["sdxl"]
    assert "lora_unet_label_emb_0_0" in names["sdxl"]
    assert [len(one) for one in names.values()] == [8, 8, 17]  # every key and value, and SDXL's label_emb


def test_the_pooled_entry_of_sdxl_is_in_the_lora(tmp_path):
    """Without its layer the picture is another."""
    model = made("sdxl")
    edit = ek.uce.fit(model, "church", ["house"], anchor="dog", config=CHURCH)
    path = edit.to_kohya(tmp_path / "lora.safetensors", model=model)
    less = {name: value for name, value in load_file(path).items() if "label_emb" not in name}
    save_file(less, tmp_path / "less.safetensors")
    pipeline = model.copy().pipeline
    pipeline.load_lora_weights(tmp_path / "less.safetensors")
    assert far(drawn(pipeline), applied(edit, model)) > 2


@pytest.mark.parametrize(
    ("width", "version"),
    [(768, "sd_v1"), (1024, "sd_v2"), (2048, "sdxl_base_v1-0"), (32, None), ([768, 768], None)],
)
def test_the_base_version_is_said_where_the_width_tells_it(width, version):
    model = made("sd1")
    model.unet.register_to_config(cross_attention_dim=width)
    assert checkpoints.kohya_version(model.unet).get("ss_base_model_version") == version


def test_the_metadata_of_a_lora(tmp_path):
    model = made("sd1")
    edit = noise(model, linear_weights(model)[:2])
    with safe_open(edit.to_kohya(tmp_path / "lora.safetensors", model=model), "pt") as file:
        said = file.metadata()
    rank = str(
        load_file(tmp_path / "lora.safetensors")["lora_unet_time_embedding_linear_1.lora_down.weight"].shape[
            0
        ]
    )
    assert said == {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": f"{rank}.0",
    }


def test_what_kohya_has_no_place_for(tmp_path):
    model, path = made("sd1"), tmp_path / "x.safetensors"
    kv = next(iter(cross_attention_kv(model.unet)))
    edit = noise(model, [kv])
    bias = noise(model, ["time_embedding.linear_1.weight", "time_embedding.linear_1.bias"])
    with pytest.raises(
        ValueError, match="no place for the changed bias of unet.time_embedding.linear_1: use to_lyc"
    ):
        bias.to_kohya(path, model=model)
    with pytest.raises(ValueError, match="conv_in.weight cannot become a LoRA"):
        noise(model, ["conv_in.weight"]).to_kohya(path, model=model)
    with pytest.raises(ValueError, match="share of the change"):
        edit.to_kohya(path, model=model, error=1.0)
    for export in (edit.to_kohya, edit.to_lycoris):
        with pytest.raises(ValueError, match="ends in .safetensors, got"):
            export(tmp_path / "folder", model=model)
    flux = ek.load(tiny("flux"))
    erased = ek.uce.fit(flux, "church", config=ek.uce.Config(lam=0.1))
    for export in (erased.to_kohya, erased.to_lycoris):
        with pytest.raises(ValueError, match="not for a FluxTransformer2DModel: use to_lora"):
            export(path, model=flux)
    assert not list(tmp_path.iterdir())


# ---- LyCORIS ------------------------------------------------------------------------------------


def test_lycoris_holds_the_whole_change(model, tmp_path):
    """Convolutions, biases and norms too; a layer whose bias alone changes has a difference of zeros."""
    names = ["conv_in.weight", "conv_in.bias", "conv_norm_out.weight", "conv_norm_out.bias", "conv_out.bias"]
    names += ["mid_block.resnets.0.conv1.weight", next(iter(cross_attention_kv(model.unet)))]
    edit, unet = noise(model, names), model.unet
    tensors = load_file(edit.to_lycoris(tmp_path / "full.safetensors", model=model))
    with edit.applied(model):
        edited = {name: unet.get_parameter(name).detach().clone() for name in names}
    keys = {
        ("weight", True): "w_norm",
        ("bias", True): "b_norm",
        ("weight", False): "diff",
        ("bias", False): "diff_b",
    }
    for name in names:
        layer, _, kind = name.rpartition(".")
        change = tensors.pop(f"{checkpoints.kohya_name(unet, layer)}.{keys[kind, 'norm' in layer]}")
        torch.testing.assert_close(unet.get_parameter(name) + change, edited[name], atol=1e-6, rtol=1e-6)
    ((left, zeros),) = tensors.items()
    assert left == checkpoints.kohya_name(unet, "conv_out") + ".diff" and not zeros.any()
    with pytest.raises(
        ValueError, match="(?i)lora|renamed|shape"
    ):  # stock diffusers says that it does not read it
        model.pipeline.load_lora_weights(tmp_path / "full.safetensors")


def test_lycoris_of_a_closed_form(model, tmp_path):
    edit = ek.uce.fit(model, "church", ["house"], config=CHURCH)
    tensors = load_file(edit.to_lycoris(tmp_path / "full.safetensors", model=model))
    plain = {name: one.detach().clone() for name, one in model.unet.named_parameters()}
    with edit.applied(model):
        changed = {
            n: one - plain[n] for n, one in model.unet.named_parameters() if not torch.equal(one, plain[n])
        }
    expected = {
        f"{checkpoints.kohya_name(model.unet, n.removesuffix('.weight'))}.diff": c for n, c in changed.items()
    }
    assert tensors.keys() == expected.keys()
    for name, change in tensors.items():
        torch.testing.assert_close(change, expected[name])


def test_lycoris_is_of_the_unet_alone(tmp_path):
    model = made("sd1")
    name = "text_encoder.final_layer_norm.weight"
    edit = Edit.from_weight_delta({name: torch.ones(32)}, model)
    with pytest.raises(ValueError, match="changes the text encoder, for which LyCORIS has no key here"):
        edit.to_lycoris(tmp_path / "x.safetensors", model=model)


# ---- one file -----------------------------------------------------------------------------------


def test_the_stock_pipeline_reads_one_file(model, tmp_path):
    """Every weight, and the picture, of the model and of the edited one; offline."""
    model.save_pretrained(tmp_path / "model")
    edit = ek.uce.fit(model, "church", ["house"], anchor="dog", config=CHURCH)
    edited = edit.merged(model)
    for name, one in (("plain", model), ("edited", edited)):
        path = one.save_single_file(tmp_path / "new" / f"{name}.safetensors")
        read = type(model.pipeline).from_single_file(path, config=str(tmp_path / "model"))
        found, expected = weights(read), weights(one.pipeline)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert far(drawn(read), drawn(one.pipeline)) <= 1
    assert far(drawn(read), drawn(model.pipeline)) > 2  # control: the edit shows
    with edit.applied(model):
        inside = model.save_single_file(tmp_path / "inside.safetensors")
    assert inside.read_bytes() == path.read_bytes()


def test_what_unfusing_leaves_behind_is_in_no_fingerprint_and_no_file(model, tmp_path):
    """diffusers leaves the fused copies of UNet and VAE, with the weights from before the edit."""
    edit = ek.uce.fit(model, "church", ["house"], anchor="dog", config=CHURCH)
    fingerprints, copies = (model.fingerprint(), model.vae_fingerprint()), ("to_kv", "to_qkv")
    wanted = edit.merged(model).save_single_file(tmp_path / "wanted.safetensors").read_bytes()
    model.pipeline.fuse_qkv_projections()
    assert ek.load(model.pipeline).fingerprint() != fingerprints[0]  # control: in use they count
    model.pipeline.unfuse_qkv_projections()
    merged = edit.merged(model)
    assert any(one in name for name in weights(merged.pipeline) for one in copies)  # control
    assert merged.save_single_file(tmp_path / "found.safetensors").read_bytes() == wanted
    merged = edit.merged(model)
    merged.save_pretrained(tmp_path / "folder")
    for file in (tmp_path / "folder").rglob("*.safetensors"):
        assert not any(one in name for name in load_file(file) for one in copies)
    again = ek.load(model.pipeline)
    assert (again.fingerprint(), again.vae_fingerprint()) == fingerprints
    edited = drawn(merged.pipeline)
    merged.pipeline.fuse_qkv_projections()  # which makes them anew
    assert far(drawn(merged.pipeline), edited) <= 1


def test_a_wrong_name_is_noticed(tmp_path, monkeypatch):
    """The control of the test above: two layers of one shape exchanged."""
    model = made("sd1")
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setitem(checkpoints.VAE_ATTENTION, "to_q", "k")
    monkeypatch.setitem(checkpoints.VAE_ATTENTION, "to_k", "q")
    path = model.save_single_file(tmp_path / "x.safetensors")
    read = StableDiffusionPipeline.from_single_file(path, config=str(tmp_path / "model"))
    found, expected = weights(read), weights(model.pipeline)
    other = {key.rpartition(".")[0] for key in expected if not torch.equal(found[key], expected[key])}
    middle = [f"vae.{side}.mid_block.attentions.0" for side in ("encoder", "decoder")]
    assert other == {f"{place}.{layer}" for place in middle for layer in ("to_q", "to_k")}


BLOCKS = {
    "sd1": dict(
        block_out_channels=(8, 8, 16, 16), cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ),
    "sdxl": dict(
        block_out_channels=(8, 16, 16), cross_attention_dim=8, transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=56,
    ),
}  # fmt: skip
# As the loading code of diffusers and the authors' configs have them
KNOWN = {
    "sd1": {
        "up_blocks.3.resnets.2.conv_shortcut": "output_blocks.11.0.skip_connection",
        "down_blocks.0.attentions.1.transformer_blocks.0.norm1": "input_blocks.2.1.transformer_blocks.0.norm1",
        "down_blocks.2.downsamplers.0.conv": "input_blocks.9.0.op",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.2.upsamplers.0.conv": "output_blocks.8.2.conv",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
    },
    "sdxl": {
        "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2": "input_blocks.8.1.transformer_blocks.9.ff.net.2",
        "up_blocks.0.attentions.0.transformer_blocks.9.attn2.to_v": "output_blocks.0.1.transformer_blocks.9.attn2.to_v",
        "up_blocks.2.resnets.2.norm1": "output_blocks.8.0.in_layers.0",
        "add_embedding.linear_2": "label_emb.0.2",
    },
}


@pytest.mark.parametrize("name", BLOCKS)
def test_names_of_the_whole_structure(name):
    """All blocks of the real UNets and their autoencoder, but narrow, through the converters of diffusers."""
    unet = UNet2DConditionModel(layers_per_block=2, norm_num_groups=8, attention_head_dim=8, **BLOCKS[name])
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8,
    )  # fmt: skip
    pipeline = MAKE[name]()
    pipeline.unet, pipeline.vae = unet, vae
    ours = checkpoints.state_dict(pipeline)
    for part, convert in (
        (unet, single_file_utils.convert_ldm_unet_checkpoint),
        (vae, single_file_utils.convert_ldm_vae_checkpoint),
    ):
        back, expected = convert(dict(ours), dict(part.config)), part.state_dict()
        assert back.keys() == expected.keys()
        assert all(torch.equal(back[key], expected[key]) for key in expected)
    for layer, original in KNOWN[name].items():
        assert checkpoints.unet_name(unet, layer) == original
        unet.get_submodule(layer)
    text = {
        "sd1": "cond_stage_model.transformer.text_model",
        "sdxl": "conditioner.embedders.0.transformer.text_model",
    }
    assert f"{text[name]}.embeddings.position_embedding.weight" in ours


def test_what_has_no_original_layout(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="FluxPipeline of .* has no original layout here"):
        ek.load(tiny("flux")).save_single_file(path)
    model = made("sd1")
    with pytest.raises(ValueError, match="expected a path that ends in .safetensors"):
        model.save_single_file(tmp_path / "x.ckpt")
    model.unet.other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="other of this UNet2DConditionModel has no name"):
        model.save_single_file(path)
    whole = sdxl()
    refiner = StableDiffusionXLPipeline(
        whole.vae, None, whole.text_encoder_2, None, whole.tokenizer_2, whole.unet, whole.scheduler
    )
    with pytest.raises(ValueError, match="no original layout"):
        ek.load(refiner).save_single_file(path)
    model = made("sd1")
    model.pipeline.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="fused"):
        model.save_single_file(path)
    assert not list(tmp_path.iterdir())


# ---- two adapters -------------------------------------------------------------------------------


@pytest.mark.parametrize("export", ["to_lora", "to_kohya"])
def test_two_loras_with_weights_add_fused_or_not(export, tmp_path):
    """W + 0.7 change_1 + 0.4 change_2: so deltas at these strengths, not the composed maps."""
    model = made("sd1")
    kv = list(cross_attention_kv(model.unet))
    one, two = noise(model, kv, seed=1), noise(model, kv, seed=2)
    plain = drawn(model.pipeline)
    with one.applied(model, 0.7), two.applied(model, 0.4):
        wanted = drawn(model.pipeline)
    pipeline = model.copy().pipeline
    for name, edit in (("one", one), ("two", two)):
        where = tmp_path / f"{name}.safetensors" if export == "to_kohya" else tmp_path / name
        getattr(edit, export)(where, model=model)
        pipeline.load_lora_weights(where, adapter_name=name)
    pipeline.set_adapters(["one", "two"], [0.7, 0.4])
    found = {"adapters": drawn(pipeline)}
    pipeline.fuse_lora(adapter_names=["one", "two"])
    pipeline.unload_lora_weights()
    found["fused"] = drawn(pipeline)
    print({name: far(picture, wanted) for name, picture in found.items()}, far(plain, wanted))
    assert all(far(picture, wanted) <= 1 for picture in found.values())
    with one.applied(model), two.applied(model):
        assert far(drawn(model.pipeline), wanted) > 2  # control: the strengths count


# ---- other tools --------------------------------------------------------------------------------


def test_the_docs_say_what_other_tools_made_of_the_exports():
    details = records.read("benchmark_consumers").details
    said = [tuple(row) for row in pages.table("docs/models.md", "read by")[1:]]
    expected = []
    for tool, one in details["consumers"].items():
        version = list(one["versions"].values())[1]
        for way, found in one["found"].items():
            far = found.get("difference")
            difference = "none" if far is None else f"{far:.0e}" if far else "0"
            expected.append((f"{tool} {version}", way, difference, found["verdict"]))
    assert said == expected
    within = details["within"]
    for tool, one in details["consumers"].items():
        for way, found in one["found"].items():
            assert found["applied from unedited"] > 100 * max(within.values())  # the edit shows
            if way.startswith("control"):  # names that no layer has
                assert found["verdict"] == "loads nothing" and found["from unedited"] == 0, tool
            elif "error" not in found:
                assert found["difference"] <= within[found["verdict"]]
