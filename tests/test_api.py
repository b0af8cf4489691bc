"""spec/api.md: the Python API. Every command has a function of its words, with its defaults; the page is written from them.

python tests/test_api.py     writes it anew
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import loratools
from loratools.cli import COMMANDS, cli

DOCUMENT = Path(__file__).parents[1] / "spec" / "api.md"
BEGIN, END = "<!-- functions: written by tests/test_api.py -->\n", "<!-- end of functions -->\n"
# words of the command line alone, and of Python alone: how a result is shown, and who is told of progress
SHOWN, TOLD = {"as_json", "quiet", "help", "each", "tensors"}, {"progress"}
CLASSES, OTHERS = ("Adapter", "Checkpoint", "LoratoolsError"), ("load", "save")


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def function(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(loratools, name)
    return found


def words(name: str) -> dict[str, click.Parameter]:
    return {str(word.name): word for word in command(name).params if word.name not in SHOWN}


def given(name: str) -> dict[str, Any]:
    """What the function is called with where the command is given no more than it needs."""
    made, needed = command(name), []
    for word in made.params:
        if isinstance(word, click.Argument):
            needed.append("x")
        elif word.required:
            needed += [word.opts[0], word.type.choices[0] if isinstance(word.type, click.Choice) else "x"]
    return made.make_context(name, needed).params


# -- each function's signature is its command's


@pytest.mark.parametrize("name", COMMANDS)
def test_a_function_takes_the_words_of_its_command(name: str) -> None:
    taken = set(inspect.signature(function(name)).parameters) - TOLD
    assert taken == set(words(name))


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_come_first_and_options_are_keywords_with_the_same_defaults(name: str) -> None:
    told, defaults = inspect.signature(function(name)).parameters, given(name)
    for word, parameter in told.items():
        if word in TOLD:
            continue
        option = words(name)[word]
        needed = isinstance(option, click.Argument) or option.required
        assert (parameter.kind is parameter.KEYWORD_ONLY) != needed, word
        if not needed:
            assert parameter.default == defaults[word], word


def test_every_public_name_is_told_of_and_has_a_docstring() -> None:
    public = {name for name in loratools.__all__ if not name.startswith("__")}
    assert public == {*COMMANDS, *CLASSES, *OTHERS}
    for name in public:
        assert inspect.getdoc(getattr(loratools, name)), name


# -- the page


def annotation(note: Any) -> str:
    text = note if isinstance(note, str) else getattr(note, "__forward_arg__", None) or inspect.formatannotation(note)
    return re.sub(r"(?:[a-z_]+[.])+([A-Z])", r"\1", text)


def signature(name: str) -> str:
    """As Python code, one word a line where it is long; annotations stay short of their modules."""
    told = inspect.signature(function(name))
    lines, star = [], False
    for word in told.parameters.values():
        if word.kind is word.KEYWORD_ONLY and not star:
            lines, star = [*lines, "*"], True
        default = "" if word.default is word.empty else f" = {word.default!r}"
        lines.append(f"{word.name}: {annotation(word.annotation)}{default}")
    result = annotation(told.return_annotation)
    short = f"loratools.{name}({', '.join(lines)}) -> {result}"
    return short if len(short) <= 100 else f"loratools.{name}(\n" + "".join(f"    {line},\n" for line in lines) + f") -> {result}"


def page() -> str:
    parts = []
    for name in (*COMMANDS, *OTHERS):
        text = [f"## {name}", f"```python\n{signature(name)}\n```", inspect.getdoc(function(name)) or ""]
        parts.append("\n\n".join(text))
    return "\n" + "\n\n".join(parts) + "\n\n"


def written() -> str:
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + page() + END + after


def test_the_page_is_what_the_functions_say() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert BEGIN in text and END in text
    assert text == written(), "python tests/test_api.py writes spec/api.md anew"


if __name__ == "__main__":
    DOCUMENT.write_text(written(), encoding="utf-8")
    sys.exit(0)
