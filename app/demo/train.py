"""How the demo models were trained: ``python -m app.demo.train --out FOLDER`` does it again.

Seeded, on two CPU cores in about an hour and a half. The result is a folder in diffusers' own layout that any stock
``StableDiffusionXLPipeline.from_pretrained`` loads, and a grid of pictures to look at beside it.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from app.demo.shapes import COLOURS, PICTURE_SIZE, SHAPES, SIZES, Drawing, draw, judge, random_drawing

WEIGHTS = Path(__file__).parent / "weights"
OTHER_SIZES = ((96, 96), (96, 160), (160, 96), (192, 192))
"""Heights and widths that one batch in seven has, so that the models also know other sizes than their own."""
LATENT_FACTOR = 8
LATENT_SCALE = 0.35
"""Deviation of the latents that the UNet sees.

Flat pictures are mostly mean colour, and a mean over all latents outshines noise that hides every detail. At deviation
1 the UNet would read colours off the noisiest latents and not from the caption, and at the start of a generation, where
there is nothing but noise, it would find grey.
"""
LOOSE_WORDS = (
    *("photo", "picture", "drawing", "image", "of", "the", "with", "in", "front", "and"),
    *("big", "tiny", "shape", "colour", "plain"),
)

# --- Vocabulary ------------------------------------------------------------------------------------------------


def make_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """A CLIP tokenizer whose every caption word is one token, and every other word falls apart into letters.

    Args:
        folder: ``vocab.json`` and ``merges.txt`` are written there, as in OpenAI's CLIP.
        pad_token: SDXL's first tokenizer pads with the end token, its second with ``!``.
    """
    words = sorted({"a", "on", "background", *COLOURS, *SHAPES, *filter(None, SIZES), *LOOSE_WORDS})
    bpe = BpeTokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]

    # CLIP's own order: 256 byte letters, the same at the end of a word, the merges, the two special tokens.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=pad_token)


# --- Models ----------------------------------------------------------------------------------------------------


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


def make_text_encoder(tokenizer: CLIPTokenizer, projection: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=64,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=PICTURE_SIZE // LATENT_FACTOR,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[2, 4, 6],
        cross_attention_dim=128,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
    )


def make_scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )


# --- Data ------------------------------------------------------------------------------------------------------


def to_tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """float32 ``[n, 3, h, w]`` in -1…1."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def caption(drawing: Drawing, rng: random.Random) -> str:
    """Mostly the canonical sentence; sometimes nothing, sometimes how people really write."""
    dice = rng.random()
    if dice < 0.82:
        return drawing.caption
    if dice < 0.85:
        return ""
    words = [drawing.size, drawing.colour, drawing.shape]
    if rng.random() < 0.7:
        words += rng.choice((["on"], ["with", "a"], ["in", "front", "of", "a"], ["on", "the"], ["and"]))
        words += [drawing.background, rng.choice(("background", ""))]
    if rng.random() < 0.5:
        stray = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 6)))
        words = [rng.choice((*LOOSE_WORDS, stray)), rng.choice(("of", "a", "")), *words]
    return " ".join(filter(None, words))


M = TypeVar("M", bound=torch.nn.Module)


class Average(Generic[M]):
    """An exponential average of a module's weights, which paints better than the last step's weights do."""

    def __init__(self, module: M, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)


def fit(
    module: M,
    loss_of_batch: Callable[[], torch.Tensor],
    *,
    name: str,
    steps: int,
    peak: float,
    average: float,
    weight_decay: float = 0.0,
    after: Callable[[int, M], None] | None = None,
) -> M:
    """Minimise a loss over a one-cycle schedule.

    Args:
        module: what of it requires gradients is trained.
        loss_of_batch: draws a batch and says how wrong `module` is about it.
        name: beside the progress bar.
        steps: batches.
        peak: largest learning rate.
        average: decay of the average of the weights.
        weight_decay: as AdamW's.
        after: hears of every step and the average so far.

    Returns:
        The average of the weights.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.08)
    best = Average(module, average)
    losses: collections.deque[float] = collections.deque(maxlen=200)
    for step in (bar := tqdm(range(steps), desc=name)):
        loss = loss_of_batch()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        best.update(module, step)
        losses.append(loss.item())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
        if after is not None:
            after(step, best.module)
    return best.module


# --- The autoencoder -------------------------------------------------------------------------------------------


def random_pictures(rng: random.Random) -> torch.Tensor:
    """Eight pictures of one size, ``[8, 3, h, w]``."""
    height, width = (PICTURE_SIZE, PICTURE_SIZE) if rng.random() < 6 / 7 else rng.choice(OTHER_SIZES)
    return to_tensor([draw(random_drawing(rng), width, height, rng) for _ in range(8)])


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

    vae = fit(vae, loss_of_batch, name="autoencoder", steps=steps, peak=2e-3, average=0.995)
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

    return fit(vae, loss_of_batch, name="decoder", steps=steps, peak=1.5e-3, average=0.995)


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


# --- The base --------------------------------------------------------------------------------------------------


class Latents:
    """Pictures encoded once, to draw batches from."""

    def __init__(self, vae: AutoencoderKL, native: int, others: int, small: float, seed: int) -> None:
        rng = random.Random(seed)
        self.sizes = {(PICTURE_SIZE, PICTURE_SIZE): native, **dict.fromkeys(OTHER_SIZES, others)}
        self.drawings: dict[tuple[int, int], list[Drawing]] = {}
        self.latents: dict[tuple[int, int], torch.Tensor] = {}
        for (height, width), count in self.sizes.items():
            drawings = [random_drawing(rng) for _ in range(count)]
            drawings = [replace(each, size="small") if rng.random() < small else each for each in drawings]
            parts = []
            for start in tqdm(range(0, count, 32), desc=f"encoding {height} x {width}"):
                part = [draw(drawing, width, height, rng) for drawing in drawings[start : start + 32]]
                with torch.no_grad():
                    parts.append(vae.encode(to_tensor(part)).latent_dist.mean)
            self.drawings[height, width] = drawings
            self.latents[height, width] = torch.cat(parts) * vae.config.scaling_factor

    def batch(self, size: int, rng: random.Random) -> tuple[tuple[int, int], torch.Tensor, list[Drawing]]:
        native, *others = self.sizes
        shape = native if rng.random() < 6 / 7 else rng.choice(others)
        picks = [rng.randrange(len(self.drawings[shape])) for _ in range(size)]
        return shape, self.latents[shape][picks], [self.drawings[shape][i] for i in picks]


class Base(torch.nn.Module):
    """What is trained together: both text encoders and the UNet."""

    def __init__(self, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> None:
        super().__init__()
        self.tokenizers = tokenizers
        self.text_encoder = make_text_encoder(tokenizers[0], projection=False)
        self.text_encoder_2 = make_text_encoder(tokenizers[1], projection=True)
        self.unet = make_unet()

    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """As the SDXL pipeline does: both encoders' last hidden layer but one, and the second's projection."""
        hidden = []
        pooled = torch.empty(0)
        for tokenizer, encoder in zip(self.tokenizers, (self.text_encoder, self.text_encoder_2), strict=True):
            ids = tokenizer(list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            output = encoder(ids.input_ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = output[0]
        return torch.cat(hidden, dim=-1), pooled


def time_ids(height: int, width: int, rows: int, rng: random.Random) -> torch.Tensor:
    """Original size, crop and target size; now and then arbitrary ones, so that any value is served gracefully."""
    usual = [height, width, 0, 0, height, width]
    return torch.tensor(
        [usual if rng.random() < 0.9 else [rng.randrange(0, 1025) for _ in usual] for _ in range(rows)],
        dtype=torch.float32,
    )


def make_base(folder: Path, seed: int) -> Base:
    """Untrained, with its tokenizers' files written to `folder`."""
    torch.manual_seed(seed)
    return Base(
        (
            make_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>"),
            make_tokenizer(folder / "tokenizer_2", pad_token="!"),
        )
    )


def load_base(pipeline: StableDiffusionXLPipeline, seed: int) -> Base:
    """As trained before."""
    torch.manual_seed(seed)
    base = Base((pipeline.tokenizer, pipeline.tokenizer_2))
    base.text_encoder, base.text_encoder_2 = pipeline.text_encoder, pipeline.text_encoder_2
    base.unet = pipeline.unet
    return base.train().requires_grad_(True)


def train_base(
    model: Base, vae: AutoencoderKL, folder: Path, *, steps: int, peak: float, native: int, small: float, seed: int
) -> StableDiffusionXLPipeline:
    """Noise prediction on latents; one caption in ten is dropped so that guidance has something to steer from.

    Args:
        model: what is trained.
        vae: trained; stays as it is.
        folder: a grid of pictures is laid beside it now and then.
        steps: batches.
        peak: largest learning rate.
        native: pictures of the usual size.
        small: share of them made small whatever the dice said.
        seed: of everything random but the first weights.
    """
    rng = random.Random(seed)
    data = Latents(vae, native, native // 12, small, seed)
    noise_scheduler = DDPMScheduler.from_config(make_scheduler().config)

    def pipeline(model: Base) -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=model.text_encoder,
            text_encoder_2=model.text_encoder_2,
            tokenizer=model.tokenizers[0],
            tokenizer_2=model.tokenizers[1],
            unet=model.unet,
            scheduler=make_scheduler(),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )

    def loss_of_batch() -> torch.Tensor:
        (height, width), latents, drawings = data.batch(48, rng)
        embeddings, pooled = model.encode([caption(drawing, rng) for drawing in drawings])
        kept = torch.tensor([rng.random() > 0.07 for _ in drawings]).float()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(drawings),))
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        conditions = {"text_embeds": pooled * kept[:, None], "time_ids": time_ids(height, width, len(drawings), rng)}
        predicted = model.unet(
            noisy, timesteps, embeddings * kept[:, None, None], added_cond_kwargs=conditions, return_dict=False
        )[0]
        loss: torch.Tensor = F.mse_loss(predicted, noise)
        return loss

    def now_and_then(step: int, best: Base) -> None:
        if step and step % 1500 == 0:
            tqdm.write(f"step {step}: {look(pipeline(best), folder.parent / f'{folder.name}-grid.png', 24)}")

    best = fit(
        model,
        loss_of_batch,
        name="base",
        steps=steps,
        peak=peak,
        average=0.999,
        weight_decay=1e-3,
        after=now_and_then,
    )
    return pipeline(best)


# --- Looking and saving ----------------------------------------------------------------------------------------


def captions_for(count: int, seed: int) -> Iterator[Drawing]:
    rng = random.Random(seed)
    for _ in range(count):
        yield random_drawing(rng)


def look(pipeline: StableDiffusionXLPipeline, path: Path, count: int, steps: int = 20) -> str:
    """Paint `count` captions, save them as one grid, and say how many the judge agrees with."""
    pipeline.set_progress_bar_config(disable=True)
    drawings = list(captions_for(count, seed=7))
    pictures: list[Image.Image] = []
    for start in range(0, count, 12):
        part = drawings[start : start + 12]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        prompts = [drawing.caption for drawing in part]
        output: Any = pipeline(prompt=prompts, num_inference_steps=steps, generator=generators)
        pictures += output.images
    columns = 12
    side = PICTURE_SIZE
    grid = Image.new("RGB", (columns * side, -(-count // columns) * side))
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % columns * side, i // columns * side))
    grid.save(path)
    verdicts = [judge(picture) for picture in pictures]
    pairs = list(zip(verdicts, drawings, strict=True))
    colours = sum((v.colour, v.background) == (d.colour, d.background) for v, d in pairs)
    shapes = sum(v.shape == d.shape for v, d in pairs)
    return f"colours {colours}/{count}, shapes {shapes}/{count}"


def save(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """Half-precision files for the UNet and the VAE; the text encoders are tiny and stay in float32."""
    halved = copy.copy(pipeline)
    halved.register_modules(unet=copy.deepcopy(pipeline.unet).half(), vae=copy.deepcopy(pipeline.vae).half())
    halved.save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        # Where it was loaded from is nobody's business.
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    stages = ("vae", "base", "settle", "sharpen")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder that receives the model folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=stages, help="one stage, on what the folder already holds")
    parser.add_argument("--vae_steps", type=int, default=2600)
    parser.add_argument("--base_steps", type=int, default=7000)
    parser.add_argument("--settle_steps", type=int, default=3000, help="more of the base, gently, on small drawings")
    parser.add_argument("--sharpen_steps", type=int, default=1800)
    parser.add_argument("--pictures", type=int, default=24_000, help="pictures that the base learns from")
    arguments = parser.parse_args()

    folder, seed, pictures = arguments.out / "sdxl", arguments.seed, arguments.pictures
    folder.mkdir(parents=True, exist_ok=True)

    def wanted(stage: str) -> bool:
        return arguments.only in (None, stage)

    def load() -> StableDiffusionXLPipeline:
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
        pipeline.vae.eval().requires_grad_(False)
        return pipeline

    if wanted("vae"):
        train_vae(arguments.vae_steps, seed).save_pretrained(folder / "vae")
    if wanted("base"):
        vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).eval().requires_grad_(False)
        steps, model = arguments.base_steps, make_base(folder, seed)
        save(train_base(model, vae, folder, steps=steps, peak=1.5e-3, native=pictures, small=0, seed=seed), folder)
    if wanted("settle"):
        vae, steps, model = load().vae, arguments.settle_steps, load_base(load(), seed)
        trained = train_base(model, vae, folder, steps=steps, peak=5e-4, native=pictures // 2, small=0.4, seed=seed + 1)
        save(trained, folder)
    if wanted("sharpen"):
        pipeline = load()
        pipeline.register_modules(vae=sharpen(pipeline.vae, arguments.sharpen_steps, seed))
        save(pipeline, folder)
    print(look(load(), arguments.out / "sdxl-grid.png", 96))


if __name__ == "__main__":
    main()
