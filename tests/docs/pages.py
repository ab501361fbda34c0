"""What the pages hold that can be checked: shell commands, code in other languages, inline code, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

SHELLS = ("bash", "sh")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)")
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")
PROGRAM = re.compile(r"(nnunet_cfcl|nnUNetv2_\w+|make|python|torchrun)$")
#: Words before a program that are none of its own.
BEFORE = ("export", "srun", "env")


@dataclass(frozen=True)
class Block:
    """Code of a page: language ("" where it is indented, not fenced), number of its first line, text."""

    language: str
    line: int
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        where: page and line.
        words: program and arguments, as a shell splits them.
    """

    where: str
    words: tuple[str, ...]


def blocks(text: str) -> Iterator[Block]:
    """Fenced and indented code, from top to bottom."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        fence = FENCE.match(lines[at])
        start = at
        if fence:
            at += 1
            while not lines[at].strip().startswith("```"):
                at += 1
            inside = [line[len(fence["indent"]):] for line in lines[start + 1:at]]
            yield Block(fence["language"] or "text", start + 2, "\n".join(inside))
        elif lines[at].startswith("    "):
            while at + 1 < len(lines) and lines[at + 1].startswith("    ") and not FENCE.match(lines[at + 1]):
                at += 1
            yield Block("", start + 1, "\n".join(line[4:] for line in lines[start:at + 1]))
        at += 1


def commands(page: Path) -> list[Command]:
    """Commands of a page's shell blocks and, where they begin with a program of ours or nnU-Net's, indented blocks."""
    found = []
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language in (*SHELLS, ""):
            for number, line in _logical_lines(block):
                where = f"{page.relative_to(ROOT)}, line {number}"
                found += [Command(where, words) for words in _commands_of(line)]
    return found


def _logical_lines(block: Block) -> Iterator[tuple[int, str]]:
    """Lines with those that a backslash continues, and their numbers."""
    begun, number = "", block.line
    for at, line in enumerate(block.text.splitlines(), block.line):
        number = number if begun else at
        begun += line.rstrip().removesuffix("\\")
        if not line.rstrip().endswith("\\"):
            yield number, begun
            begun = ""


def _commands_of(line: str) -> Iterator[tuple[str, ...]]:
    for inner in SUBSTITUTION.findall(line):
        yield from _commands_of(inner)
    try:
        words = shlex.split(SUBSTITUTION.sub("SUBSTITUTED", line), comments=True)
    except ValueError:  # an apostrophe: words, not a command
        return
    while words and (words[0] in BEFORE or ASSIGNMENT.match(words[0])):
        words = words[1:]
    if words and PROGRAM.match(words[0]):
        yield tuple(words[:-1] if words[-1] == "&" else words)


def inline_code(page: Path) -> list[str]:
    """Code within sentences and tables, in which a line may end."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures that lead to files or headings here."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as code hosts and MkDocs make them of plain words."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
