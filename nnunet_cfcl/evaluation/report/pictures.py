"""Pictures as parts of the page: bounded in size, made anew from their pixels, so that nothing else comes along."""

from __future__ import annotations

import base64
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from nnunet_cfcl.errors import first_line, foreign_errors_as

#: A PNG larger than this is tried as JPEG, which is far smaller for grey images.
PNG_BYTES = 300_000
JPEG_QUALITY = 88
#: Of the height of a picture to its width, and the most pixels that are decoded.
TALLEST, MOST_PIXELS = 4, 60_000_000


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        uri: of the scheme data.
        alt: what it shows, for those who do not see it.
        caption: below it.
        width, height: in pixels.
        wide: whether it is scrolled, not shrunk, where the window is narrow.
    """

    uri: str
    alt: str
    caption: str
    width: int
    height: int
    wide: bool = False


class BrokenPicture(Exception):
    """A file that is there and is no picture; the message says why."""


def embed(file: Path, alt: str, caption: str = "", most_width: int = 1600, wide: bool = False) -> Picture:
    """A picture file, scaled down to at most ``most_width`` pixels.

    Args:
        file: PNG, JPEG, or what else Pillow reads.
        alt, caption: see `Picture`.
        most_width: in pixels; the height is at most `TALLEST` times that.
        wide: see `Picture`.

    Raises:
        BrokenPicture: it cannot be read, or is too large.
    """
    def translate(error: Exception) -> Exception:
        return error if isinstance(error, BrokenPicture) else BrokenPicture(
            f"{file.name} cannot be read as a picture ({first_line(error)})")

    with foreign_errors_as(translate), warnings.catch_warnings():
        # Pillow warns of sizes that are refused below
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise BrokenPicture(f"{file.name} has {opened.width} x {opened.height} pixels, too many to show")
            picture = opened.convert("RGBA" if "A" in opened.getbands() or "transparency" in opened.info else "RGB")
    picture.thumbnail((most_width, TALLEST * most_width), Image.Resampling.LANCZOS)
    kind, content = _encoded(_on_white(picture))
    return Picture(data_uri(kind, content), alt, caption, picture.width, picture.height, wide)


def data_uri(kind: str, content: bytes) -> str:
    """Content of an image type, such as "png" or "svg+xml", as an address."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _on_white(picture: Image.Image) -> Image.Image:
    """Figures have dark letters, which a dark page would swallow."""
    if picture.mode != "RGBA":
        return picture
    ground = Image.new("RGB", picture.size, "white")
    ground.paste(picture, mask=picture.getchannel("A"))
    return ground


def _encoded(picture: Image.Image) -> tuple[str, bytes]:
    png = _saved(picture, "PNG", optimize=True)
    if len(png) <= PNG_BYTES:
        return "png", png
    jpeg = _saved(picture, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return ("jpeg", jpeg) if len(jpeg) < len(png) else ("png", png)


def _saved(picture: Image.Image, kind: str, **how: int | bool) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()
