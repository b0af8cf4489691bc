"""A click group that knows its commands by name and imports the one that is called."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """Commands by `table` (name to one line of help); each is the attribute `command` of the module of its name."""

    def __init__(self, *args: Any, commands_in: str = "", table: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.package, self.table = commands_in, dict(table or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        command = importlib.import_module(f"{self.package}.{cmd_name}").command
        assert isinstance(command, click.Command)
        # a command keeps the help option of the first context it meets: let every context name the same one
        command.context_settings.setdefault("help_option_names", self.context_settings.get("help_option_names", ["--help"]))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.table.items()))
