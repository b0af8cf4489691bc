"""loratools compare: two adapters as changes of the weights."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, progress, say, say_json


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--base", metavar="BASE", help="The model they are for: adds the intruder dimensions of each.")
@click.option("--top-k", type=click.IntRange(1), metavar="N", help="The leading directions that are looked at; by default 10.")
@click.option("--epsilon", type=float, metavar="F", help="An intruder's largest cosine with the base's directions; by default 0.5.")
@click.option("--plot", metavar="FILE", help="Draw cosine and overlaps by layer and module: .png, .svg or .pdf.")
@options.reading
@options.together(options.threads, options.as_json, options.quiet)
def command(a: str, b: str, as_json: bool, quiet: bool, **words: Any) -> None:
    """Compare two adapters, module by module.

    Cosine and distance are those of the changes of the weights, whatever ranks and factors stand for them. The overlaps are
    the mean squared cosines of the principal angles: of columns, what a module writes, and of rows, what it reads. --json has
    every angle. A module that one of the two lacks counts as no change.

    With --base a change that is no difference, as DoRA's, is compared too, and each adapter's intruder dimensions are counted:
    leading singular directions of the changed weight that the base has nothing like. That takes two SVDs of every weight.

    \b
      loratools compare first/ second/
    With a picture, and what the base says:
      loratools compare first/ second/ --base base/ --plot both.png
    """
    from loratools.errors import OptionError
    from loratools.ops.compare import check, compare

    try:
        check(words)
    except OptionError as error:  # the synopsis says what goes with what, so it is wrong usage
        raise click.UsageError(str(error), click.get_current_context()) from None
    with progress("Comparing", quiet=quiet) as told:
        found = compare(a, b, progress=told, **words)
    notes(found["notes"], quiet=quiet)
    if as_json:
        say_json(found)
        return
    from loratools.cli._algebra import compared
    from loratools.cli._table import width

    say(compared(found, width()))
