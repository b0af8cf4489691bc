"""loratools report: adapters as one page to look at and to send."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, progress, say


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="PATH…")
@options.out
@click.option("--base", metavar="BASE", help="The model they are for: tells changes as shares of its weights, which are read.")
@options.reading
@options.together(options.threads, options.overwrite, options.quiet)
def command(adapters: tuple[str, ...], out: str, quiet: bool, **words: Any) -> None:
    """Write a page about adapters, to look at and to send.

    It is one HTML file that loads nothing, and has what each holds, a map and a table of its modules, their singular values, what
    check finds, its receipts, and of several adapters every two compared. Paths are in it as they are given, and those in receipts.

    \b
      loratools report adapter/ -o report.html
      loratools report first/ second/ --base model/ -o both.html
    """
    from loratools.workflows.report import report

    with progress("Measuring", quiet=quiet) as told:
        found = report(adapters, out, progress=told, **words)
    notes(dict.fromkeys(note for one in found["adapters"] for note in one["notes"]), quiet=quiet)
    say([f"{out}: {len(found['names'])} modules of {', '.join(one['label'] for one in found['adapters'])}"])
