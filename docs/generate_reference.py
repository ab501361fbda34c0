"""Write what the reference pages take from the code between their markers: settings, trainers, commands, Python names.

    python docs/generate_reference.py

`make docs` runs it before it builds the pages; a test fails when a committed page differs from the code.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import pkgutil
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest.mock import patch

import nnunet_cfcl
from nnunet_cfcl.cli import VERBS, build_parser
from nnunet_cfcl.cli.trainers import trainer_table
from nnunet_cfcl.config import Settings
from nnunet_cfcl.files.atomic import write_text_atomically

PAGES = Path(__file__).resolve().parent / "reference"
#: Fixed width of help texts, independent of the terminal, and no colours.
FIXED = {"COLUMNS": "100", "NO_COLOR": "1"}
#: Order of the rooms on the Python page: the method first, then what surrounds it; unlisted rooms come last.
ROOMS = ("losses", "views", "counterfactual", "pretraining", "chromap", "evaluation", "trainers", "phases", "data",
         "nnunet", "runs", "config", "files", "errors", "phantom", "demo", "doctor")
#: Rooms without a section: the command line has a page of its own.
LEFT_OUT = ("cli", "pretrain")


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
    """Describe the accepted values of a setting: type or choices, inclusive range, null."""
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


def public_names() -> str:
    """A heading for every room with a public face, its description, and a line for every exported name."""
    return "\n\n".join(filter(None, map(_room_section, _rooms())))


def _rooms() -> list[str]:
    """Full names of the package's rooms, inner rooms after the room that holds them."""
    found = [one.name for one in pkgutil.walk_packages(nnunet_cfcl.__path__, "nnunet_cfcl.") if one.ispkg]
    inner = [name.split(".")[1:] for name in [*found, "nnunet_cfcl.errors"]]
    shown = [parts for parts in inner if parts[0] not in LEFT_OUT and not parts[0].startswith("_")]
    place = {name: number for number, name in enumerate(ROOMS)}
    return [".".join(["nnunet_cfcl", *parts])
            for parts in sorted(shown, key=lambda parts: (place.get(parts[0], len(ROOMS)), parts))]


def _room_section(name: str) -> str:
    room = importlib.import_module(name)
    names = getattr(room, "__all__", None)
    if names is None:
        names = [key for key, value in vars(room).items()
                 if getattr(value, "__module__", "") == name and not key.startswith("_")]
    if not names:
        return ""
    about = " ".join(_as_markdown(inspect.getdoc(room) or "").split("\n\n")[0].split())
    lines = [_entry(one, getattr(room, one)) for one in sorted(names, key=str.lower)]
    return "\n".join([f"### {name}", "", *([about, ""] if about else []), *lines])


def _entry(name: str, value: Any) -> str:
    if inspect.ismodule(value):
        shown = "module"
    elif inspect.isclass(value) or callable(value):
        shown = _signature(value)
    else:
        return f"- `{name}`"
    documentation = inspect.getdoc(value) or ""
    # a dataclass without a docstring is given its signature for one
    if documentation.startswith(f"{name}("):
        documentation = ""
    sentence = first_sentence(documentation)
    code = f"{name} (module)" if shown == "module" else f"{name}{shown}"
    return f"- `{code}`: {sentence}" if sentence else f"- `{code}`"


def first_sentence(documentation: str) -> str:
    """Return the first sentence of a docstring as one line of Markdown."""
    paragraph = " ".join(documentation.split("\n\n")[0].split())
    return _as_markdown(re.split(r"(?<=[.!?])(?<!\.\.)(?<!e\.g\.)(?<!i\.e\.)(?<!al\.) (?=[A-Z`])", paragraph)[0])


def _as_markdown(text: str) -> str:
    """Replace reStructuredText's roles and double backticks, and "<" outside of code, where it would begin a tag."""
    text = re.sub(r" \(method[^)]*\)", "", re.sub(r":\w+:`", "`", text.replace("``", "`")))
    parts = text.split("`")
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


def _signature(value: Any) -> str:
    """Parameters of a function or a class without annotations; empty where a class takes no call of its own."""
    if inspect.isclass(value) and (issubclass(value, BaseException) and "__init__" not in vars(value)
                                   or getattr(value, "_is_protocol", False)):
        return ""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return ""
    plain = [one.replace(annotation=one.empty, default=_shown_default(one.default)) for one in parameters]
    return str(inspect.Signature(plain))


class _Shown(str):
    """A text whose repr is itself, so that a signature shows it without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _shown_default(default: Any) -> Any:
    """Simple defaults as they are, others as "...": their repr may hold an address."""
    simple = default is inspect.Parameter.empty or default is None or isinstance(default, (bool, int, float, str))
    if simple or isinstance(default, tuple) and all(isinstance(one, (int, float, str)) for one in default):
        return default
    return _Shown("...")


#: page -> name of the marked block -> function that writes it
BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "settings.md": {"settings": settings_sections},
    "trainers.md": {"trainers": trainer_table},
    "command-line.md": {"commands": command_helps},
    "python.md": {"names": public_names},
}


def with_block(text: str, name: str, content: str) -> str:
    """Replace the content between the markers of a block.

    Raises:
        ValueError: the markers do not occur exactly once.
    """
    block = re.compile(rf"(<!-- {name}: .*? -->\n\n).*?(\n\n<!-- end of {name} -->)", re.DOTALL)
    text, found = block.subn(lambda match: f"{match[1]}{content}{match[2]}", text)
    if found != 1:
        raise ValueError(f"found {found} blocks marked '{name}', expected one")
    return text


def regenerated(page: Path) -> str:
    """Return the page's text with its blocks written from the code."""
    text = page.read_text(encoding="utf-8")
    for name, make in BLOCKS[page.name].items():
        text = with_block(text, name, make())
    return text


def main() -> None:
    """Update every page and print those that changed."""
    for name in BLOCKS:
        page = PAGES / name
        text = regenerated(page)
        if text != page.read_text(encoding="utf-8"):
            write_text_atomically(page, text)
            print(f"updated {page}")


if __name__ == "__main__":
    main()
