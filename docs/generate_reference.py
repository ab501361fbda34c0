"""Writes what the reference pages take from the code, between the pages' markers: settings, trainers, commands.

    python docs/generate_reference.py

`make docs` runs it before it builds the pages; a test says when what is committed is not what the code says.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest.mock import patch

from nnunet_cfcl.cli import VERBS, build_parser
from nnunet_cfcl.cli.trainers import trainer_table
from nnunet_cfcl.config import Settings
from nnunet_cfcl.files.atomic import write_text_atomically

PAGES = Path(__file__).resolve().parent / "reference"
#: The width of a help text, whatever the terminal; no colours either.
FIXED = {"COLUMNS": "100", "NO_COLOR": "1"}


def settings_sections() -> str:
    """A heading and a table for every section of the settings: key, meaning, default, accepted values."""
    groups = [(one.name, type(getattr(Settings(), one.name))) for one in fields(Settings)
              if is_dataclass(getattr(Settings(), one.name))]
    plain = [one for one in fields(Settings) if one.name not in dict(groups)]
    parts = [f"### General\n\n{_settings_table(Settings, plain)}"]
    for name, group in groups:
        # "(method section 3)" is a pointer for those who read the code
        about = re.sub(r" \(method[^)]*\)", "", group.__doc__ or "").replace("``", "`").strip()
        parts.append(f"### {name}\n\n{about}\n\n{_settings_table(group, fields(group), f'{name}.')}")
    return "\n\n".join(parts)


def _settings_table(group: Any, settings: Any, prefix: str = "") -> str:
    hints = get_type_hints(group)
    rows = [f"| `{prefix}{one.name}` | {one.metadata['meaning']} | `{json.dumps(one.default)}` | "
            f"{accepted(hints[one.name], one)} |" for one in settings]
    return "\n".join(["| setting | meaning | default | values |", "|---|---|---|---|", *rows])


def accepted(hint: Any, declared: Field[Any]) -> str:
    """In words, what a setting may be: type or choices, inclusive range, null."""
    low, high = declared.metadata["low"], declared.metadata["high"]
    if low is not None and high is not None:
        bounds = f", {low:g} to {high:g}"
    else:
        bounds = f", at least {low:g}" if low is not None else f", at most {high:g}" if high is not None else ""
    union = isinstance(hint, types.UnionType)
    kinds = [_kind(one) for one in (get_args(hint) if union else [hint]) if one is not types.NoneType]
    return f"{', or '.join(kinds)}{bounds}{', or null' if union and types.NoneType in get_args(hint) else ''}"


def _kind(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{json.dumps(one)}`" for one in arguments)
    if origin is tuple:
        return f"list of {_kind(arguments[0])}s" if Ellipsis in arguments else "[low, high]"
    return {bool: "true or false", int: "integer", float: "number", str: "text"}[hint]


def command_helps() -> str:
    """A heading and the help of every verb, of its parts, and of the module that torchrun starts."""
    with patch.dict(os.environ, FIXED):
        parts = [f"### {title}\n\n```text\n{parser.format_help().rstrip()}\n```" for title, parser in _parsers()]
    return "\n\n".join(parts)


def _parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield "nnunet_cfcl", build_parser()
    for verb in VERBS:
        yield from _with_parts(f"nnunet_cfcl {verb}", _subparsers(build_parser(verb))[verb])
    # looked up by name: it registers nothing and is no verb
    yield "python -m nnunet_cfcl.pretrain", importlib.import_module("nnunet_cfcl.cli.pretrain")._parser()


def _with_parts(title: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield title, parser
    for name, part in _subparsers(parser).items():
        yield from _with_parts(f"{title} {name}", part)


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return {name: part for action in parser._actions if isinstance(action, argparse._SubParsersAction)
            for name, part in action.choices.items()}


#: page -> name of the marked block -> what makes it
BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "settings.md": {"settings": settings_sections},
    "trainers.md": {"trainers": trainer_table},
    "command-line.md": {"commands": command_helps},
}


def with_block(text: str, name: str, content: str) -> str:
    """The text with other content between the markers of that name.

    Raises:
        ValueError: the markers are not there exactly once.
    """
    block = re.compile(rf"(<!-- {name}: .*? -->\n\n).*?(\n\n<!-- end of {name} -->)", re.DOTALL)
    text, found = block.subn(lambda match: f"{match[1]}{content}{match[2]}", text)
    if found != 1:
        raise ValueError(f"found {found} blocks marked '{name}', expected one")
    return text


def regenerated(page: Path) -> str:
    """The page's text with its blocks as the code makes them now."""
    text = page.read_text(encoding="utf-8")
    for name, make in BLOCKS[page.name].items():
        text = with_block(text, name, make())
    return text


def main() -> None:
    """Bring every page up to date; says which were not."""
    for name in BLOCKS:
        page = PAGES / name
        text = regenerated(page)
        if text != page.read_text(encoding="utf-8"):
            write_text_atomically(page, text)
            print(f"brought up to date: {page}")


if __name__ == "__main__":
    main()
