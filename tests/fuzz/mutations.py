"""Files as crashes, editors, strangers and bad memory leave them, drawn from valid ones by hypothesis."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

#: What nobody expects where a text, a number, a list or an object should be.
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 0.5, 10**400, -(10**19), float("nan"), float("inf"), "", "x", "\0", "a\nb", "../../x", "/etc/x",
    "C:\\x", "\ud800", "\x1b[2J", "<script>", "9" * 5000, [], {}, [[]], {"": {}}, ["x", 1], {"format": 1})
#: Bytes that mean something to one format or another.
ODD_BYTES = (
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n", b"\r", b'"', b",", b"{", b"[" * 3000, b"NaN", b"1e999",
    b"-", b"\x80\x02c", b"PK\x03\x04", b"\x1f\x8b", b"\xed\xa0\x80", "\N{RIGHT-TO-LEFT OVERRIDE}".encode())
MOST_BYTES = 1 << 20


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """A few bytes flipped, cut out, put in, cut off, repeated or zeroed; or another encoding."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(("flip", "flip", "set", "cut", "insert", "truncate", "zero", "repeat")))
        length = draw(st.integers(1, 40))
        if kind == "flip" and content:
            content[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[start] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[start:start + length]
        elif kind == "insert":
            content[start:start] = draw(st.one_of(st.sampled_from(ODD_BYTES), st.binary(max_size=20)))
        elif kind == "truncate":
            del content[start:]
        elif kind == "zero":
            content[start:start + length] = bytes(len(content[start:start + length]))
        elif kind == "repeat":
            content[start:start] = content[start:start + length] * draw(st.integers(1, 30))
    return bytes(content[:MOST_BYTES])


@st.composite
def recoded(draw: st.DrawFn, valid: bytes) -> bytes:
    """A text in another encoding, with other line ends, a mark at its beginning or zeros at its end."""
    text = valid.decode("utf-8", errors="replace")
    change: Callable[[str], bytes] = draw(st.sampled_from((
        lambda one: one.encode("utf-16"), lambda one: one.encode("utf-8-sig"), lambda one: one.encode("utf-32-be"),
        lambda one: one.replace("\n", "\r\n").encode(), lambda one: one.replace("\n", "\r").encode(),
        lambda one: one.encode() + bytes(512), lambda one: ("\0" + one).encode(), lambda one: one.upper().encode(),
        lambda one: one.replace(",", ";").encode(), lambda one: ("é" + one).encode("latin-1", errors="replace"))))
    return change(text)


def _places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in nested objects and lists there is something."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(place for key, value in inner for place in _places(value, (*path, key)))]


@st.composite
def rewritten_json(draw: st.DrawFn, valid: bytes) -> bytes:
    """Valid JSON with odd values or keys in a few places, or with parts taken out."""
    content: Any = json.loads(valid)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(_places(content)))
        # a copy: what is put in may be changed in its turn
        value = copy.deepcopy(draw(st.one_of(
            st.sampled_from(ODD_VALUES), st.text(max_size=8), st.integers(), st.floats())))
        if not place:
            content = value if draw(st.booleans()) else {"x": content}
            continue
        *way, last = place
        parent = content
        for key in way:
            parent = parent[key]
        kind = draw(st.sampled_from(("replace", "replace", "remove", "rename")))
        if kind == "replace" or isinstance(parent, list):
            parent[last] = value
        elif kind == "remove":
            del parent[last]
        else:
            parent[str(value)] = parent.pop(last)
    return json.dumps(content).encode()


@st.composite
def repacked(draw: st.DrawFn, valid: bytes) -> bytes:
    """A zip archive with one part damaged, left out or renamed, whose checksums are right again; stored or compressed.
    """
    with zipfile.ZipFile(io.BytesIO(valid)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = draw(st.sampled_from(sorted(parts)))
    kind = draw(st.sampled_from(("damage", "damage", "damage", "remove", "rename", "compress")))
    if kind == "damage":
        parts[name] = draw(damaged(parts[name]))
    elif kind != "compress":
        content = parts.pop(name)
        parts |= {draw(st.sampled_from(("../x", "x", "", "/x"))): content} if kind == "rename" else {}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED if kind == "compress" else zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(zipfile.ZipInfo(name), content, archive.compression)
    return packed.getvalue()


def inputs(valid: bytes, kind: str) -> st.SearchStrategy[bytes]:
    """Files like a valid one, and some that are not.

    Args:
        valid: its bytes.
        kind: "json", "text", "zip" or "binary": which further mutations make sense.
    """
    further = {"json": [rewritten_json(valid), rewritten_json(valid), recoded(valid)], "text": [recoded(valid)],
               "zip": [repacked(valid)], "binary": []}[kind]
    return st.one_of(st.just(valid), st.binary(max_size=400), damaged(valid), damaged(valid), *further)
