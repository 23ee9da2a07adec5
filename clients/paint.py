"""The command line: ``sdxl-paint "a red circle on a white background"`` paints pictures and saves them.

Knows `client` and the file system, nothing of the protocol.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import math
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from clients.client import AsyncClient, ClientError, Parameters, Picture, ServerError
from clients.inputs import read_image

PROGRAM = "sdxl-paint"
KEY_VARIABLE = "SDXL_API_KEY"
LONGEST_NAME = 48
"""Characters of the prompt in a file's name; at four bytes each, seed and ending still fit into 255 bytes."""
MAX_SEED = 2**63 - 1
LONGEST_WAIT = 86_400


def main(arguments: Sequence[str] | None = None) -> int:
    """Paint and save what the command line asks for.

    Returns:
        The exit code: 0 when every picture is saved, 1 for an error, 130 after Ctrl-C.

    Raises:
        SystemExit: after ``--help``, or with code 2 for wrong usage.
    """
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A prompt's letters are in its pictures' names, and a terminal or a pipe may know other ones.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        asyncio.run(paint(options))
    except ClientError as error:
        refused = isinstance(error, ServerError) and error.status == 401
        hint = f" It is read from the environment variable {KEY_VARIABLE}." if refused else ""
        print(f"{PROGRAM}: {error}{hint}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{PROGRAM}: Cannot write {error.filename or 'the output'}: {error.strerror}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


async def paint(options: argparse.Namespace) -> None:
    """Send one request for each picture, several at a time, and save each picture as soon as it is there.

    Raises:
        ClientError: a picture could not be had; those before it are saved, the others are given up.
        OSError: a picture could not be saved.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    parameters = _parameters(options)
    key = os.environ.get(KEY_VARIABLE)
    async with AsyncClient(options.url, options.model, key, options.timeout, retries=options.retries) as client:
        if options.wait is not None:
            await client.wait_until_ready(options.wait)
        places = asyncio.Semaphore(options.parallel)

        async def paint_one(number: int) -> None:
            seeded: Parameters = {
                **parameters,
                "seed": None if options.seed is None else following(options.seed, number),
            }
            steps = 0

            def on_step(done: int, total: int) -> None:
                nonlocal steps
                # All pictures take as many steps as the first one that tells.
                bar.total = total * options.number
                bar.update(done - steps)
                steps = done

            async with places:
                result = await client.generate(options.prompt, on_step=on_step if shown else None, **seeded)
            for picture in result.pictures:
                path = save(picture, options.prompt, options.out)
                tqdm.write(f"{path}\tseed {picture.seed}")

        try:
            shown = sys.stderr.isatty()
            with tqdm(unit="step", disable=not shown) as bar:
                async with asyncio.TaskGroup() as group:
                    for number in range(options.number):
                        group.create_task(paint_one(number))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None


def following(seed: int, number: int) -> int:
    """The seed that a server gives to the picture `number` places after that of `seed`: 0 comes after the largest.

    One that no server takes stays as it is, for the server to refuse it.
    """
    return (seed + number) % (MAX_SEED + 1) if 0 <= seed <= MAX_SEED else seed


def save(picture: Picture, prompt: str, folder: Path) -> Path:
    """Write `picture` under a name made of `prompt` and its seed; never over another file.

    A file that holds the very same picture is left as it is; a different one gets a number behind the name.

    Raises:
        OSError: it cannot be written.
    """
    stem = f"{file_name(prompt)}-{picture.seed}"
    path = folder / f"{stem}{picture.suffix}"
    count = 1
    while True:
        try:
            with path.open("xb") as file:
                file.write(picture.data)
            return path
        except FileExistsError:
            if path.is_file() and path.read_bytes() == picture.data:
                return path
        count += 1
        path = folder / f"{stem}_{count}{picture.suffix}"


def file_name(prompt: str) -> str:
    """The words of `prompt` in small letters with hyphens between them: letters and digits of any script, no more."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", prompt).lower())
    return "-".join(words)[:LONGEST_NAME].rstrip("-") or "picture"


def _parameters(options: argparse.Namespace) -> Parameters:
    """What all pictures have in common.

    Raises:
        ClientError: an image cannot be read.
    """
    return Parameters(
        prompt_2=options.prompt_2,
        negative_prompt=options.negative,
        negative_prompt_2=options.negative_2,
        height=options.height,
        width=options.width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        guidance_rescale=options.guidance_rescale,
        true_cfg_scale=options.true_cfg,
        image=read_image("--image", options.image) if options.image else None,
        mask_image=read_image("--mask", options.mask) if options.mask else None,
        strength=options.strength,
        clip_skip=options.clip_skip,
        scheduler=options.scheduler,
        use_karras_sigmas=options.sigmas == "karras" or None,
        use_exponential_sigmas=options.sigmas == "exponential" or None,
        use_beta_sigmas=options.sigmas == "beta" or None,
        timestep_spacing=options.timestep_spacing,
        denoising_limit=options.denoising_limit,
        denoising_end=options.denoising_end,
        max_sequence_length=options.max_sequence_length,
        loras=",".join(options.lora) if options.lora else None,
        output_format=options.format,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Paint pictures with a Stable Diffusion XL server. Prints the file and the seed of each.",
        epilog=f"What is not given is the model's own choice. The key for a server that wants one is read from the "
        f"environment variable {KEY_VARIABLE}.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("prompt", help="what the pictures show")
    add("--url", default="http://localhost:8080", help="of the server (default: %(default)s)")
    add("--model", default="sdxl", metavar="NAME", help="name of the model there (default: %(default)s)")
    add("--out", default=Path(), type=Path, metavar="DIR", help="folder for the files (default: this one)")
    add("--number", default=1, type=_count, metavar="N", help="pictures to paint (default: %(default)s)")
    add("--seed", type=int, metavar="N", help="of the first picture, the next has one more (default: random)")

    group = parser.add_argument_group("how they are painted")
    add = group.add_argument
    add("--steps", type=int, metavar="N", help="denoising steps")
    add("--guidance", type=float, metavar="SCALE", help="how strongly the prompt steers")
    add("--guidance-rescale", type=float, metavar="X", help="0 to 1; tames overexposure by strong guidance")
    add("--negative", metavar="PROMPT", help="what the pictures should not show")
    add("--prompt-2", metavar="PROMPT", help="for the second text encoder")
    add("--negative-2", metavar="PROMPT", help="negative prompt for the second text encoder")
    add("--width", type=int, metavar="PIXELS")
    add("--height", type=int, metavar="PIXELS")
    add("--scheduler", metavar="NAME", help="noise scheduler, such as 'Euler' or 'DPM++ 2M Karras'")
    add("--sigmas", choices=("karras", "exponential", "beta"), help="how the scheduler's noise levels are spaced")
    add("--timestep-spacing", choices=("linspace", "leading", "trailing"), help="how its timesteps are spaced")
    add("--clip-skip", type=int, metavar="N", help="text encoder layers to skip")
    add(
        "--denoising-limit",
        type=float,
        metavar="X",
        help="fraction of the denoising that the base does, not the refiner",
    )
    add("--denoising-end", type=float, metavar="X", help="fraction of the denoising after which to stop")
    add("--lora", action="append", metavar="NAME[:SCALE]", help="LoRA adapter to paint with; may be repeated")
    add("--true-cfg", type=float, metavar="SCALE", help="FLUX: how strongly the negative prompt steers")
    add("--max-sequence-length", type=int, metavar="N", help="FLUX: tokens of the prompt that are read")
    add("--format", choices=("png", "jpeg", "webp"), help="of the files (default: png)")

    group = parser.add_argument_group("what they start from")
    add = group.add_argument
    add("--image", metavar="FILE", help="picture to start from: PNG, JPEG or WebP")
    add("--mask", metavar="FILE", help="where to paint it again (white) and where to keep it (black)")
    add("--strength", type=float, metavar="X", help="how far to go from the image: near 0 keeps it, 1 ignores it")

    group = parser.add_argument_group("how the server is asked")
    add = group.add_argument
    add("--parallel", default=16, type=_count, metavar="N", help="requests at the same time (default: %(default)s)")
    add(
        "--retries",
        default=5,
        type=int,
        metavar="N",
        help="tries again while it is busy or restarts (default: %(default)s)",
    )
    add("--timeout", default=600.0, type=_seconds, metavar="SECONDS", help="for one answer (default: %(default)g)")
    add("--wait", type=_seconds, metavar="SECONDS", help="for the model to become ready first (default: no time)")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= LONGEST_WAIT:
        raise argparse.ArgumentTypeError(f"must be more than 0 and at most {LONGEST_WAIT} seconds, not {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
