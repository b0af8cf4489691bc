"""Each command is the function of the same name with the same words."""

from __future__ import annotations

import inspect

import click
import pytest

import loratools
from loratools.cli import COMMANDS, cli

SPELT = {"from_format": "--from", "target": "--for"}  # words of the command line that are words of Python's language
SHOWING = {"as_json", "quiet", "each", "out", "help"}  # how a result is shown; OUT is the function's last positional word


def parameters(name: str) -> list[inspect.Parameter]:
    return list(inspect.signature(getattr(loratools, name)).parameters.values())


def found(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def options(name: str) -> list[click.Option]:
    return [option for option in found(name).params if isinstance(option, click.Option) and option.name not in SHOWING]


def needed(name: str) -> list[click.Option]:
    """Options that must be given: the function's last positional words."""
    return [option for option in options(name) if option.required]


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_the_functions_keywords(name: str) -> None:
    keywords = {word.name for word in parameters(name) if word.kind is word.KEYWORD_ONLY} - {"progress"}
    assert {option.name for option in options(name)} - {option.name for option in needed(name)} == keywords


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_are_the_functions_positional_words(name: str) -> None:
    words = [word.name for word in parameters(name) if word.kind is word.POSITIONAL_OR_KEYWORD]
    arguments = [argument.name for argument in found(name).params if isinstance(argument, click.Argument)]
    has_out = any(option.name == "out" for option in found(name).params)
    assert words == arguments + ["out"] * has_out + [option.name for option in needed(name)]


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_the_functions_own(name: str) -> None:
    command = found(name)
    least = ["x" for argument in command.params if isinstance(argument, click.Argument)]
    least += ["-o", "y"] if any(option.name == "out" for option in command.params) else []
    least += [word for option in needed(name) for word in (option.opts[0], next(iter(getattr(option.type, "choices", ["z"]))))]
    given = command.make_context(name, least).params
    defaults = {word.name: word.default for word in parameters(name) if word.kind is word.KEYWORD_ONLY and word.name != "progress"}
    assert {word: given[word] for word in defaults} == defaults


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_is_spelt_as_its_word(name: str) -> None:
    for option in options(name):
        word = str(option.name).replace("_", "-")
        # one that is given several times is a list in Python, and may have a list's name
        assert option.opts in ([SPELT.get(str(option.name), f"--{word}")], [f"--{word.removesuffix('s')}"] if option.multiple else [])
        assert option.help and option.help.endswith(".")
