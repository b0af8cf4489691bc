"""What the group's table says of a command is what the command says of itself."""

from __future__ import annotations

import click
import pytest

from loratools.cli import COMMANDS, cli


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_list_is_the_first_of_the_commands_own_help(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None and command.help is not None
    assert command.help.splitlines()[0] == COMMANDS[name]


def test_a_name_that_is_no_command_is_none() -> None:
    assert cli.get_command(click.Context(cli), "_say") is None
    assert cli.list_commands(click.Context(cli)) == list(COMMANDS)
