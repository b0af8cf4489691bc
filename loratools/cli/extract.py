"""loratools extract: an adapter from the difference of two checkpoints."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, progress, say, say_json


@click.command()
@click.argument("base")
@click.argument("tuned")
@options.out
@click.option("--rank", type=click.IntRange(1), metavar="N", help="The same rank for every module.")
@click.option("--energy", type=float, metavar="F", help="The least ranks that keep this share of the squared change, such as 0.95.")
@click.option("--max-error", type=float, metavar="F", help="The least ranks whose relative error is at most this, such as 0.1.")
@click.option("--size", metavar="SIZE", help="The least error that fits a file of this size, such as 40MB.")
@click.option("--alpha", type=float, metavar="A", help="Write this alpha for all modules, instead of alpha = rank.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only tensors that fit one of these; may be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No tensors that fit one of these; may be repeated.")
@click.option(
    "--rest", type=click.Choice(["save", "drop", "error"]), default="save", show_default=True,
    help="Changed tensors that have no low-rank form: save them whole, leave them out and say so, or stop.",
)  # fmt: skip
@options.together(options.embedding, options.transposed)
@click.option("--exact", is_flag=True, help="LAPACK's whole SVD in float64, instead of an iteration with a certificate.")
@click.option("--tolerance", type=float, default=1e-4, show_default=True, metavar="F", help="Stop this close to the best error.")
@options.together(options.dtype, options.device)
@click.option("--format", default="peft", show_default=True, metavar="F", help="The format to write.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the iteration's random start.")
@click.option("--plot", metavar="FILE", help="Draw the change, its spectra and error against size: .png, .svg or .pdf.")
@options.together(options.sha256, options.overwrite, options.threads, options.as_json, options.quiet)
def command(base: str, tuned: str, out: str, as_json: bool, quiet: bool, **words: Any) -> None:
    """Make an adapter from the difference of two checkpoints.

    Each changed matrix, convolution and embedding of TUNED becomes the best low-rank difference to BASE, with its error
    stated beside a lower bound of the best possible. Exactly one of --rank, --energy, --max-error and --size says how good.

    \b
    A rank for all:
      loratools extract base/ tuned/ -o adapter/ --rank 8
    The best that fits a file of 40 MB:
      loratools extract base/ tuned/ -o adapter/ --size 40MB
    What would other ranks have given?
      loratools extract base/ tuned/ -o adapter/ --rank 8 --plot ranks.png
    Attention only, to 5 % of each change:
      loratools extract base/ tuned/ -o adapter/ --max-error 0.05 --include '*self_attn*' --rest drop
    """
    options.exactly_one(words, "rank", "energy", "max_error", "size")
    from loratools.ops.extract import extract

    with progress("Extracting", quiet=quiet) as told:
        receipt = extract(base, tuned, out, progress=told, **words)
    notes(receipt["notes"], quiet=quiet)
    if as_json:
        say_json(receipt)
        return
    from loratools.cli._summary import extracted
    from loratools.cli._table import width

    say(extracted(receipt, out, width()))
