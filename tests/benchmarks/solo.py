"""What serving costs: one request through the server beside the stock pipeline's ``__call__``, alternating.

``make bench`` runs it and writes the table to ``tests/benchmarks/results/solo.md``. Both sides run in this process, one
after the other, in the thread that suits them: the server's device thread, and this one for the stock call. The served
time includes HTTP over loopback, the queue, PNG encoding and reading the answer; the stock time includes PNG encoding.
"""

from __future__ import annotations

import argparse
import io
import platform
import socket
import statistics
import threading
import time
from pathlib import Path

import httpx
import torch
import uvicorn
from diffusers import StableDiffusionXLPipeline

from app.engine.weights import DEMO_WEIGHTS
from app.main import create_app
from app.settings import Settings

RESULTS = Path(__file__).parent / "results" / "solo.md"
PROMPT = "a red circle on a white background"


def serve() -> tuple[uvicorn.Server, str]:
    """Our server on a free port, once its model is ready."""
    listener = socket.create_server(("127.0.0.1", 0))
    settings = Settings(model_id="demo", model_name="sdxl", enable_latency_logging=False)
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_config=None, access_log=False))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    while True:
        try:
            if httpx.get(f"{url}/v2/health/ready").status_code == 200:
                return server, url
        except httpx.HTTPError:
            pass
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="pairs of measurements for each number of steps")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 20])
    arguments = parser.parse_args()

    server, url = serve()
    client = httpx.Client(base_url=url, timeout=600)
    stock = StableDiffusionXLPipeline.from_pretrained(DEMO_WEIGHTS / "sdxl", dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)

    def ours(steps: int, seed: int) -> None:
        parameters = {"num_inference_steps": steps, "seed": seed}
        inputs = [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [PROMPT]}]
        client.post("/v2/models/sdxl/infer", json={"inputs": inputs, "parameters": parameters}).raise_for_status()

    def theirs(steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        image = stock(PROMPT, num_inference_steps=steps, generator=generator).images[0]
        image.save(io.BytesIO(), format="PNG", compress_level=1)

    lines = ["| steps | served, ms | stock call, ms | ratio of medians |", "|--:|--:|--:|--:|"]
    for steps in arguments.steps:
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for seed in range(-2, arguments.rounds):
            # Who goes first alternates too, so that neither side profits from the other's warm caches.
            for name, side in sorted({"ours": ours, "theirs": theirs}.items(), reverse=seed % 2 == 0):
                started = time.perf_counter()
                side(steps, abs(seed))
                if seed >= 0:
                    seconds[name].append(time.perf_counter() - started)
        served, stocked = (statistics.median(seconds[name]) for name in ("ours", "theirs"))
        lines.append(f"| {steps} | {1000 * served:.1f} | {1000 * stocked:.1f} | {served / stocked:.3f} |")
        print(lines[-1], flush=True)
    server.should_exit = True

    note = (
        f"Medians of {arguments.rounds} alternating pairs, demo model, {torch.get_num_threads()} CPU threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}."
    )
    RESULTS.write_text("\n".join([note, "", *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
