"""What training holds in memory: what is not trained is shared, activations of large denoisers are computed twice."""

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import UNet2DConditionModel

import erasekit as ek
from erasekit import tuning
from erasekit.layers import channels_last, cross_attention_kv
from erasekit.methods import mace
from erasekit.tuning import checkpointed, frozen, trainee

TRAINED = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture
def model():
    return ek.load(tiny_pipeline())


@pytest.fixture
def call():
    generator = torch.Generator().manual_seed(0)

    def made(unet, dtype=torch.float32):
        x = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator).to(dtype)
        text = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator).to(dtype)
        return lambda net: net(x, torch.tensor([3, 500]), encoder_hidden_states=text).sample

    return made


def keys_and_values(model):
    return set(cross_attention_kv(model.unet))


def places(unet):
    return {name: one.data_ptr() for name, one in unet.named_parameters()}


def test_what_is_not_trained_is_shared_and_the_model_keeps_its_flags(model):
    flags = {name: one.requires_grad for name, one in model.unet.named_parameters()}
    copied = trainee(model.unet, [TRAINED])
    own = {name for name, place in places(copied).items() if place != places(model.unet)[name]}
    assert own == {TRAINED}
    assert [name for name, one in copied.named_parameters() if one.requires_grad] == [TRAINED]
    assert {name: one.requires_grad for name, one in model.unet.named_parameters()} == flags
    with torch.no_grad():
        dict(copied.named_parameters())[TRAINED].add_(1.0)
    assert not torch.equal(
        dict(copied.named_parameters())[TRAINED], dict(model.unet.named_parameters())[TRAINED]
    )


def test_a_model_beside_another_holds_only_what_an_edit_changes(model):
    edit = ek.uce.fit(model, "dog", ["castle"])
    before = {name: one.detach().clone() for name, one in model.unet.named_parameters()}
    beside, alone = edit.merged(model, shared=True), edit.merged(model)
    for own, place in places(beside.unet).items():
        assert (place == places(model.unet)[own]) == (own not in keys_and_values(model))
    assert not set(places(alone.unet).values()) & set(places(model.unet).values())
    with edit.applied(model):
        assert all(
            torch.equal(a, b) for a, b in zip(beside.unet.parameters(), alone.unet.parameters(), strict=True)
        )
    assert all(torch.equal(one, before[name]) for name, one in model.unet.named_parameters())
    assert beside.fingerprint() == alone.fingerprint() != model.fingerprint()
    assert [one.requires_grad for one in beside.unet.parameters()] == [
        one.requires_grad for one in model.unet.parameters()
    ]


def test_trained_parts_of_a_half_precision_model_are_in_single_precision():
    model = ek.load(tiny_pipeline().to(torch.bfloat16))
    copied = dict(trainee(model.unet, [TRAINED]).named_parameters())
    assert copied.pop(TRAINED).dtype is torch.float32
    assert {one.dtype for one in copied.values()} == {torch.bfloat16}
    lora = mace.adapter(model, 1, torch.Generator().manual_seed(0))
    trained = {name: one.dtype for name, one in lora.named_parameters() if one.requires_grad}
    assert trained and set(trained.values()) == {torch.float32} and all("lora_" in name for name in trained)


def test_shared_kernels_stay_shared_when_they_are_laid_out_anew(model):
    copied = trainee(model.unet, [TRAINED])
    kernels = [name for name, one in copied.named_parameters() if one.ndim == 4]
    before = {name: one.detach().clone() for name, one in model.unet.named_parameters()}
    with frozen(model.unet), channels_last(model.unet, copied):
        a, b = places(model.unet), places(copied)
        assert kernels and all(a[name] == b[name] for name in kernels)
        now = dict(copied.named_parameters())
        assert any(not now[name].is_contiguous() for name in kernels), "otherwise nothing was laid out"
    a, b = places(model.unet), places(copied)
    assert all(a[name] == b[name] for name in kernels)
    assert all(torch.equal(one, before[name]) for name, one in model.unet.named_parameters())
    assert all(one.is_contiguous() for one in copied.parameters())


def test_checkpointing_keeps_less_and_gives_the_same_gradients(model, call, monkeypatch):
    """The control: below LARGE nothing changes; above, the same call keeps fewer values for its gradient."""
    forward, found = call(model.unet), {}
    for large in (10**9, 0):
        monkeypatch.setattr(tuning, "LARGE", large)
        copied = trainee(model.unet, [TRAINED])
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with checkpointed(model.unet, copied):
            assert copied.is_gradient_checkpointing == model.unet.is_gradient_checkpointing == (large == 0)
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                loss = forward(copied).square().mean()
            loss.backward()
        assert not copied.is_gradient_checkpointing and not model.unet.is_gradient_checkpointing
        found[large] = (float(loss.detach()), dict(copied.named_parameters())[TRAINED].grad, kept)
    (loss, gradient, kept), (same_loss, same_gradient, fewer) = found[10**9], found[0]
    assert loss == same_loss and torch.allclose(gradient, same_gradient, rtol=1e-6, atol=0)
    assert gradient.any() and fewer < kept / 2


def test_a_text_encoder_is_left_alone(model, monkeypatch):
    monkeypatch.setattr(tuning, "LARGE", 0)
    with checkpointed(model.unet, *model.text_encoders.values()):
        assert model.unet.is_gradient_checkpointing


SMALL = {
    "esd": {"iterations": 3, "batch": 2, "noises": 1, "sampler": 3, "lr": 1e-3},
    "mace": {"iterations": 3, "batch": 2, "pictures": 1, "lr": 1e-3},
    "realera": {"iterations": 3, "batch": 2, "noises": 1, "sampler": 3, "lr": 1e-3},
    "trce": {"iterations": 3, "batch": 2, "lr": 1e-3, "stages": "trajectory"},
    "advunlearn": {"iterations": 3, "batch": 2, "noises": 1, "sampler": 3, "lr": 1e-3, "attack_steps": 1},
}


def losses(method, folder, dtype=torch.float32):
    seen = []
    getattr(ek, method).fit(
        ek.load(tiny_pipeline().to(dtype)), "dog", config=getattr(ek, method).Config(**SMALL[method]),
        generator=torch.Generator().manual_seed(0), folder=folder,
        callback=lambda state: seen.append(float(state["loss"])) if "loss" in state else None,
    )  # fmt: skip
    assert len(seen) >= 3
    return torch.tensor(seen)


@pytest.mark.parametrize("method", SMALL)
def test_training_in_half_precision_follows_single_precision(method, tmp_path):
    """Losses of the first updates, on a CPU in bfloat16."""
    single = losses(method, tmp_path / "single")
    assert torch.allclose(losses(method, tmp_path / "half", torch.bfloat16), single, rtol=0.1, atol=1e-4)


@pytest.mark.parametrize("method", SMALL)
def test_a_large_denoiser_is_trained_as_a_small_one(method, tmp_path, monkeypatch):
    small, forward, seen = losses(method, tmp_path / "small"), UNet2DConditionModel.forward, []

    def watched(unet, *args, **kwargs):
        if torch.is_grad_enabled():
            seen.append(unet.is_gradient_checkpointing)
        return forward(unet, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    monkeypatch.setattr(tuning, "LARGE", 0)
    assert torch.allclose(losses(method, tmp_path / "large"), small, rtol=1e-4)
    assert set(seen) == {method != "mace"}, "MACE's loss is of the attention inside"
