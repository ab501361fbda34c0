"""What the page is made of: sections of paragraphs, tables and pictures, as plain data that the template escapes."""

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

Mood = Literal["", "good", "bad", "quiet"]
#: A value of the settings is cut here; the file has all of it.
LONGEST_VALUE = 400


@dataclass(frozen=True)
class Cell:
    """A table's cell.

    Attributes:
        text: what it says.
        mood: how it is marked; the text says the same in words.
    """

    text: str
    mood: Mood = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        caption: above it.
        columns: heads.
        rows: as many cells each as there are columns.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class Note:
    """A paragraph.

    Attributes:
        text: what it says.
        mood: "bad": a warning; "quiet": something is not there.
    """

    text: str
    mood: Mood = ""
    kind: Literal["note"] = "note"


@dataclass(frozen=True)
class Figure:
    """A picture in the flow of the page."""

    picture: Picture
    kind: Literal["figure"] = "figure"


@dataclass(frozen=True)
class Fold:
    """What is folded away under a line.

    Attributes:
        title: of the line.
        blocks: what is below.
        is_open: whether it is shown at first.
    """

    title: str
    blocks: Sequence[Block]
    is_open: bool = False
    kind: Literal["fold"] = "fold"


@dataclass(frozen=True)
class Words:
    """Terms and what they mean."""

    entries: Sequence[tuple[str, str]]
    kind: Literal["words"] = "words"


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side where the window is wide enough."""

    pictures: Sequence[Picture]
    kind: Literal["gallery"] = "gallery"


Block = Table | Note | Figure | Gallery | Fold | Words


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        key: of its address in the page, a plain word.
        title: of its head.
        sees: what one sees in it, one sentence.
        healthy: what it looks like when all is well, one sentence; "" where there is no such thing.
        blocks: its content.
    """

    key: str
    title: str
    sees: str
    healthy: str = ""
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class Tile:
    """A figure that is seen at once: what it is of, the figure, a line about it."""

    title: str
    figure: str
    line: str = ""
    mood: Mood = ""


@dataclass
class Chapter:
    """All of one fold, or of the comparison.

    Attributes:
        key: see `Section`.
        title: its head.
        line: below it.
        tiles: figures that are seen at once.
        sections: its parts.
    """

    key: str
    title: str
    line: str = ""
    tiles: Sequence[Tile] = ()
    sections: list[Section] = field(default_factory=list)


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> Table:
    """A table of texts and cells."""
    return Table(caption, columns, [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows])


def pictures(
    folder: Path, files: Sequence[tuple[str, str, str]], most_width: int, wide: bool = False
) -> list[Block]:
    """Those of some files of a folder that are there; a broken one is named.

    Args:
        folder: where they lie.
        files: (name, what it shows, caption) of each.
        most_width: see `embed`.
        wide: see `Picture`.
    """
    blocks: list[Block] = []
    for name, alt, caption in files:
        if (folder / name).is_file():
            try:
                blocks.append(Figure(embed(folder / name, alt, caption, most_width, wide)))
            except BrokenPicture as error:
                blocks.append(Note(str(error), "bad"))
    return blocks


def figure_text(value: float, low: float = math.nan, high: float = math.nan, digits: int = 3, sign: str = "") -> str:
    """0.812 [0.790, 0.834], with spaces at which no line breaks; "none" where there is no figure, without brackets
    where there is no interval."""
    if math.isnan(value):
        return "none"
    numbers = [f"{one:{sign}.{digits}f}" for one in (value, low, high)]
    text = numbers[0] if math.isnan(low) or math.isnan(high) else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def interval_of(record: Mapping[str, Any], key: str, digits: int = 3, sign: str = "") -> str:
    """The figure of a record that has ``low`` and ``high``, as `figure_text`."""
    value, low, high = (as_number(record.get(name)) for name in (key, "low", "high"))
    return figure_text(value, low, high, digits, sign)


def value_text(value: Any) -> str:
    """A value of the settings as JSON, not too long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} ..."


def duration(seconds: float) -> str:
    """In the two largest units: "2 h 05 min", "3 min 20 s"; a log may hold times that are none."""
    if not math.isfinite(seconds):
        return "an unknown time"
    whole, units = round(seconds), (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (large, size), (small, part) in zip(units, units[1:]):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // part:02d} {small}"
    return f"{whole} s"


def attempt(work: Callable[[], Sequence[Block]], sorry: str) -> Sequence[Block]:
    """Blocks, or a sentence that says why there are none: a page is made all the same."""
    with isolated() as errors:
        blocks = work()
    return [Note(f"{sorry}: {reason(errors[0])}", "bad")] if errors else blocks
