"""loratools inspect: what an adapter or a checkpoint holds."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import progress, say, say_json


@click.command()
@click.argument("path")
@click.option("--base", metavar="BASE", help="A checkpoint: join names and shapes, show the share, and how far DoRA's magnitudes moved.")
@click.option("--values", is_flag=True, help="Read the data too, and warn of zero factors and non-finite values.")
@click.option("--spectra", is_flag=True, help="Singular values, rank and norm of each module, with --base its share too; implies --values.")
@click.option("--all", "each", is_flag=True, help="A row for each module, repeated layers not drawn together.")
@click.option("--plot", metavar="FILE", help="Draw changes, spectra and error against size: .png, .svg or .pdf; implies --spectra.")
@options.as_json
@options.reading
def command(path: str, each: bool, as_json: bool, **words: Any) -> None:
    """Show what an adapter or a checkpoint holds.

    PATH is a file or a folder. By default only headers are read, so a model of any size is told at once.

    \b
    What is in it, and is anything odd about it?
      loratools inspect adapter/
    Was it trained at all, and are its values sound?
      loratools inspect adapter/ --values
    Does it fit this model, and how large a share of it does it train?
      loratools inspect adapter/ --base model/
    How much of each weight does it change?
      loratools inspect adapter/ --base model/ --spectra
    How large, of what rank, and what would fewer bytes cost?
      loratools inspect adapter/ --base model/ --plot adapter.png
    As a program wants it:
      loratools inspect adapter/ --json
    """
    from loratools.ops.inspect import inspect
    from loratools.source import headers

    with headers(path):  # held while it is shown, so that nothing of a repository is fetched twice
        reads = words["base"] is not None and (words["spectra"] or words["plot"] is not None)
        with progress("Reading", quiet=not reads) as told:
            report = inspect(path, progress=told, **words)
        if as_json:
            say_json(report)
            return
        from loratools.cli._inspected import shown
        from loratools.cli._table import width

        say(shown(report, width(), each=each))
