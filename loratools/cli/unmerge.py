"""loratools unmerge: the base that a merge began with."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, say, say_json


@click.command()
@click.argument("merged")
@options.out
@click.option("--adapter", "adapters", multiple=True, metavar="ADAPTER", help="Where an adapter lies that was merged; may be repeated.")
@click.option("--approximate", is_flag=True, help="Where there is no record: subtract each --adapter ADAPTER[:STRENGTH].")
@options.together(options.overwrite, options.threads, options.as_json, options.quiet)
def command(merged: str, out: str, as_json: bool, quiet: bool, **words: Any) -> None:
    """Undo a merge, bit for bit.

    MERGED is what `merge --reversible` wrote, with its record beside it. OUT gets every byte of the base's weights, its
    config and its index, or nothing: a bit that changed since, in MERGED, its record or an adapter, is an error. Adapters
    are looked for where the merge read them; all that were merged at once come off at once.

    \b
    Merge so that it can be undone, and undo it:
      loratools merge model/ adapter/ -o merged/ --reversible
      loratools unmerge merged/ -o again/
    The adapter lies elsewhere by now:
      loratools unmerge merged/ -o again/ --adapter moved/
    No record: near the original, and how near is said:
      loratools unmerge merged/ -o near/ --approximate --adapter adapter/
    """
    from loratools.ops.unmerge import unmerge

    receipt = unmerge(merged, out, **words)
    notes(receipt["notes"], quiet=quiet)
    if as_json:
        say_json(receipt)
        return
    from loratools.cli._summary import unmerged
    from loratools.cli._table import width

    say(unmerged(receipt, out, width()))
