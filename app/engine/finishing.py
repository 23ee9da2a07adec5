"""What happens to pixels: threads that encode them while the device is already at its next step."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time

from app.engine.faults import as_fault
from app.engine.queue import Queue
from app.engine.ticket import Image
from app.errors import RuntimeFault
from app.generation import GenerateRequest, ImageFormat, Pixels, Preview
from app.images import encode_image
from app.telemetry import Telemetry

logger = logging.getLogger(__name__)

PREVIEWS_AT_ONCE = 8
"""Previews that wait for an encoder; where they come faster, some are left out."""


class Encoders:
    """A pool of threads that make files of pixels.

    Args:
        queue: whose images and tickets they finish.
        telemetry: where seconds go.
        threads: how many.
        embed_metadata: PNG text chunks.
    """

    def __init__(self, queue: Queue, telemetry: Telemetry, threads: int, embed_metadata: bool) -> None:
        self._queue = queue
        self._telemetry = telemetry
        self._embed_metadata = embed_metadata
        self._previews = threading.BoundedSemaphore(PREVIEWS_AT_ONCE)
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="encode")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def finish(self, image: Image) -> None:
        """Encode a whole picture and end its ticket with the last one."""
        self._pool.submit(self._finish, image)

    def _finish(self, image: Image) -> None:
        if image.ticket.over:
            return
        try:
            assert image.pixels is not None and image.request.seed is not None
            started = time.monotonic()
            encoded = encode_image(image.pixels, image.request, image.request.seed, self._embed_metadata)
            seconds = time.monotonic() - started
            self._telemetry.stage("encode", seconds)
            self._queue.finished(image, encoded, seconds)
        except Exception as error:
            if not isinstance(error, RuntimeFault):
                logger.error("a picture could not be encoded", exc_info=error)
            self._queue.end(image.ticket, as_fault(error))

    def show(self, image: Image, pixels: Pixels) -> bool:
        """Encode a preview and tell the listeners; ``False`` where too many wait for that already."""
        if not self._previews.acquire(blocking=False):
            return False
        self._pool.submit(self._show, image, image.steps_done, pixels)
        return True

    def _show(self, image: Image, step: int, pixels: Pixels) -> None:
        try:
            request = GenerateRequest(prompt="", output_format=ImageFormat.JPEG)
            encoded = encode_image(pixels, request, 0, embed_metadata=False)
            image.ticket.tell(Preview(image.index, step, encoded))
        except Exception as error:
            logger.error("a preview could not be encoded", exc_info=error)
        finally:
            self._previews.release()
