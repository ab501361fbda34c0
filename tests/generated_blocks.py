"""Parts of documentation pages that are made by a command, between markers."""

from __future__ import annotations

import re
from collections.abc import Mapping


def with_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """A page with some of its generated parts made anew.

    Args:
        text: Markdown; a part called NAME lies between ``<!-- NAME: made by ... -->`` and ``<!-- end of NAME -->``.
        blocks: name -> Markdown.

    Raises:
        ValueError: the markers of a part are not there exactly once.
    """
    for name, content in blocks.items():
        block = re.compile(rf"(<!-- {name}: .*? -->\n\n).*?(\n\n<!-- end of {name} -->)", re.DOTALL)
        text, found = block.subn(lambda match, content=content: f"{match[1]}{content}{match[2]}", text)
        if found != 1:
            raise ValueError(f"found {found} parts marked '{name}', expected one")
    return text
