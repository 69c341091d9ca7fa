"""Pictures on their way in and out: uploads with their masks, and the bytes of answers.

Legend: H W pixels.
"""

import base64
import io

import numpy as np
from PIL import Image

from varkit.data.images import BadImage, open_alpha, open_image
from varkit.serve.errors import ApiError
from varkit.serve.schema import Format

QUALITY = 90
OPAQUE = 128
"""What is less opaque than this, of 255, is drawn anew."""


def read_upload(image: bytes, mask: bytes | None, most_pixels: int) -> tuple[Image.Image, np.ndarray]:
    """An uploaded picture, and (H, W) bool where it is to be drawn anew: where the mask, or without one the picture
    itself, is transparent.
    """
    try:
        picture = Image.fromarray(open_image(image, most_pixels))
    except BadImage as error:
        raise ApiError(400, f"parameter 'image': {error}", "image", "invalid_image") from error
    name, source = ("image", image) if mask is None else ("mask", mask)
    try:
        alpha = open_alpha(source, most_pixels)
    except BadImage as error:
        raise ApiError(400, f"parameter {name!r}: {error}", name, "invalid_image") from error
    if alpha is None or bool((alpha >= OPAQUE).all()):
        remedy = "send a mask" if mask is None else "make transparent what is to be drawn anew"
        raise ApiError(
            400, f"parameter {name!r}: nothing in it is transparent; {remedy}", name, "invalid_mask"
        )
    if alpha.shape != (picture.height, picture.width):
        h, w = alpha.shape
        raise ApiError(
            400,
            f"parameter 'mask': it is {w}x{h} and the picture {picture.width}x{picture.height}; make them one size",
            "mask",
            "invalid_mask",
        )
    return picture, alpha < OPAQUE


def encoded(image: Image.Image, form: Format, quality: int | None) -> str:
    """The bytes of a picture's file, in base64."""
    stream = io.BytesIO()
    options = {} if form == "png" else {"quality": QUALITY if quality is None else quality}
    image.save(stream, form, **options)
    return base64.b64encode(stream.getvalue()).decode()
