"""loratools resize: an adapter at other ranks."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, say, say_json


@click.command()
@click.argument("adapter")
@options.out
@click.option("--rank", type=click.IntRange(1), metavar="N", help="This rank for every module; a greater one adds zeros.")
@click.option("--energy", type=float, metavar="F", help="The least ranks that keep this share of each squared change, such as 0.99.")
@click.option("--max-error", type=float, metavar="F", help="The least ranks whose relative error is at most this, such as 0.1.")
@click.option("--size", metavar="SIZE", help="The least total error that fits a file of this size, such as 40MB.")
@options.reading
@options.together(options.dtype, options.format, options.sha256, options.overwrite, options.threads)
@options.together(options.as_json, options.quiet)
def command(adapter: str, out: str, as_json: bool, quiet: bool, **words: Any) -> None:
    """Give an adapter other ranks.

    Each module's B·A is truncated by its singular values, in float64 and without ever forming the matrix: no other factors of
    the rank are nearer. The error is that of the factors as stored, beside the best possible. Scalings stay, alpha follows.

    \b
    A rank for all:
      loratools resize adapter/ -o smaller/ --rank 16
    The best that fits a file of 40 MB:
      loratools resize adapter/ -o smaller/ --size 40MB
    """
    options.exactly_one(words, "rank", "energy", "max_error", "size")
    from loratools.ops.resize import resize

    receipt = resize(adapter, out, **words)
    notes(receipt["notes"], quiet=quiet)
    if as_json:
        say_json(receipt)
        return
    from loratools.cli._algebra import resized
    from loratools.cli._table import width

    say(resized(receipt, out, width()))
