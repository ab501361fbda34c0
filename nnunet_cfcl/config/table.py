"""Settings by key: the table of the documentation, and the part that decides a run's result."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any, get_args

from nnunet_cfcl.config.checks import Reader
from nnunet_cfcl.config.schema import Settings


def settings_keys() -> Iterator[tuple[str, Any, str]]:
    """(dotted key, default, meaning) of every setting, for tables and messages."""
    for top in fields(Settings):
        section = getattr(Settings(), top.name)
        if is_dataclass(section):
            for f in fields(section):
                yield f"{top.name}.{f.name}", getattr(section, f.name), f.metadata["meaning"]
        else:
            yield top.name, section, top.metadata["meaning"]


def settings_table() -> str:
    """All settings as a Markdown table, for the documentation and ``nnunet_cfcl settings``."""
    rows = [f"| `{key}` | `{json.dumps(default)}` | {meaning} |" for key, default, meaning in settings_keys()]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def identity_settings(settings: Settings, *readers: Reader) -> dict[str, Any]:
    """Select the settings that a run's result depends on; their digest decides whether a finished run is reused.

    Args:
        settings: all settings.
        readers: the parts of the run that read settings of their own.

    Raises:
        ValueError: an unknown reader, whose settings would silently not count.

    Returns:
        Nested, JSON-ready, in the order of the schema, without empty sections: settings declared with ``identity`` that
        every run or one of the readers reads.
    """
    if unknown := set(readers) - set(get_args(Reader)):
        raise ValueError(f"unknown readers of settings {sorted(unknown)}, expected some of {list(get_args(Reader))}")
    chosen = settings.to_dict()
    for top in fields(Settings):
        part = getattr(settings, top.name)
        if not _decides(top, readers):
            del chosen[top.name]
        elif is_dataclass(part):
            names = [f.name for f in fields(part) if _decides(f, readers)]
            chosen[top.name] = {name: chosen[top.name][name] for name in names}
    return {name: part for name, part in chosen.items() if part != {}}


def _decides(declared: Field[Any], readers: Collection[Reader]) -> bool:
    read_by = declared.metadata["read_by"]
    return declared.metadata["identity"] and (not read_by or any(reader in readers for reader in read_by))
