"""Building blocks of the page as plain data, which the template escapes: sections of text, tables and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nnunet_cfcl.errors import isolated, reason
from nnunet_cfcl.evaluation.report.pictures import BrokenPicture, Picture, embed
from nnunet_cfcl.files.lenient_json import as_number

Tone = Literal["", "good", "bad", "quiet"]
#: Longest value of a setting on the page; config.json has the whole value.
LONGEST_VALUE = 400


@dataclass(frozen=True)
class Cell:
    """Cell of a table.

    Attributes:
        text: content.
        tone: colour; the text has the same meaning without it.
    """

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """Table whose first column names the rows.

    Attributes:
        caption: text above the table.
        columns: column heads.
        rows: rows of one cell per column.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class Note:
    """Paragraph.

    Attributes:
        text: content.
        tone: "bad" for a warning, "quiet" for missing content.
    """

    text: str
    tone: Tone = ""
    kind: Literal["note"] = "note"


@dataclass(frozen=True)
class Figure:
    """Picture between other blocks."""

    picture: Picture
    kind: Literal["figure"] = "figure"


@dataclass(frozen=True)
class Details:
    """Collapsible group of blocks.

    Attributes:
        title: text of the line that remains visible.
        blocks: content.
        is_open: whether the content is visible at first.
    """

    title: str
    blocks: Sequence[Block]
    is_open: bool = False
    kind: Literal["details"] = "details"


@dataclass(frozen=True)
class Definitions:
    """Terms with their definitions."""

    entries: Sequence[tuple[str, str]]
    kind: Literal["definitions"] = "definitions"


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, as the window allows."""

    pictures: Sequence[Picture]
    kind: Literal["gallery"] = "gallery"


Block = Table | Note | Figure | Gallery | Details | Definitions


@dataclass(frozen=True)
class Section:
    """Section of the page.

    Attributes:
        key: anchor in the page, a plain word.
        title: heading.
        summary: one sentence on the content.
        healthy: one sentence on the expected appearance; "" where there is none.
        blocks: content.
    """

    key: str
    title: str
    summary: str
    healthy: str = ""
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class Tile:
    """Key value at the top of a chapter.

    Attributes:
        title: name of the value.
        value: the value in large type.
        detail: line below it.
        tone: colour.
    """

    title: str
    value: str
    detail: str = ""
    tone: Tone = ""


@dataclass
class Chapter:
    """Chapter about one fold, or about the comparison.

    Attributes:
        key: anchor in the page, a plain word.
        title: heading.
        subtitle: line below the heading.
        tiles: key values.
        sections: sections.
    """

    key: str
    title: str
    subtitle: str = ""
    tiles: Sequence[Tile] = ()
    sections: list[Section] = field(default_factory=list)


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> Table:
    """Build a table from texts and cells."""
    return Table(caption, columns, [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows])


def pictures(
    folder: Path, files: Sequence[tuple[str, str, str]], most_width: int, wide: bool = False
) -> list[Block]:
    """Embed the picture files that exist; a broken file becomes a warning.

    Args:
        folder: folder of the files.
        files: name, alternative text and caption of each file.
        most_width: largest width in pixels, see `embed`.
        wide: whether to scroll in a narrow window, see `Picture`.
    """
    blocks: list[Block] = []
    for name, alt, caption in files:
        if (folder / name).is_file():
            try:
                blocks.append(Figure(embed(folder / name, alt, caption, most_width, wide)))
            except BrokenPicture as error:
                blocks.append(Note(str(error), "bad"))
    return blocks


def metric_text(value: float, low: float = math.nan, high: float = math.nan, digits: int = 3, sign: str = "") -> str:
    """Format a value with its interval as "0.812 [0.790, 0.834]", with non-breaking spaces.

    NaN becomes "none"; an interval with NaN is left out.
    """
    if math.isnan(value):
        return "none"
    numbers = [f"{one:{sign}.{digits}f}" for one in (value, low, high)]
    text = numbers[0] if math.isnan(low) or math.isnan(high) else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def interval_of(record: Mapping[str, Any], key: str, digits: int = 3, sign: str = "") -> str:
    """Format a value of a record with its ``low`` and ``high``, as `metric_text` does."""
    value, low, high = (as_number(record.get(name)) for name in (key, "low", "high"))
    return metric_text(value, low, high, digits, sign)


def setting_text(value: Any) -> str:
    """Format the value of a setting as JSON of at most `LONGEST_VALUE` characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} ..."


def duration(seconds: float) -> str:
    """Format a duration in its two largest units, as "2 h 05 min" or "3 min 20 s"."""
    if not math.isfinite(seconds):
        return "an unknown time"
    whole, units = round(seconds), (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (large, size), (small, part) in zip(units, units[1:]):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // part:02d} {small}"
    return f"{whole} s"


def attempt(build: Callable[[], Sequence[Block]], failure: str) -> Sequence[Block]:
    """Build blocks, or a warning with the reason where that fails."""
    with isolated() as errors:
        blocks = build()
    return [Note(f"{failure}: {reason(errors[0])}", "bad")] if errors else blocks
