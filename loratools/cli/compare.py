"""loratools compare: two adapters as changes of the weights."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, say, say_json


@click.command()
@click.argument("a")
@click.argument("b")
@options.together(options.alpha_in, options.threads, options.as_json, options.quiet)
def command(a: str, b: str, as_json: bool, quiet: bool, **words: Any) -> None:
    """Compare two adapters, module by module.

    Cosine and distance are those of the changes of the weights, whatever ranks and factors stand for them. The overlaps are
    the mean squared cosines of the principal angles: of columns, what a module writes, and of rows, what it reads. --json has
    every angle. A module that one of the two lacks counts as no change.

    \b
      loratools compare first/ second/
    """
    from loratools.ops.compare import compare

    found = compare(a, b, **words)
    notes(found["notes"], quiet=quiet)
    if as_json:
        say_json(found)
        return
    from loratools.cli._algebra import compared
    from loratools.cli._table import width

    say(compared(found, width()))
