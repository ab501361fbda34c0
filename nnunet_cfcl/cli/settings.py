"""The verb `nnunet_cfcl settings`: print every setting with its default and meaning."""

from __future__ import annotations

from typing import Any

from nnunet_cfcl.config import settings_table


def add_settings_parser(subparsers: Any) -> None:
    """Register the verb `settings`, which prints every setting with its default and meaning."""
    parser = subparsers.add_parser("settings", help="print every setting, its default and its meaning")
    parser.set_defaults(run=_print_settings)


def _print_settings(arguments: Any) -> int:
    print(settings_table())
    return 0
