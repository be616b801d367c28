"""Train the parts of the emoji world.

In this order; each resumes where it stopped (see training.py):

    python -m erasekit.emoji.train vae      # pictures <-> 8 x 8 x 16 latents
    python -m erasekit.emoji.train decoder  # its decoder again, sharper, for the same latents
    python -m erasekit.emoji.train clip     # text and vision towers (needs the `train` extra)
    python -m erasekit.emoji.train vision   # its vision tower again, for the same text tower
    python -m erasekit.emoji.train unet     # the diffusion model
    python -m erasekit.emoji.train judge    # the referee, from real pictures alone
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from erasekit.concepts import token_ids
from erasekit.emoji import captions, data
from erasekit.emoji.clip import load_clip, text_features
from erasekit.emoji.judge import Judge
from erasekit.emoji.pictures import SIZE, Placement, load_sprites, place
from erasekit.models import DiffusionModel, tidy_configs
from erasekit.paths import EMOJI, EMOJI_CLIP, EMOJI_JUDGE, EMOJI_MODEL, replacing
from erasekit.sampling import config_of
from erasekit.training import CHECKPOINTS, begin_of, optimize


def batch(sprites: torch.Tensor, n: int, generator: torch.Generator, placement: Placement):
    """n random pictures (n, 3, 64, 64) with their style, concept and background indices, each (n,)."""
    style = torch.randint(sprites.shape[0], (n,), generator=generator)
    concept = torch.randint(sprites.shape[1], (n,), generator=generator)
    pictures, background = place(sprites[style, concept], placement, generator)
    return pictures, style, concept, background


# what looks at pictures learns from wider placements than what draws them
WIDE = Placement(scale=(0.78, 1.0), shift=0.06, mirror=0.5, colored=0.25)
JUDGE_PLACEMENT = Placement(scale=(0.6, 1.05), shift=0.1, colored=0.3, mirror=0.5)


# ---- VAE ------------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """64 x 64 x 3 pixels to 8 x 8 x 16 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        sample_size=64,
        norm_num_groups=16,
        layers_per_block=1,
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=1.0,
    )


def _edges(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.diff(dim=-1).flatten(1), x.diff(dim=-2).flatten(1)], 1)


def reconstruction(y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L1 + L2 + 2 edge loss of pictures y against x, and the terms to log."""
    l1, l2, edge = (y - x).abs().mean(), (y - x).square().mean(), (_edges(y) - _edges(x)).abs().mean()
    return l1 + l2 + 2 * edge, {"l1": l1.detach(), "edge": edge.detach()}


def train_vae(steps: int = 1960, size: int = 32) -> None:
    """Reconstruction loss with a light KL term. Latents end standardized per channel."""
    torch.manual_seed(0)
    vae = new_vae().to(memory_format=torch.channels_last).train()
    sprites, generator = load_sprites(), torch.Generator().manual_seed(1)

    def loss(step, generator):
        x, *_ = batch(sprites, size, generator, WIDE)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        error, terms = reconstruction(vae.decode(posterior.mean + posterior.std * noise).sample, x)
        kl = posterior.kl().mean()
        return {"loss": error + 2e-6 * kl, **terms, "kl": kl.detach()}

    average = optimize(
        "vae",
        vae,
        loss,
        steps=steps,
        peak=2e-3,
        generator=generator,
        log=EMOJI / "vae_log.csv",
        decay=0.995,
    )
    vae.load_state_dict(average, strict=False)
    standardize(vae, batch(sprites, 1024, generator, WIDE)[0])
    save_part(vae, "vae")


class PatchCritic(torch.nn.Module):
    """Pictures (n, 3, 64, 64) to a score of every patch in each style, (n, styles, 16, 16); used in training only."""

    def __init__(self, styles: int = len(data.STYLES)):
        super().__init__()
        conv = torch.nn.Conv2d
        self.layers = torch.nn.ModuleList(
            [conv(3, 32, 4, 2, 1), conv(32, 64, 4, 2, 1), conv(64, 96, 3, 1, 1), conv(96, styles, 3, 1, 1)]
        )

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Scores for the given style, (n, 16, 16), and the features below them."""
        features = []
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.layers[-1](x)[torch.arange(len(style)), style], features


def train_decoder(steps: int = 2000, begin: int = 0, size: int = 32, noise: float = 0.2) -> None:
    """Sharpen the decoder of a trained VAE; its encoder, and with it every latent the UNet has learned, stays as it is.

    Adds to the reconstruction loss a hinge loss and feature matching against a patch critic that knows the style,
    as Stable Diffusion's VAE was trained with one. Latents get up to `noise` standard deviations of Gaussian noise,
    since those that the UNet draws are not perfect either.
    """
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(EMOJI_MODEL / "vae").float().to(memory_format=torch.channels_last)
    critic = PatchCritic().to(memory_format=torch.channels_last)
    module = torch.nn.ModuleDict(
        {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv, "critic": critic}
    )
    sprites, generator = load_sprites(), torch.Generator().manual_seed(1 + begin)

    def loss(step, generator):
        x, style, *_ = batch(sprites, size, generator, WIDE)
        with torch.no_grad():
            latents = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        amount = noise * torch.rand(size, 1, 1, 1, generator=generator)
        y = vae.decode(latents + amount * torch.randn(latents.shape, generator=generator)).sample
        error, terms = reconstruction(y, x)
        real, seen = critic(x, style)
        fake, _ = critic(y.detach(), style)
        judging = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        frozen = {name: p.detach() for name, p in critic.named_parameters()}
        score, felt = torch.func.functional_call(critic, frozen, (y, style))
        matching = sum((a - b.detach()).abs().mean() for a, b in zip(felt, seen, strict=True))
        drawing = error + matching - 0.05 * score.mean()
        return {"loss": drawing + judging, **terms, "critic": judging.detach()}

    average = optimize(
        "decoder",
        module,
        loss,
        steps=steps,
        begin=begin,
        peak=4e-4 if begin else 1e-3,
        generator=generator,
        log=EMOJI / "decoder_log.csv",
        decay=0.995,
    )
    module.load_state_dict(average, strict=False)
    save_part(vae, "vae")


@torch.no_grad()
def standardize(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Fold mean 0 and deviation 1 of every latent channel into the VAE's two 1 x 1 convolutions.

    The decoder's pictures stay the same; a diffusion model then needs no scaling factor.
    """
    latents = torch.cat([vae.encode(x).latent_dist.mean for x in pictures.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    inner, outer = vae.quant_conv, vae.post_quant_conv
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= std[None, :, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - mean) / std
    inner.weight[:channels] /= std[:, None, None, None]
    inner.bias[channels:] -= 2 * std.log()


# ---- CLIP -----------------------------------------------------------------------------------------------------


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Text tower of 4 layers and width 384, vision tower of 4 layers and width 192 on 8 x 8 patches."""
    text = dict(
        vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = dict(hidden_size=192, intermediate_size=576, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE,
                  patch_size=8)  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=256))


def contrastive(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """InfoNCE over rows with several right answers: `same` (n, m) is true where row and column belong together."""
    target = same.float() / same.sum(1, keepdim=True)
    return -(target * logits.log_softmax(1)).sum(1).mean()


def describes(text: Sequence[torch.Tensor], picture: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether caption i is true of picture j, bool (n, m).

    text: concept, style + 1 or 0 where none is named, and background, each (n,); a white one is rarely named and
    fits all. picture: concept, style and background, each (m,).
    """
    (concept, named, background), (shown, style, behind) = text, picture
    same = (concept[:, None] == shown) & ((named[:, None] == 0) | (named[:, None] == style + 1))
    return same & ((background[:, None] == 0) | (background[:, None] == behind))


def train_clip(steps: int = 1000, pictures: int = 96, words_: int = 144, glosses: int = 32) -> None:
    """Contrastive on pictures and captions, plus 4 (1 - cos) to the sentence encoder through a linear head.

    The head is thrown away. Token embeddings start at the sentence encoder's embeddings of the token strings.
    """
    from erasekit.emoji import words

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    tokenizer = words.train_tokenizer()
    captions_ = captions.pool(10, 1, generator)
    vocabulary = words.vocabulary_texts()
    clip = new_clip(tokenizer)
    pieces = [token.removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    rows = words.meanings(pieces, CHECKPOINTS / "meanings_pieces.safetensors")
    clip.text_model.get_input_embeddings().weight.data.copy_(rows * 0.02 * rows.shape[1] ** 0.5)
    head = torch.nn.Linear(384, 384)
    module = torch.nn.ModuleDict({"clip": clip, "head": head})
    caption_meanings = words.meanings(captions_.texts, CHECKPOINTS / "meanings_captions.safetensors")
    word_meanings = words.meanings(vocabulary, CHECKPOINTS / "meanings_words.safetensors")
    caption_ids = tokenizer(captions_.texts)["input_ids"]
    word_ids = tokenizer(vocabulary, truncation=True, max_length=tokenizer.model_max_length)["input_ids"]
    short = torch.tensor([i for i, ids in enumerate(word_ids) if len(ids) <= 10])
    long = torch.tensor([i for i, ids in enumerate(word_ids) if len(ids) > 10])
    table, sprites = captions_.table(), load_sprites()

    def pooled(ids: list[list[int]]) -> torch.Tensor:
        length = max(map(len, ids))
        padded = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in ids])
        return clip.text_model(padded).pooler_output

    def loss(step, generator):
        x, style, concept, background = batch(sprites, pictures, generator, WIDE)
        named = torch.where(torch.rand(pictures, generator=generator) < 0.2, 0, style + 1)
        slot = torch.randint(table.shape[-1], (pictures,), generator=generator)
        rows = table[concept, named, background, slot]
        short_rows = short[torch.randint(len(short), (words_,), generator=generator)]
        long_rows = long[torch.randint(len(long), (glosses,), generator=generator)]
        text = pooled([caption_ids[i] for i in rows] + [word_ids[i] for i in short_rows])
        meaning = torch.cat([caption_meanings[rows], word_meanings[short_rows], word_meanings[long_rows]])
        both = torch.cat([text, pooled([word_ids[i] for i in long_rows])])
        distance = 1 - F.cosine_similarity(head(both), meaning).mean()

        image = clip.vision_model(x).pooler_output
        image = F.normalize(clip.visual_projection(image), dim=-1)
        text = F.normalize(clip.text_projection(text[:pictures]), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * text @ image.T
        same = describes((concept, named, background), (concept, style, background))
        match = contrastive(logits, same) / 2 + contrastive(logits.T, same.T) / 2
        return {"loss": match + 4 * distance, "contrastive": match.detach(), "distance": distance.detach()}

    average = optimize(
        "clip",
        module,
        loss,
        steps=steps,
        peak=1e-3,
        generator=generator,
        log=EMOJI / "clip_log.csv",
        decay=0.996,
        weight_decay=0.05,
    )
    module.load_state_dict(average, strict=False)
    save_clip(clip, tokenizer)


def train_vision(steps: int = 700, begin: int = 0, size: int = 96) -> None:
    """Train the vision tower of a trained CLIP on; its text tower, which the UNet has learned to read, stays.

    With the text fixed, its features are computed once, and every picture is set against one caption of every concept
    in every style. A third of the pictures at least are of the style that zero-shot recognition is worst at, ink.
    """
    torch.manual_seed(0)
    clip = load_clip().requires_grad_(False)
    module = torch.nn.ModuleDict({"vision": clip.vision_model, "projection": clip.visual_projection})
    module.requires_grad_(True)
    captions_ = captions.pool(10, 1, torch.Generator().manual_seed(2))
    features, table = text_features(captions_.texts), captions_.table()
    sprites, generator = load_sprites(), torch.Generator().manual_seed(7 + begin)
    ink = data.STYLES.index("ink")
    rival_concept, rival_style = (
        axis.flatten()
        for axis in torch.meshgrid(torch.arange(len(table)), torch.arange(table.shape[1]), indexing="ij")
    )

    def loss(step, generator):
        style = torch.randint(len(sprites), (size,), generator=generator)
        style[: size // 3] = ink
        concept = torch.randint(sprites.shape[1], (size,), generator=generator)
        x, background = place(sprites[style, concept], WIDE, generator)
        named = torch.where(torch.rand(size, generator=generator) < 0.2, 0, style + 1)
        rivals = (rival_concept, rival_style, torch.zeros_like(rival_concept))
        about = [torch.cat(pair) for pair in zip((concept, named, background), rivals, strict=True)]
        slot = torch.randint(table.shape[-1], (len(about[0]),), generator=generator)
        text = features[table[*about, slot]]
        image = F.normalize(clip.visual_projection(clip.vision_model(x).pooler_output), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
        same = describes(about, (concept, style, background)).T
        match = contrastive(logits, same) / 2 + contrastive(logits[:, :size].T, same[:, :size].T) / 2
        guess = rival_concept[logits[:, size:].argmax(1)]
        return {"loss": match, "right": (guess == concept).float().mean()}

    average = optimize(
        "vision",
        module,
        loss,
        steps=steps,
        begin=begin,
        peak=1e-3,
        generator=generator,
        log=EMOJI / "vision_log.csv",
        decay=0.995,
        weight_decay=0.05,
    )
    module.load_state_dict(average, strict=False)
    save_vision(clip.half())


def save_clip(clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """The text tower into the pipeline folder; the vision tower and what joins the two into data/emoji/clip."""
    clip = clip.half()
    text = CLIPTextModel(clip.config.text_config).half()
    text.load_state_dict(clip.text_model.state_dict())
    text.save_pretrained(EMOJI_MODEL / "text_encoder")
    tokenizer.save_pretrained(EMOJI_MODEL / "tokenizer")
    clip.config.save_pretrained(EMOJI_CLIP)
    save_vision(clip)


def save_vision(clip: CLIPModel) -> None:
    """What of the CLIP is not its text tower."""
    rest = {k: v.contiguous() for k, v in clip.state_dict().items() if not k.startswith("text_model.")}
    with replacing(EMOJI_CLIP / "vision.safetensors") as temporary:
        save_file(rest, temporary, metadata={"format": "pt"})


# ---- UNet -----------------------------------------------------------------------------------------------------

UNCONDITIONAL = 0.1  # share of training captions that are dropped, for classifier-free guidance
SNR_CAP = 5.0  # gamma of min-SNR weighting (Hang et al., ICCV 2023)
LATER_SNR_CAP = 20.0  # of a run that goes on: the shading that tells styles apart is settled at little noise
LATER_SHARES = (1.0, 1.0, 1.0, 0.4, 2.6)  # of the styles, in such a run: ink is learned first, glossy last


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's betas and its epsilon prediction."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def drawing_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ 2M on the same noise schedule, with the fields that turn it back into the scheduler of training."""
    given = config_of(new_scheduler())
    return DPMSolverMultistepScheduler.from_config(given)


def new_unet() -> UNet2DConditionModel:
    """17 M parameters on 8 x 8 x 16 latents, cross-attention at both resolutions and in between."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=16, out_channels=16, block_out_channels=(128, 256), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=384, attention_head_dim=[4, 8],
    )  # fmt: skip


@torch.no_grad()
def picture_pool(copies: int) -> dict[str, torch.Tensor]:
    """Latents (styles, concepts, copies, 16, 8, 8) of random placements and their background index; kept on disk."""
    path = CHECKPOINTS / "latents.safetensors"
    if path.exists():
        return load_file(path)
    vae = AutoencoderKL.from_pretrained(EMOJI_MODEL / "vae").float().to(memory_format=torch.channels_last)
    sprites, generator = load_sprites(), torch.Generator().manual_seed(3)
    latents, backgrounds = [], []
    for one in tqdm(sprites.flatten(0, 1), desc="encoding pictures", mininterval=10):
        pictures, background = place(one.expand(copies, *one.shape), Placement(), generator)
        latents.append(vae.encode(pictures.to(memory_format=torch.channels_last)).latent_dist.mean.half())
        backgrounds.append(background)
    pool = {"latents": torch.stack(latents).unflatten(0, sprites.shape[:2]).contiguous(),
            "background": torch.stack(backgrounds).unflatten(0, sprites.shape[:2])}  # fmt: skip
    with replacing(path) as temporary:
        save_file(pool, temporary)
    return pool


@torch.no_grad()
def caption_embeddings(texts: list[str]) -> torch.Tensor:
    """Output of the frozen text tower, float16 (n, 32, 384)."""
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI_MODEL / "tokenizer")
    tower = CLIPTextModel.from_pretrained(EMOJI_MODEL / "text_encoder").float().eval()
    parts = tqdm(token_ids(tokenizer, texts).split(256), desc="encoding captions", mininterval=10)
    return torch.cat([tower(ids)[0].half() for ids in parts])


def train_unet(steps: int = 5000, begin: int = 0, size: int = 48, copies: int = 24) -> None:
    """Epsilon prediction with min-SNR weights on cached latents, from the frozen text tower's cached outputs."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(5)
    texts = captions.pool(14, 3, generator, name=0.55)
    table = texts.table()
    context, empty = caption_embeddings(texts.texts), caption_embeddings([""])[0]
    pictures = picture_pool(copies)
    latents, backgrounds = pictures["latents"], pictures["background"]
    scheduler = new_scheduler()
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    unet = UNet2DConditionModel.from_pretrained(EMOJI_MODEL / "unet").float() if begin else new_unet()
    generator.manual_seed(6 + begin)
    cap = LATER_SNR_CAP if begin else SNR_CAP
    shares = torch.tensor(LATER_SHARES if begin else (1.0,) * len(latents))

    def loss(step, generator):
        uniform = lambda *shape: torch.rand(*shape, generator=generator)
        style = torch.multinomial(shares, size, replacement=True, generator=generator)
        concept, copy = (torch.randint(n, (size,), generator=generator) for n in latents.shape[1:3])
        x = latents[style, concept, copy].float()
        named = torch.where(uniform(size) < 0.15, 0, style + 1)
        slot = torch.randint(table.shape[-1], (size,), generator=generator)
        text = context[table[concept, named, backgrounds[style, concept, copy], slot]].float()
        text[uniform(size) < UNCONDITIONAL] = empty.float()
        t = (
            (torch.arange(size) + uniform(size)) / size * 1000
        ).long()  # one time step from each of `size` bins
        noise = torch.randn(x.shape, generator=generator)
        prediction = unet(scheduler.add_noise(x, noise, t), t, encoder_hidden_states=text, return_dict=False)[
            0
        ]
        error = (prediction - noise).square().mean((1, 2, 3))
        return {"loss": (error * snr[t].clamp(max=cap) / snr[t]).mean(), "error": error.mean().detach()}

    average = optimize(
        "unet",
        unet,
        loss,
        steps=steps,
        begin=begin,
        peak=5e-4 if begin else 1e-3,
        generator=generator,
        log=EMOJI / "unet_log.csv",
        decay=0.999,
        weight_decay=0.01,
    )
    unet.load_state_dict(average)
    save_part(unet, "unet")
    if not (EMOJI_MODEL / "model_index.json").exists():
        save_pipeline()


def save_part(part: torch.nn.Module, name: str) -> None:
    """One trained part into its folder of the pipeline, in half precision."""
    part.half().save_pretrained(EMOJI_MODEL / name)
    tidy_configs(EMOJI_MODEL / name)


def save_pipeline() -> None:
    """Join the parts, once all are trained, into one stock pipeline folder."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(EMOJI_MODEL / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(EMOJI_MODEL / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(EMOJI_MODEL / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(EMOJI_MODEL / "unet"),
        scheduler=drawing_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    DiffusionModel(pipeline.to(torch.float16), "emoji").save_pretrained(EMOJI_MODEL)


# ---- judge ----------------------------------------------------------------------------------------------------


def degrade(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Soften, recolor and add noise to pictures in [-1, 1]: what is drawn stays, how well it is drawn does not."""
    n = len(x)
    uniform = lambda low, high: low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear", align_corners=False)
    softer = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="bilinear", align_corners=False)
    blurred = torch.lerp(x, torch.lerp(soft, softer, uniform(0, 0.7)), uniform(0, 1) * (uniform(0, 1) < 0.5))
    colored = (blurred + uniform(-0.06, 0.06)) * uniform(0.88, 1.08)
    noise = F.avg_pool2d(torch.randn(x.shape, generator=generator), 3, 1, 1)
    return (colored + uniform(0, 0.25) * (uniform(0, 1) < 0.5) * noise).clamp(-1, 1)


def train_judge(steps: int = 1000, begin: int = 0, size: int = 64) -> None:
    """Cross-entropy on object and style of real, augmented pictures."""
    torch.manual_seed(0)
    judge = Judge()
    if begin:
        judge.load_state_dict(load_file(EMOJI_JUDGE))
    judge.float().to(memory_format=torch.channels_last)
    sprites, generator = load_sprites(), torch.Generator().manual_seed(4 + begin)

    def loss(step, generator):
        x, style, concept, _ = batch(sprites, size, generator, JUDGE_PLACEMENT)
        objects, styles = judge(degrade(x, generator))
        about_object = F.cross_entropy(objects, concept, label_smoothing=0.05)
        about_style = F.cross_entropy(styles, style, label_smoothing=0.05)
        right = (objects.argmax(1) == concept).float().mean()
        return {"loss": about_object + about_style, "object": about_object.detach(), "style": about_style.detach(),
                "right": right}  # fmt: skip

    average = optimize(
        "judge",
        judge,
        loss,
        steps=steps,
        begin=begin,
        peak=2e-3,
        generator=generator,
        log=EMOJI / "judge_log.csv",
        decay=0.995,
        weight_decay=0.05,
    )
    save_file({k: v.half().contiguous() for k, v in average.items()}, EMOJI_JUDGE, metadata={"format": "pt"})


def main() -> None:
    parts = {
        "vae": train_vae,
        "decoder": train_decoder,
        "clip": train_clip,
        "vision": train_vision,
        "unet": train_unet,
        "judge": train_judge,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=parts)
    parser.add_argument("--steps", type=int, help="where the run ends")
    parser.add_argument(
        "--go-on", action="store_true", help="start from the committed weights, not from nothing"
    )
    given = parser.parse_args()
    options = {"steps": given.steps} if given.steps else {}
    if given.go_on and given.part in ("vae", "clip"):
        parser.error(
            "the UNet would have to be trained again: go on with decoder or vision, which it never sees"
        )
    if given.go_on:
        options["begin"] = begin_of(given.part, EMOJI / f"{given.part}_log.csv")
    parts[given.part](**options)
    data.record_weights()


if __name__ == "__main__":
    main()
