"""Names of weights outside diffusers: the original layout of Stable Diffusion 1, 2 and XL, one file for all parts.

Most web interfaces and trainers read this layout, and take the names of layers in LoRA files from it. Here each name is
made from that of diffusers, by rules; `state_dict` refuses what they do not cover. Facts from the loading code of
diffusers 0.42 (Apache-2.0), which reads the layout back.
"""

import re

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erasekit.layers import uncompiled

# What kohya's trainers call the base version, by the width of the text embeddings
VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}
UNET, VAE = "model.diffusion_model.", "first_stage_model."

# Layers outside the blocks of the UNet
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_name(unet: nn.Module, layer: str) -> str:
    """The original name of a layer of a UNet, such as "input_blocks.4.1.proj_in". ValueError for a layer that has none.

    The original counts all layers of all blocks in one row; in a row of a block come residual layer, attention and the
    change of size.
    """
    if layer in OUTSIDE:
        return OUTSIDE[layer]
    found = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?([a-z]+)\.(\d+)\.(.+)", layer)
    count = unet.config.layers_per_block
    if not found or not isinstance(count, int):
        raise ValueError(f"{layer} of this {type(unet).__name__} has no name in the original layout")
    side, block, kind, index, rest = found.groups()
    index = int(index)
    if kind == "resnets":
        rest = RESNET.get(rest, rest)
    if side == "mid":
        return f"middle_block.{2 * index if kind == 'resnets' else 2 * index + 1}.{rest}"
    start = int(block) * (count + 1)
    if kind == "downsamplers":
        return f"input_blocks.{1 + start + count}.0.op"
    if kind == "upsamplers":
        last = 2 if hasattr(unet.up_blocks[int(block)], "attentions") else 1
        return f"output_blocks.{start + count}.{last}.{rest}"
    row = f"input_blocks.{1 + start + index}" if side == "down" else f"output_blocks.{start + index}"
    return f"{row}.{0 if kind == 'resnets' else 1}.{rest}"


def kohya_name(unet: nn.Module, layer: str) -> str:
    """What kohya's trainers call a layer of a UNet: in SDXL by its original name, else by that of diffusers."""
    sdxl = unet.config.addition_embed_type == "text_time"
    return "lora_unet_" + (unet_name(unet, layer) if sdxl else layer).replace(".", "_")


def kohya_version(unet: nn.Module) -> dict[str, str]:
    """The metadata by which web interfaces sort LoRA files; nothing where the width of the text is no one's."""
    width = unet.config.cross_attention_dim  # or one for each block
    version = VERSIONS.get(width) if isinstance(width, int) else None
    return {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")} if version else {}


def state_dict(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """{original name: weight} of the UNet, VAE and text encoders of Stable Diffusion 1, 2 or XL.

    ValueError for another pipeline, and where it has a layer that the layout does not know.
    """
    parts = {name: uncompiled(one) for name, one in pipeline.components.items() if isinstance(one, nn.Module)}
    known = {"unet", "vae", "text_encoder", "text_encoder_2", "safety_checker"}
    whole = {"unet", "vae", "text_encoder"} <= parts.keys() <= known
    if not whole or type(parts["vae"]).__name__ != "AutoencoderKL":
        raise ValueError(
            f"a {type(pipeline).__name__} of {', '.join(sorted(parts))} has no original layout here, only Stable "
            "Diffusion 1, 2 and XL have: use save_pretrained"
        )
    unet, vae, text = parts["unet"], parts["vae"], parts["text_encoder"]
    found = {}
    for name, value in unet.state_dict().items():
        layer, _, kind = name.rpartition(".")
        found[f"{UNET}{unet_name(unet, layer)}.{kind}"] = value
    for name, value in vae.state_dict().items():
        found[VAE + _vae_name(name, len(vae.config.up_block_types))] = (
            value[:, :, None, None] if re.search(r"attentions.*to_.*weight", name) else value
        )
    if "text_encoder_2" in parts:
        found |= _clip(text, "conditioner.embedders.0.transformer.text_model.")
        found |= _open_clip(parts["text_encoder_2"], "conditioner.embedders.1.model.")
    elif (
        text.config.hidden_act == "gelu"
    ):  # the OpenCLIP of Stable Diffusion 2; that of OpenAI has "quick_gelu"
        found |= _open_clip(text, "cond_stage_model.model.")
    else:
        found |= _clip(text, "cond_stage_model.transformer.text_model.")
    return {name: value.detach().cpu() for name, value in found.items()}


def _vae_name(name: str, levels: int) -> str:
    """The decoder's levels are counted from the finest on, and attention is a convolution of one pixel."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda at: f"up.{levels - 1 - int(at[1])}", name)
    name = name.replace(".resnets.", ".block.").replace("upsamplers.0", "upsample")
    name = re.sub(r"mid_block\.block\.(\d+)", lambda at: f"mid.block_{int(at[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for ours, theirs in VAE_ATTENTION.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _text_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """Without the prefix "text_model.", which not every class and version has."""
    return {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}


def _clip(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in _text_weights(encoder).items()}


def _open_clip(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Queries, keys and values are one matrix; the projection is transposed."""
    weights, found = _text_weights(encoder), {}
    for name, value in weights.items():
        at = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in OPEN_CLIP:
            found[prefix + OPEN_CLIP[name]] = value
        elif name == "text_projection.weight":
            found[prefix + "text_projection"] = value.T
        elif at and at[2] in OPEN_CLIP_LAYER:
            found[f"{prefix}transformer.resblocks.{at[1]}.{OPEN_CLIP_LAYER[at[2]]}.{at[3]}"] = value
        elif at and at[2] == "self_attn.q_proj":
            three = [weights[name.replace("q_proj", one)] for one in ("q_proj", "k_proj", "v_proj")]
            found[f"{prefix}transformer.resblocks.{at[1]}.attn.in_proj_{at[3]}"] = torch.cat(three)
        elif not at or at[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            raise ValueError(f"{name} of this {type(encoder).__name__} has no name in the original layout")
    return found
