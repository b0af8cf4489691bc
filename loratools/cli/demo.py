"""loratools demo: the whole way with a network small enough to train here."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, say, say_json


@click.command()
@click.option("--keep", metavar="DIR", help="Keep the checkpoints, adapters and merged models in this folder.")
@click.option("--quick", is_flag=True, help="Train less and try fewer ranks.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the training and the split of the images.")
@options.together(options.as_json, options.quiet)
def command(as_json: bool, quiet: bool, **words: Any) -> None:
    """Train, extract and merge a small network, and print what it cost.

    Offline and in under two minutes: a network learns to read handwritten digits, is fine-tuned on a changed task, and
    that fine-tune is extracted at several ranks and merged back. Every number is measured in this run.

    \b
      loratools demo
      loratools demo --keep demo/ && loratools inspect demo/rank-8 --base demo/base --spectra
    """
    from loratools.workflows.demo import demo

    result = demo(progress=lambda step: notes([step], quiet=quiet), **words)
    if as_json:
        say_json(result)
        return
    from loratools.cli._demonstrated import demonstrated
    from loratools.cli._table import width

    say(demonstrated(result, width()))
