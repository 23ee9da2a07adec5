"""How the demo models were trained: ``python -m app.demo.train --out FOLDER`` does it again.

Seeded, on two CPU cores in about three hours. The result is a folder per model in diffusers' own layout, which any
stock ``StableDiffusionXLPipeline``, ``StableDiffusionXLImg2ImgPipeline`` or ``FluxPipeline`` loads, and a grid of
pictures to look at beside it. The recipes are in `app/demo/training`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from app.demo.training import base, flux, refiner
from app.demo.training.autoencoder import sharpen, train_vae
from app.demo.training.results import look, save

WEIGHTS = Path(__file__).parent / "weights"
STAGES = ("vae", "base", "settle", "sharpen", "refiner", "flux", "settle_flux", "guidance")


def load_vae(folder: Path, **config: float) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32, **config).eval().requires_grad_(False)


def load(folder: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.vae.eval().requires_grad_(False)
    return pipeline


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder that receives the model folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=STAGES, help="one stage, on what the folder already holds")
    parser.add_argument("--vae_steps", type=int, default=2600)
    parser.add_argument("--base_steps", type=int, default=7000)
    parser.add_argument("--settle_steps", type=int, default=3000, help="more of the base, gently, on small drawings")
    parser.add_argument("--sharpen_steps", type=int, default=1800, help="the decoder alone")
    parser.add_argument("--refiner_steps", type=int, default=1500)
    parser.add_argument("--flux_steps", type=int, default=3600)
    parser.add_argument("--settle_flux_steps", type=int, default=4000, help="more of FLUX, on its outlines")
    parser.add_argument("--guidance_steps", type=int, default=1000, help="FLUX's guidance, by distillation")
    parser.add_argument("--pictures", type=int, default=24_000, help="pictures that the base learns from")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    out, seed, pictures = arguments.out, arguments.seed, arguments.pictures
    sdxl_folder, refiner_folder, flux_folder = out / "sdxl", out / "refiner", out / "flux"
    sdxl_folder.mkdir(parents=True, exist_ok=True)

    def wanted(*stages: str) -> bool:
        return arguments.only is None or arguments.only in stages

    if wanted("vae"):
        train_vae(arguments.vae_steps, seed).save_pretrained(sdxl_folder / "vae")
    if wanted("base"):
        untrained, options = base.make_base(sdxl_folder, seed), {"peak": 1.5e-3, "native": pictures, "small": 0.0}
        steps, vae = arguments.base_steps, load_vae(sdxl_folder)
        save(base.train_base(untrained, vae, sdxl_folder, steps=steps, seed=seed, **options), sdxl_folder)
    if wanted("settle"):
        trained, options = load(sdxl_folder), {"peak": 5e-4, "native": pictures // 2, "small": 0.4}
        steps, unsettled = arguments.settle_steps, base.load_base(trained, seed)
        save(base.train_base(unsettled, trained.vae, sdxl_folder, steps=steps, seed=seed + 1, **options), sdxl_folder)
    if wanted("sharpen"):
        blurred = load(sdxl_folder)
        blurred.register_modules(vae=sharpen(blurred.vae, arguments.sharpen_steps, seed))
        save(blurred, sdxl_folder)
    if wanted("vae", "base", "settle", "sharpen"):
        print("sdxl:", look(base.painter(load(sdxl_folder)), out / "sdxl-grid.png", 96))

    if wanted("refiner"):
        expert, steps = load(sdxl_folder), arguments.refiner_steps
        finisher = refiner.train_refiner(expert, refiner_folder, steps=steps, native=pictures // 3, seed=seed)
        save(finisher, refiner_folder)
        for part in refiner.SHARED_PARTS:
            shutil.copytree(sdxl_folder / part, refiner_folder / part, dirs_exist_ok=True)
        print("refiner:", look(refiner.painter(expert, finisher), out / "refiner-grid.png", 96))

    if wanted("flux"):
        # FluxPipeline shifts latents too, and wants a number for it.
        vae, steps = load_vae(sdxl_folder, scaling_factor=flux.SCALE, shift_factor=0.0), arguments.flux_steps
        begun, options = flux.make_flux(flux_folder, seed), {"peak": 8e-3, "sigmas_for": flux.sigmas_to_begin}
        outlined = flux.train_flux(begun, vae, flux_folder, steps=steps, native=pictures // 3, seed=seed, **options)
        flux.save_flux(outlined, flux_folder)
    if wanted("settle_flux"):
        outlined, steps = flux.load_flux(flux_folder), arguments.settle_flux_steps
        begun, options = flux.load_trained(outlined), {"peak": 6e-3, "sigmas_for": flux.sigmas_to_settle}
        settled = flux.train_flux(
            begun, outlined.vae, flux_folder, steps=steps, native=pictures // 2, seed=seed + 1, **options
        )
        flux.save_flux(settled, flux_folder)
    if wanted("guidance"):
        teacher, steps = flux.load_flux(flux_folder), arguments.guidance_steps
        flux.save_flux(flux.distil_guidance(teacher, steps=steps, native=pictures // 4, seed=seed), flux_folder)
    if wanted("flux", "settle_flux", "guidance"):
        print("flux:", look(flux.painter(flux.load_flux(flux_folder)), out / "flux-grid.png", 96))


if __name__ == "__main__":
    main()
