"""What our server is measured against: the stock pipeline inside KServe's own model server, on the same weights.

``python -m tests.benchmarks.baseline --mode naive --http_port N``: a synchronous predict, which holds the event loop
for a whole picture. ``--mode executor``: the same in an executor of one thread, the best that a pipeline behind
this server can do. That thread loads the model too: torch gives each thread that computes an OpenMP team of its own,
and with two of them on two cores each picture takes three times as long.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import concurrent.futures
import io
from typing import Any

import diffusers
import kserve
import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from app.engine.scheduler_names import NAMES
from app.engine.weights import DEMO_WEIGHTS


class Stock(kserve.Model):  # type: ignore[misc]
    """One request, one ``__call__``."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.load_pipeline()
        self.ready = True

    def load_pipeline(self) -> None:
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO_WEIGHTS / "sdxl", dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        self.own = self.pipeline.scheduler

    def paint(self, request: kserve.InferRequest) -> kserve.InferResponse:
        parameters: dict[str, Any] = dict(request.parameters or {})
        prompt = request.inputs[0].data[0]  # `as_string` wants bytes, and JSON brings text
        class_name, overrides = NAMES[parameters["scheduler"]]
        self.pipeline.scheduler = getattr(diffusers, class_name).from_config(self.own.config, **overrides)
        image = self.pipeline(
            prompt=prompt,
            num_inference_steps=parameters["num_inference_steps"],
            guidance_scale=parameters["guidance_scale"],
            generator=torch.Generator().manual_seed(parameters["seed"]),
        ).images[0]
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        output = kserve.InferOutput("image", [1], "BYTES")
        text = base64.b64encode(buffer.getvalue())
        output.set_data_from_numpy(np.array([text], dtype=object), binary_data=False)
        return kserve.InferResponse(request.id or "", self.name, [output])


class Naive(Stock):
    def predict(self, payload: kserve.InferRequest, headers: Any = None) -> kserve.InferResponse:
        del headers
        return self.paint(payload)


class Executor(Stock):
    def __init__(self, name: str) -> None:
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        super().__init__(name)

    def load_pipeline(self) -> None:
        self.thread.submit(super().load_pipeline).result()

    async def predict(self, payload: kserve.InferRequest, headers: Any = None) -> kserve.InferResponse:
        del headers
        return await asyncio.get_running_loop().run_in_executor(self.thread, self.paint, payload)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=("naive", "executor"), required=True)
    parser.add_argument("--http_port", type=int, required=True)
    arguments = parser.parse_args()
    model = (Naive if arguments.mode == "naive" else Executor)("sdxl")
    kserve.ModelServer(http_port=arguments.http_port, enable_grpc=False, workers=1).start([model])


if __name__ == "__main__":
    main()
