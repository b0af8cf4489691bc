"""loratools combine: several adapters as one."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, say, say_json


@click.command()
@click.argument("adapters", metavar="ADAPTER[:WEIGHT]...", nargs=-1, required=True)
@options.out
@click.option("--method", default="sum", show_default=True, metavar="M", help="sum: Σ wᵢ·ΔWᵢ, exactly.")
@click.option("--rank", type=click.IntRange(1), metavar="N", help="At most this rank; by default the rank that each sum has.")
@options.together(options.dtype, options.alpha_in, options.format, options.sha256, options.overwrite, options.threads)
@options.together(options.as_json, options.quiet)
def command(adapters: tuple[str, ...], out: str, as_json: bool, quiet: bool, **words: Any) -> None:
    """Make one adapter of several.

    The changes of the weights are summed, not the factors: ranks, alphas, dtypes and modules may differ, and weights may be
    negative. Without --rank nothing is lost but the rounding to float32; with it the error is stated beside the best possible.

    \b
    The sum of two, at their weights:
      loratools combine style/:0.7 subject/:0.5 -o both/
    What one adds to the other, at rank 16:
      loratools combine tuned/ style/:-1 -o rest/ --rank 16
    """
    from loratools.ops.combine import combine

    receipt = combine(adapters, out, **words)
    notes(receipt["notes"], quiet=quiet)
    if as_json:
        say_json(receipt)
        return
    from loratools.cli._algebra import combined
    from loratools.cli._table import width

    say(combined(receipt, out, width()))
