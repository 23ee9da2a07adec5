"""What schemathesis sends where the OpenAPI document names a format of its own; it loads this by SCHEMATHESIS_HOOKS."""

import base64
import io

import schemathesis
from hypothesis import strategies
from PIL import Image

from app.api.predict_schema import PICTURE_FORMAT


def _picture(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


schemathesis.openapi.format(PICTURE_FORMAT, strategies.sampled_from([_picture(8, 8), _picture(24, 16)]))
