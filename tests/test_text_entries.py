"""The text entries that running a denoiser finds, on tiny random models of the real classes."""

import diffusers
import pytest
import torch
from torch import nn

from erasekit.text_entries import trace

TEXT, POOLED, TOKENS = 24, 20, 6


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def ids(*grid: int) -> torch.Tensor:
    """Position ids of a grid, (positions, number of axes), for rotary embeddings."""
    return torch.cartesian_prod(*(torch.arange(n).float() for n in grid)).reshape(-1, len(grid))


def unet(**changes) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=TEXT, **changes,
    )  # fmt: skip


def picture(channels: int = 4, size: int = 4) -> torch.Tensor:
    return rand(1, channels, size, size)


def tokens(channels: int) -> torch.Tensor:
    return rand(1, 4, channels)


def sequence(*before: int) -> torch.Tensor:
    return rand(1, TOKENS, *before, TEXT)


MASK = torch.ones(1, TOKENS, dtype=torch.long)
MASK[:, -1] = 0
HEADS = dict(num_attention_heads=2, attention_head_dim=8)
JOINT = dict(HEADS, joint_attention_dim=TEXT)

# family: (how to make the denoiser, what it is called with; names of the text among that, and of the picture and time)
MODELS = {
    "sd": (
        unet,
        lambda: dict(sample=picture(size=8), timestep=torch.randint(0, 999, (1,)), encoder_hidden_states=sequence()),
        ["encoder_hidden_states"],
    ),
    "sdxl": (
        lambda: unet(addition_embed_type="text_time", addition_time_embed_dim=8,
                     projection_class_embeddings_input_dim=6 * 8 + POOLED),
        lambda: dict(sample=picture(size=8), timestep=torch.randint(0, 999, (1,)), encoder_hidden_states=sequence(),
                     added_cond_kwargs={"text_embeds": rand(1, POOLED), "time_ids": torch.ones(1, 6)}),
        ["encoder_hidden_states", "text_embeds"],
    ),
    "sd3": (
        lambda: diffusers.SD3Transformer2DModel(
            **JOINT, sample_size=4, in_channels=4, num_layers=2, caption_projection_dim=16,
            pooled_projection_dim=POOLED, out_channels=4, pos_embed_max_size=8),
        lambda: dict(hidden_states=picture(), timestep=rand(1), encoder_hidden_states=sequence(),
                     pooled_projections=rand(1, POOLED)),
        ["encoder_hidden_states", "pooled_projections"],
    ),
    "flux": (
        lambda: diffusers.FluxTransformer2DModel(
            **JOINT, in_channels=4, num_layers=1, num_single_layers=1, pooled_projection_dim=POOLED,
            axes_dims_rope=(4, 2, 2), guidance_embeds=True),
        lambda: dict(hidden_states=tokens(4), timestep=rand(1), encoder_hidden_states=sequence(),
                     pooled_projections=rand(1, POOLED), guidance=torch.ones(1), img_ids=ids(1, 2, 2),
                     txt_ids=torch.zeros(TOKENS, 3)),
        ["encoder_hidden_states", "pooled_projections"],
    ),
    "flux2": (
        lambda: diffusers.Flux2Transformer2DModel(
            **JOINT, in_channels=4, num_layers=1, num_single_layers=1, timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2)),
        lambda: dict(hidden_states=tokens(4), timestep=rand(1), encoder_hidden_states=sequence(),
                     guidance=torch.ones(1), img_ids=ids(1, 2, 2, 1)[None], txt_ids=ids(1, 1, 1, TOKENS)[None]),
        ["encoder_hidden_states"],
    ),
    "flux3": (
        lambda: diffusers.Flux3Transformer2DModel(
            **JOINT, in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=1, timestep_channels=16,
            axes_dims_rope=(2, 2, 2, 2)),
        lambda: dict(hidden_states=tokens(4), timestep=rand(1), encoder_hidden_states=sequence(),
                     img_ids=ids(1, 2, 2, 1), txt_ids=ids(1, 1, 1, TOKENS)),
        ["encoder_hidden_states"],
    ),
    "chroma": (
        lambda: diffusers.ChromaTransformer2DModel(
            **JOINT, in_channels=4, num_layers=1, num_single_layers=1, axes_dims_rope=(4, 2, 2),
            approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
        lambda: dict(hidden_states=tokens(4), timestep=rand(1), encoder_hidden_states=sequence(),
                     img_ids=ids(1, 2, 2), txt_ids=torch.zeros(TOKENS, 3)),
        ["encoder_hidden_states"],
    ),
    "auraflow": (
        lambda: diffusers.AuraFlowTransformer2DModel(
            **JOINT, sample_size=4, num_mmdit_layers=1, num_single_dit_layers=1, caption_projection_dim=16,
            pos_embed_max_size=16),
        lambda: dict(hidden_states=picture(), timestep=rand(1), encoder_hidden_states=sequence()),
        ["encoder_hidden_states"],
    ),
    "qwen": (
        lambda: diffusers.QwenImageTransformer2DModel(
            **JOINT, in_channels=4, out_channels=1, num_layers=2, axes_dims_rope=(4, 2, 2)),
        lambda: dict(hidden_states=tokens(4), timestep=rand(1), encoder_hidden_states=sequence(),
                     encoder_hidden_states_mask=MASK, img_shapes=[[(1, 2, 2)]]),
        ["encoder_hidden_states"],
    ),
    "pixart": (
        lambda: diffusers.PixArtTransformer2DModel(
            **HEADS, sample_size=4, num_layers=2, cross_attention_dim=16, caption_channels=TEXT,
            use_additional_conditions=False),
        lambda: dict(hidden_states=picture(), timestep=torch.randint(0, 999, (1,)), encoder_hidden_states=sequence(),
                     encoder_attention_mask=MASK, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
        ["encoder_hidden_states"],
    ),
    "sana": (
        lambda: diffusers.SanaTransformer2DModel(
            **HEADS, sample_size=4, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2,
            cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=TEXT),
        lambda: dict(hidden_states=picture(), timestep=torch.randint(0, 999, (1,)), encoder_hidden_states=sequence(),
                     encoder_attention_mask=MASK),
        ["encoder_hidden_states"],
    ),
    "lumina2": (
        lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=4, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=3,
            num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(32, 8, 8), cap_feat_dim=TEXT),
        lambda: dict(hidden_states=picture(), timestep=rand(1), encoder_hidden_states=sequence(),
                     encoder_attention_mask=MASK.bool()),
        ["encoder_hidden_states"],
    ),
    "zimage": (
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=24, n_layers=1, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=TEXT,
            axes_dims=[4, 2, 2], axes_lens=[64, 16, 16]),
        lambda: dict(x=[rand(4, 1, 4, 4)], t=rand(1), cap_feats=[rand(TOKENS, TEXT)]),
        ["cap_feats"],
    ),
    "hidream": (
        lambda: diffusers.HiDreamImageTransformer2DModel(
            **HEADS, patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
            caption_channels=[28, TEXT], text_emb_dim=POOLED, num_routed_experts=2, num_activated_experts=1,
            axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=[0, 2]),
        lambda: dict(hidden_states=picture(), timesteps=rand(1), encoder_hidden_states_t5=rand(1, TOKENS, 28),
                     encoder_hidden_states_llama3=rand(3, 1, TOKENS, TEXT), pooled_embeds=rand(1, POOLED)),
        ["encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds"],
    ),
    "ideogram4": (
        lambda: diffusers.Ideogram4Transformer2DModel(
            in_channels=4, num_layers=1, attention_head_dim=12, num_attention_heads=2, intermediate_size=16,
            adaln_dim=8, llm_features_dim=TEXT, mrope_section=(2, 2, 2)),
        lambda: dict(hidden_states=rand(1, TOKENS, 4), timestep=rand(1), encoder_hidden_states=sequence(),
                     position_ids=torch.arange(TOKENS)[None, :, None].expand(1, -1, 3),
                     segment_ids=torch.zeros(1, TOKENS, dtype=torch.long),
                     indicator=torch.tensor([[3, 3, 3, 2, 2, 2]])),
        ["encoder_hidden_states"],
    ),
    "krea2": (
        lambda: diffusers.Krea2Transformer2DModel(
            in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=16, timestep_embed_dim=8, text_hidden_dim=TEXT, num_text_layers=3,
            text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2)),
        lambda: dict(hidden_states=tokens(4), encoder_hidden_states=sequence(3), timestep=rand(1),
                     position_ids=torch.zeros(TOKENS + 4, 3), encoder_attention_mask=MASK.bool()),
        ["encoder_hidden_states"],
    ),
}  # fmt: skip
# What the picture and the time are called; all else stays.
MOVES = ("sample", "hidden_states", "x", "timestep", "timesteps", "t")


def replaced(call: dict, names, new: dict) -> dict:
    """The call with what is named taken from another call."""
    nested = {
        k: replaced(v, names, new[k]) if isinstance(v, dict) else new[k] if k in names else v
        for k, v in call.items()
    }
    return nested


def calls(family: str, seed: int = 0) -> tuple:
    """A denoiser, what it is called with, and the same with another text, and with another picture and time."""
    make, arguments, text = MODELS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = make().eval()
        for parameter in denoiser.parameters():  # some layers begin with zeros
            nn.init.normal_(parameter, std=0.3)
        base, other = arguments(), arguments()
    return denoiser, ((), base), ((), replaced(base, text, other)), ((), replaced(base, MOVES, other))


# The entries: {layer: (reads, width of the text, columns of the input, has a bias)}
CONTEXT = {"context_embedder": ("embedding", TEXT, TEXT, False)}
WITH_BIAS = {"context_embedder": ("embedding", TEXT, TEXT, True)}
POOLED_ENTRY = {"time_text_embed.text_embedder.linear_1": ("pooled", POOLED, POOLED, True)}
CAPTION = {"caption_projection.linear_1": ("embedding", TEXT, TEXT, True)}
TABLE = {
    "sd3": {**WITH_BIAS, **POOLED_ENTRY},
    "flux": {**WITH_BIAS, **POOLED_ENTRY},
    "flux2": CONTEXT,
    "flux3": CONTEXT,
    "chroma": WITH_BIAS,
    "auraflow": CONTEXT,
    "qwen": {"txt_in": ("normed", TEXT, TEXT, True)},
    "pixart": CAPTION,
    "sana": CAPTION,
    "lumina2": {"time_caption_embed.caption_embedder.1": ("normed", TEXT, TEXT, True)},
    "zimage": {"cap_embedder.1": ("normed", TEXT, TEXT, True)},
    "hidream": {
        "p_embedder.pooled_embedder.linear_1": ("pooled", POOLED, POOLED, True),
        "caption_projection.0.linear": ("embedding", TEXT, TEXT, False),
        "caption_projection.1.linear": ("embedding", TEXT, TEXT, False),
        "caption_projection.2.linear": ("embedding", 28, 28, False),
    },
    "ideogram4": {"llm_cond_proj": ("normed", TEXT, TEXT, True)},
}


def found(entries) -> dict:
    return {e.layer: (e.reads, e.columns[1] - e.columns[0], e.width, e.bias) for e in entries}


@pytest.mark.parametrize("family", TABLE)
def test_the_entries_of(family):
    entries = trace(*calls(family))
    assert found(entries) == TABLE[family]
    assert len({entry.space for entry in entries}) == len(entries)  # each reads rows of its own
    assert trace(*calls(family, seed=1)) == entries


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_entries_of_a_unet(family):
    """Every key and value of the cross-attention in one space; beside them SDXL's pooled text before the sizes."""
    denoiser, *given = calls(family)
    entries = {entry.layer: entry for entry in trace(denoiser, *given)}
    pooled = entries.pop("add_embedding.linear_1", None)
    assert (pooled is not None) == (family == "sdxl")
    if pooled:
        assert found([pooled]) == {"add_embedding.linear_1": ("pooled", POOLED, POOLED + 48, True)}
        assert pooled.columns == (0, POOLED)
    names = {n for n, _ in denoiser.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))}
    assert set(entries) == names and len({entry.space for entry in entries.values()}) == 1
    assert {entry.reads for entry in entries.values()} == {"embedding"}


def test_text_that_passes_through_attention_first_is_refused():
    with pytest.raises(ValueError, match="Krea2Transformer2DModel.*attention"):
        trace(*calls("krea2"))


class Beside(nn.Module):
    """Reads text by a linear layer and, where asked, also past it."""

    def __init__(self, leak: float):
        super().__init__()
        self.leak, self.inside, self.out = leak, nn.Linear(TEXT, 4), nn.Linear(4, 4)

    def forward(self, picture, text):
        return (self.out(picture + self.inside(text).mean(1) + self.leak * text.mean((1, 2))[:, None]),)


def test_text_that_goes_past_the_linear_layers_is_refused():
    torch.manual_seed(0)
    base, other = [dict(picture=rand(1, 4), text=sequence()) for _ in range(2)]
    three = ((), base), ((), {**base, "text": other["text"]}), ((), {**base, "picture": other["picture"]})
    assert found(trace(Beside(0.0), *three)) == {"inside": ("embedding", TEXT, TEXT, True)}  # the control
    with pytest.raises(ValueError, match="other ways in"):
        trace(Beside(1.0), *three)
    deaf = Beside(0.0)
    nn.init.zeros_(deaf.out.weight)
    with pytest.raises(ValueError, match="does not depend on its text"):
        trace(deaf, *three)
