"""Train the parts of the emoji world, in this order (each resumes where it stopped; see training.py):

    python -m erasekit.emoji.train vae      # pictures <-> 8 x 8 x 16 latents
    python -m erasekit.emoji.train clip     # text and vision towers (needs the `train` extra)
    python -m erasekit.emoji.train unet     # the diffusion model
    python -m erasekit.emoji.train judge    # the referee, from real pictures alone
"""

import argparse

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from erasekit.emoji.pictures import Placement, load_sprites, place
from erasekit.emoji.training import optimize
from erasekit.paths import EMOJI, EMOJI_MODEL


def batch(sprites: torch.Tensor, n: int, generator: torch.Generator, placement=Placement()):
    """n random pictures (n, 3, 64, 64) with their style, concept and background indices, each (n,)."""
    style = torch.randint(sprites.shape[0], (n,), generator=generator)
    concept = torch.randint(sprites.shape[1], (n,), generator=generator)
    pictures, background = place(sprites[style, concept], placement, generator)
    return pictures, style, concept, background


# ---- VAE ------------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """64 x 64 x 3 pixels to 8 x 8 x 16 latents."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, sample_size=64, norm_num_groups=16, layers_per_block=1,
        block_out_channels=(32, 64, 128, 128), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=1.0,
    )


def _edges(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.diff(dim=-1).flatten(1), x.diff(dim=-2).flatten(1)], 1)


def train_vae(steps: int = 1300, size: int = 32) -> None:
    """L1 + L2 + edge loss with a light KL term. Latents end standardized per channel."""
    torch.manual_seed(0)
    vae, sprites, generator = new_vae(), load_sprites(), torch.Generator().manual_seed(1)

    def loss(generator):
        x, *_ = batch(sprites, size, generator, Placement(colored=0.25))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        y = y.float()
        l1, l2, edge = (y - x).abs().mean(), (y - x).square().mean(), (_edges(y) - _edges(x)).abs().mean()
        kl = posterior.kl().float().mean()
        return {"loss": l1 + l2 + 2 * edge + 2e-6 * kl, "l1": l1.detach(), "edge": edge.detach(), "kl": kl.detach()}

    average = optimize("vae", vae, loss, steps=steps, peak=2e-3, generator=generator, log=EMOJI / "vae_log.csv",
                       decay=0.995)
    vae.load_state_dict(average, strict=False)
    standardize(vae, batch(sprites, 1024, generator)[0])
    vae.half().save_pretrained(EMOJI_MODEL / "vae")


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


def main() -> None:
    parts = {"vae": train_vae}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--steps", type=int, help="length of the whole run; more than before goes on from there")
    arguments = parser.parse_args()
    parts[arguments.part](**({"steps": arguments.steps} if arguments.steps else {}))


if __name__ == "__main__":
    main()
