"""Submodules are found by path in the real classes, or not at all."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from erasekit.layers import (
    channels_last,
    cross_attention,
    cross_attention_kv,
    record_attention,
    text_backbone,
    text_projected_once,
)


def test_every_key_and_value_projection_and_nothing_else(shared_model):
    found = cross_attention_kv(shared_model.unet)
    parameters = dict(shared_model.unet.named_parameters())
    expected = [n for n in parameters if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    assert list(found) == expected and len(found) == 2 * len(cross_attention(shared_model.unet)) > 0
    assert all(found[name].weight is parameters[name] for name in found)
    assert {layer.in_features for layer in found.values()} == {shared_model.unet.config.cross_attention_dim}


def test_true_sd14_shapes():
    """32 matrices, 19,169,280 parameters, 2.23 % of the UNet; on the meta device, so no memory is used."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    found = cross_attention_kv(unet)
    assert len(found) == 32
    assert sum(layer.weight.numel() for layer in found.values()) == 19_169_280
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert sum(layer.out_features for layer in found.values()) == 24_960


@pytest.mark.parametrize(
    "replacement, message",
    [
        (nn.Linear(32, 16), "has a bias"),
        (nn.Linear(8, 16, bias=False), "differ in width"),
        (nn.Identity(), "expected torch.nn.Linear"),
    ],
)
def test_unexpected_projection_is_refused(model, replacement, message):
    next(iter(cross_attention(model.unet).values())).to_k = replacement
    with pytest.raises(ValueError, match=message):
        cross_attention_kv(model.unet)


def test_a_unet_without_text_is_refused():
    unet = UNet2DModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="attn2"):
        cross_attention_kv(unet)
    with pytest.raises(ValueError, match="attn2"):
        cross_attention(unet)


def test_text_backbone_of_both_layouts(shared_model):
    config = CLIPTextConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        projection_dim=8,
    )
    flat, nested = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    for backbone in (text_backbone(flat), text_backbone(nested)):
        assert len(backbone.encoder.layers) == 1 and backbone.final_layer_norm.normalized_shape == (8,)
    assert text_backbone(nested) is nested.text_model
    with pytest.raises(ValueError, match="CLIP text model"):
        text_backbone(shared_model.unet)


def test_attention_maps_are_probabilities_and_leave_no_trace(model):
    processors = model.unet.attn_processors
    plain = model.generate(["a church", "a dog"], seeds=[0, 1], steps=3)
    with record_attention(model.unet) as maps:
        recorded = model.generate(["a church", "a dog"], seeds=[0, 1], steps=3)
    assert all(np.array_equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert all(model.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert set(maps.layers) == set(cross_attention(model.unet)) and set(maps.calls.values()) == {3}
    length = model.tokenizer.model_max_length
    for probabilities in maps.layers.values():
        assert probabilities.shape[0] == 2 * model.fixed_batch and probabilities.shape[2] == length
        assert torch.allclose(probabilities.sum(-1), torch.ones(()), atol=1e-5)
    heat = maps.heatmap(token=2, size=16)
    assert heat.shape == (8, 16, 16)
    total = sum(maps.heatmap(token, size=16) for token in range(length))
    assert torch.allclose(total, torch.ones(()), atol=1e-5)
    assert not torch.allclose(heat[4], heat[5], atol=1e-3)  # another prompt, another map


def test_attention_maps_equal_the_formula(model):
    """softmax(q k^T / sqrt(d)) written out for one layer and one call."""
    name, attention = next(iter(cross_attention(model.unet).items()))
    seen = {}
    handle = attention.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(x=args[0], c=kwargs["encoder_hidden_states"]),
        with_kwargs=True,
    )
    with record_attention(model.unet) as maps, torch.no_grad():
        model.unet(torch.ones(1, 4, 8, 8), 10, model.encode("a church"))
    handle.remove()
    q, k = (
        t[0].unflatten(-1, (attention.heads, -1))
        for t in (attention.to_q(seen["x"]), attention.to_k(seen["c"]))
    )
    scores = torch.einsum("phd,thd->hpt", q, k) / q.shape[-1] ** 0.5
    assert torch.allclose(maps.layers[name][0], scores.softmax(-1).mean(0), atol=1e-6)


def test_processors_come_back_after_an_exception(model):
    before = model.unet.attn_processors
    with pytest.raises(RuntimeError, match="stop"), record_attention(model.unet):
        raise RuntimeError("stop")
    assert all(model.unet.attn_processors[name] is processor for name, processor in before.items())
    with record_attention(model.unet) as maps:
        pass
    with pytest.raises(ValueError, match="nothing was recorded"):
        maps.heatmap(0)


def test_a_text_is_projected_once(model):
    layers = cross_attention_kv(model.unet)
    text, other = model.encode(["a church", "a dog"]).split(1)
    latents, t = torch.ones(1, 4, 8, 8), torch.tensor(3)
    draw = lambda x: model.unet(latents, t, encoder_hidden_states=x, return_dict=False)[0]
    with torch.no_grad():
        plain = draw(text)
        with text_projected_once(model.unet):
            kept = {name: layer(text) for name, layer in layers.items()}
            assert all(layer(text).data_ptr() == kept[name].data_ptr() for name, layer in layers.items())
            assert torch.equal(draw(text), plain)
            assert not torch.equal(draw(other), plain)  # control: another text is another text
            assert torch.equal(draw(text.clone()), plain)
    # control: outside the block it is done anew; `kept` is alive, so its memory is not handed out again
    anew = layers[next(iter(layers))](text)
    assert anew.data_ptr() not in {one.data_ptr() for one in kept.values()}
    with pytest.raises(RuntimeError), text_projected_once(model.unet):
        raise RuntimeError
    assert not any("forward" in vars(layer) for layer in layers.values())


def test_kernels_that_lie_otherwise_draw_the_same(model):
    x, t, text = torch.ones(2, 4, 8, 8), torch.tensor([1, 2]), model.encode(["a church", "a house"])
    before = {name: parameter.clone() for name, parameter in model.unet.named_parameters()}
    kernel = model.unet.conv_in.weight
    with torch.no_grad():
        plain = model.unet(x, t, text).sample
        with pytest.raises(RuntimeError, match="stop"), channels_last(model.unet):
            assert not kernel.is_contiguous() and torch.equal(kernel, before["conv_in.weight"])
            assert torch.allclose(model.unet(x, t, text).sample, plain, atol=1e-5)
            raise RuntimeError("stop")
        assert torch.equal(model.unet(x, t, text).sample, plain)
    for name, parameter in model.unet.named_parameters():
        assert parameter.is_contiguous() and torch.equal(parameter, before[name])
