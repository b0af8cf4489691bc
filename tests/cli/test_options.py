"""Each command is the function of the same name with the same words."""

from __future__ import annotations

import inspect

import click
import pytest

import loratools
from loratools.cli import COMMANDS, cli

SHOWING = {"as_json", "quiet", "each", "out", "help"}  # how a result is shown; OUT is the function's last positional word
POSITIONAL = {"inspect": ["path"], "extract": ["base", "tuned", "out"], "merge": ["base", "adapters", "out"], "demo": []}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_the_functions_keywords(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    parameters = inspect.signature(getattr(loratools, name)).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY} - {"progress"}
    options = [option for option in command.params if isinstance(option, click.Option)]
    assert {option.name for option in options} - SHOWING == keywords
    positional = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positional == POSITIONAL[name]
    assert [argument.name for argument in command.params if isinstance(argument, click.Argument)] == [
        word for word in positional if word != "out"
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_the_functions_own(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    least = {"inspect": ["a"], "extract": ["a", "b", "-o", "c"], "merge": ["a", "b", "-o", "c"], "demo": []}[name]
    given = command.make_context(name, least).params
    parameters = inspect.signature(getattr(loratools, name)).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert {word: given[word] for word in defaults if word != "progress"} == {
        word: defaults[word] for word in defaults if word != "progress"
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_is_spelt_as_its_word(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for option in command.params:
        if isinstance(option, click.Option) and option.name not in SHOWING:
            assert option.opts == [f"--{str(option.name).replace('_', '-')}"]
            assert option.help and option.help.endswith(".")
