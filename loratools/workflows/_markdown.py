"""Text from files in Markdown and YAML: names may hold anything, and none of it may become markup, a marker or another key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_PLAIN = re.compile(r"[\w ./@:+=,{}()%~*-]+", re.ASCII)  # what a code span shows as it is
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[._/-]+[A-Za-z0-9]+)*")  # what YAML reads as a string without quotes …
_RESERVED = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}  # … unless it is one of these
_KEY = re.compile(r"(?:([^\s'\"#,&*!|>%@`?:\[\]{}-][^:#]*?)|'([^']*)'|\"([^\"\\]*)\")\s*:(?:\s|$)")


def printable(text: str) -> str:
    """The text with all that is no letter, sign or space spelt out, newlines and halves of surrogate pairs among them.

    >>> printable("a\\nb")
    'a\\\\nb'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def code(text: object) -> str:
    """A name as code, in a line or in a table's cell.

    >>> code("q_proj.weight"), code("a`|b")
    ('`q_proj.weight`', '<code>a&#96;&#124;b</code>')
    """
    shown = printable(str(text))
    if _PLAIN.fullmatch(shown) and shown.strip() == shown:
        return f"`{shown}`"
    return f"<code>{entities(shown)}</code>"


def entities(text: object) -> str:
    """The text as prose that means nothing: every sign that is no letter, digit or space as an entity.

    >>> entities("<!-- *x*")
    '&#60;&#33;-- &#42;x&#42;'
    """
    shown = printable(str(text))
    return "".join(letter if letter.isalnum() or letter in " ,.;:'%()/=-" else f"&#{ord(letter)};" for letter in shown)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table whose cells are escaped already."""
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def fenced(language: str, lines: Iterable[str]) -> list[str]:
    return [f"```{language}", *lines, "```"]


# -- YAML


def scalar(value: object) -> str:
    """A string as YAML reads it back, on one line.

    >>> scalar("apache-2.0"), scalar("no"), scalar("a: 1")
    ('apache-2.0', '"no"', '"a: 1"')
    """
    text = str(value)
    if _WORD.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in quoted)


def _escape(letter: str) -> str:
    point = ord(letter)
    if 0xD800 <= point < 0xE000:  # half a pair, as of a file's name that is no Unicode: YAML has no word for it
        point = 0xFFFD
    return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def entry(key: str, value: str | Sequence[str]) -> list[str]:
    """A key of front matter with its string, or its list of strings, one a line."""
    if isinstance(value, str):
        return [f"{key}: {scalar(value)}"]
    return [f"{key}:", *(f"- {scalar(one)}" for one in value)]


def merged(lines: Sequence[str], values: Mapping[str, str | Sequence[str]]) -> list[str]:
    """Lines of front matter with these keys in the place of their own, new ones at the end; all others stay as they are written.

    >>> merged(["# mine", "tags: [a]", "x: 1"], {"tags": ["a", "b"], "y": "2"})
    ['# mine', 'tags:', '- a', '- b', 'x: 1', 'y: "2"']
    """
    made: list[str] = []
    left, replaced = dict(values), False
    for line in lines:
        found = _KEY.match(line)
        if found is not None:
            key = next(one for one in found.groups() if one is not None)
            replaced = key in values
            if key in left:
                made += entry(key, left.pop(key))
        elif replaced and (not line.strip() or line.startswith("#")):
            replaced = False  # a comment, or a gap, belongs to what follows
        if not replaced:
            made.append(line)
    return made + [line for key, value in left.items() for line in entry(key, value)]


def top_keys(lines: Sequence[str]) -> list[Any]:
    """The keys that stand at the beginning of a line of their own."""
    return [next(one for one in found.groups() if one is not None) for line in lines if (found := _KEY.match(line))]
