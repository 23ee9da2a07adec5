"""The autoencoder, which all demo models share."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from app.demo.shapes import PICTURE_SIZE, draw, random_drawing
from app.demo.training.fitting import adam, fit
from app.demo.training.pictures import random_pictures, to_tensor

LATENT_FACTOR = 8
LATENT_SCALE = 0.35
"""Deviation of the latents that the UNet sees.

Flat pictures are mostly mean colour, and a mean over all latents outshines noise that hides every detail. At deviation
1 the UNet would read colours off the noisiest latents and not from the caption, and at the start of a generation, where
there is nothing but noise, it would find grey.
"""


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=PICTURE_SIZE,
        scaling_factor=LATENT_SCALE,
        force_upcast=False,
    )


def difference(painted: torch.Tensor, wanted: torch.Tensor, edges: float) -> torch.Tensor:
    """L1 + L2 on pixels, and L1 on the differences between neighbours, which keeps edges sharp."""
    along_edges = sum((F.l1_loss(painted.diff(dim=d), wanted.diff(dim=d)) for d in (2, 3)), torch.zeros(()))
    loss: torch.Tensor = F.l1_loss(painted, wanted) + F.mse_loss(painted, wanted) + edges * along_edges
    return loss


def train_vae(steps: int, seed: int) -> AutoencoderKL:
    """An autoencoder from scratch, with a little KL."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = make_vae().train()

    def loss_of_batch() -> torch.Tensor:
        pictures = random_pictures(rng)
        posterior = vae.encode(pictures).latent_dist
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
        loss: torch.Tensor = difference(vae.decode(posterior.sample()).sample, pictures, edges=0.5) + 3e-4 * kl
        return loss

    vae = fit(vae, loss_of_batch, adam(vae, peak=2e-3), name="autoencoder", steps=steps, average=0.995)
    normalise_latents(vae, random.Random(seed + 1))
    return vae


def sharpen(vae: AutoencoderKL, steps: int, seed: int) -> AutoencoderKL:
    """Train the decoder alone, on latents as a UNet paints them: nearly right.

    The encoder stays, so the latents mean what they meant and a base trained before still fits.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)

    def loss_of_batch() -> torch.Tensor:
        pictures = random_pictures(rng)
        latents = vae.encode(pictures).latent_dist.mean
        return difference(vae.decode(latents + 0.08 * torch.randn_like(latents)).sample, pictures, edges=1.0)

    return fit(vae, loss_of_batch, adam(vae, peak=1.5e-3), name="decoder", steps=steps, average=0.995)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, rng: random.Random) -> None:
    """Fold the latents' mean and deviation into the 1 x 1 convolutions on both sides of them.

    Afterwards each latent channel has mean 0 and deviation 1, before `LATENT_SCALE`.
    """
    x = to_tensor([draw(random_drawing(rng), PICTURE_SIZE, PICTURE_SIZE, rng) for _ in range(256)])
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in torch.tensor_split(x, 8)])
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight *= deviation[None, :, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / deviation
    quant.weight[:4] /= deviation[:, None, None, None]
    quant.bias[4:] -= 2 * deviation.log()
