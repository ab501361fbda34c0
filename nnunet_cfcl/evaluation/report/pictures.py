"""Pictures embedded in the page: bounded in size and re-encoded from pixels, which drops all metadata."""

from __future__ import annotations

import base64
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from nnunet_cfcl.errors import first_line, foreign_errors_as

#: Size above which a PNG is encoded as JPEG, if that is smaller.
PNG_BYTES = 300_000
JPEG_QUALITY = 88
#: Largest ratio of height to width, and largest number of pixels to decode.
TALLEST, MOST_PIXELS = 4, 60_000_000


@dataclass(frozen=True)
class Picture:
    """Embedded picture.

    Attributes:
        uri: data URI.
        alt: alternative text.
        caption: text below the picture.
        width: in pixels.
        height: in pixels.
        wide: whether a narrow window scrolls the picture instead of shrinking it.
    """

    uri: str
    alt: str
    caption: str
    width: int
    height: int
    wide: bool = False


class BrokenPicture(Exception):
    """File that exists but cannot be shown as a picture."""


def embed(file: Path, alt: str, caption: str = "", most_width: int = 1600, wide: bool = False) -> Picture:
    """Embed a picture file, scaled down to at most ``most_width`` pixels.

    Args:
        file: PNG, JPEG, or another format of Pillow.
        alt: alternative text.
        caption: text below the picture.
        most_width: largest width in pixels; the height is at most `TALLEST` times that.
        wide: see `Picture`.

    Raises:
        BrokenPicture: the file cannot be read, or has more than `MOST_PIXELS` pixels.
    """
    def translate(error: Exception) -> Exception:
        return error if isinstance(error, BrokenPicture) else BrokenPicture(
            f"{file.name} cannot be read as a picture ({first_line(error)})")

    with foreign_errors_as(translate), warnings.catch_warnings():
        # Pillow warns about sizes that are rejected below
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise BrokenPicture(f"{file.name} has {opened.width} x {opened.height} pixels, too many to show "
                                    f"(at most {MOST_PIXELS})")
            picture = opened.convert("RGBA" if "A" in opened.getbands() or "transparency" in opened.info else "RGB")
    picture.thumbnail((most_width, TALLEST * most_width), Image.Resampling.LANCZOS)
    kind, content = _encoded(_on_white(picture))
    return Picture(data_uri(kind, content), alt, caption, picture.width, picture.height, wide)


def data_uri(kind: str, content: bytes) -> str:
    """Encode an image of a MIME subtype, such as "png" or "svg+xml", as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _on_white(picture: Image.Image) -> Image.Image:
    """Put a transparent picture on white: dark text would be invisible on a dark page."""
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
