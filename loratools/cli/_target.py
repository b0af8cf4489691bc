"""The option that names a runtime: the targets are those whose rules there are."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli._options import Option
from loratools.workflows.targets import names

target: Option[Any] = click.option(
    "--for", "target", required=True, type=click.Choice(names()), metavar="TARGET", help=f"The runtime: {', '.join(names())}."
)
