"""Tiny random pipelines of the families whose denoiser is a transformer, made of the real classes."""

import diffusers
import torch
import transformers
from conftest import WHOLE
from tokenizers.pre_tokenizers import ByteLevel

from erasekit.miniatures import HEADS, LETTERS, flow, flux, sd3, spread, t5, t5_tokenizer, vae


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """Byte pairs that know the words of WHOLE with the space before them, and a chat template."""
    letters = sorted(ByteLevel.alphabet())
    merges = {}
    for word in WHOLE:
        pieces = ["Ġ", *word]
        while len(pieces) > 1:
            merges[tuple(pieces[:2])] = None
            pieces[:2] = ["".join(pieces[:2])]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = dict.fromkeys([*special, *letters, *map("".join, merges)])
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges), padding_side="right"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def gemma_tokenizer() -> transformers.GemmaTokenizer:
    """Letters alone."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = ["▁", "\n", *"0123456789.,:;-<>()'\"?!/", *LETTERS, *LETTERS.upper()]
    vocab = {token: i for i, token in enumerate([*special, *letters])}
    return transformers.GemmaTokenizer(vocab=vocab, merges=[])


def gemma(width: int, tokenizer) -> transformers.Gemma2Model:
    return transformers.Gemma2Model(transformers.Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    ))  # fmt: skip


def qwen3(width: int, tokenizer, layers: int, cls=transformers.Qwen3Model):
    return cls(transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    ))  # fmt: skip


def chroma() -> diffusers.ChromaPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.ChromaPipeline(
        transformer=diffusers.ChromaTransformer2DModel(
            **HEADS, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=24,
            axes_dims_rope=(4, 2, 2), approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
        ),
        scheduler=flow(),
        vae=vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=t5(24, tokenizer),
        tokenizer=tokenizer,
    )  # fmt: skip


def auraflow() -> diffusers.AuraFlowPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(24, tokenizer, transformers.UMT5EncoderModel, transformers.UMT5Config),
        vae=vae(),
        transformer=diffusers.AuraFlowTransformer2DModel(
            **HEADS, sample_size=8, joint_attention_dim=24, num_mmdit_layers=1, num_single_dit_layers=1,
            caption_projection_dim=16, pos_embed_max_size=64,
        ),
        scheduler=flow(),
    )  # fmt: skip


def pixart() -> diffusers.PixArtSigmaPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(24, tokenizer),
        vae=vae(),
        transformer=diffusers.PixArtTransformer2DModel(
            **HEADS, sample_size=8, num_layers=2, cross_attention_dim=16, caption_channels=24,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


def sana() -> diffusers.SanaPipeline:
    tokenizer = gemma_tokenizer()
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma(24, tokenizer),
        vae=diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), downsample_block_type="conv",
            upsample_block_type="interpolate", scaling_factor=0.4,
        ),
        transformer=diffusers.SanaTransformer2DModel(
            **HEADS, sample_size=8, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2,
            cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=24,
        ),
        scheduler=flow(shift=3.0),
    )  # fmt: skip


def lumina2() -> diffusers.Lumina2Pipeline:
    tokenizer = gemma_tokenizer()
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=3,
            num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(300, 16, 16), cap_feat_dim=24,
        ),
        scheduler=flow(),
        vae=vae(levels=4, shift_factor=0.1),  # its pipeline takes 8 pixels to a latent for granted
        text_encoder=gemma(24, tokenizer),
        tokenizer=tokenizer,
    )  # fmt: skip


def zimage() -> diffusers.ZImagePipeline:
    tokenizer = qwen_tokenizer()
    return diffusers.ZImagePipeline(
        scheduler=flow(),
        vae=vae(shift_factor=0.1),
        text_encoder=qwen3(24, tokenizer, 3),
        tokenizer=tokenizer,
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=24, n_layers=1, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=24,
            axes_dims=[4, 2, 2], axes_lens=[600, 16, 16],
        ),
    )  # fmt: skip


def flux2() -> diffusers.Flux2KleinPipeline:
    """As FLUX.2 klein: three layers of Qwen 3 side by side."""
    tokenizer = qwen_tokenizer()
    return diffusers.Flux2KleinPipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
        ),
        text_encoder=qwen3(8, tokenizer, 28, transformers.Qwen3ForCausalLM),
        tokenizer=tokenizer,
        transformer=diffusers.Flux2Transformer2DModel(
            **HEADS, in_channels=16, num_layers=1, num_single_layers=1, timestep_guidance_channels=16,
            joint_attention_dim=24, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
        ),
    )  # fmt: skip


def qwen() -> diffusers.QwenImagePipeline:
    tokenizer = qwen_tokenizer()
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
        ),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=24, fullatt_block_indexes=[0]
        ),
        image_token_id=900, video_token_id=901, vision_start_token_id=902, vision_end_token_id=903,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=diffusers.QwenImageTransformer2DModel(
            **HEADS, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=24, axes_dims_rope=(4, 2, 2),
        ),
    )  # fmt: skip


FAMILIES = {
    make.__name__: make for make in (sd3, flux, flux2, chroma, auraflow, qwen, pixart, sana, lumina2, zimage)
}

TEXT_LAYERS = (
    "context_embedder",
    "txt_in",
    "caption_projection.linear_1",
    "caption_embedder.1",
    "cap_embedder.1",
)


def tiny(name: str, seed: int = 0):
    """A pipeline of the family, with random weights that make words differ and the text move the picture."""
    sharp = {"auraflow": 2.5, "sana": 2.0, "qwen": 3.0, "lumina2": 2.0}.get(name, 1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FAMILIES[name]()
        for part, parameter in pipeline.transformer.named_parameters():  # some layers begin with zeros
            if parameter.ndim > 1:
                strong = part.removesuffix(".weight").endswith(TEXT_LAYERS)
                spread(parameter, 6 if strong else sharp)
        if name == "qwen":
            pipeline.vae.decoder.conv_out.weight.data.mul_(20)  # else all pictures are nearly one
        if isinstance(pipeline.text_encoder, LANGUAGE):
            for parameter in pipeline.text_encoder.parameters():
                if parameter.ndim > 1:
                    spread(parameter, 1.5)
    return pipeline


LANGUAGE = (
    transformers.Gemma2Model,
    transformers.Qwen3Model,
    transformers.Qwen3ForCausalLM,
    transformers.Qwen2_5_VLForConditionalGeneration,
)
