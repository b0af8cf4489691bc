"""loratools combine: several adapters as one."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, progress, say, say_json


@click.command()
@click.argument("adapters", metavar="ADAPTER[:WEIGHT]...", nargs=-1, required=True)
@options.out
@click.option(
    "--method", default="sum", show_default=True, metavar="M",
    help="sum: Σ wᵢ·ΔWᵢ; ties, dare-linear, dare-ties, magnitude-prune or della: of pruned ΔWᵢ.",
)  # fmt: skip
@click.option("--base", metavar="BASE", help="The model they are for: DoRA is then summed, and names are checked.")
@click.option("--rank", type=click.IntRange(1), metavar="N", help="At most this rank; by default the rank that each sum has.")
@click.option("--energy", type=float, metavar="F", help="The least ranks that keep this share of each squared change, such as 0.99.")
@click.option("--max-error", type=float, metavar="F", help="The least ranks whose relative error is at most this, such as 0.1.")
@click.option("--density", type=float, metavar="F", help="The share of each ΔWᵢ that pruning leaves, such as 0.2.")
@click.option("--majority-sign", metavar="S", help="Whose sign wins: total, of the sum (the default), or frequency, of most.")
@click.option("--epsilon", type=float, metavar="F", help="della: chances from density - F to density + F; by default 0.15.")
@click.option("--seed", type=int, metavar="N", help="Of what dare and della draw; by default 0.")
@options.dtype
@options.reading
@options.together(options.format, options.sha256, options.overwrite, options.threads, options.as_json, options.quiet)
def command(adapters: tuple[str, ...], out: str, as_json: bool, quiet: bool, **words: Any) -> None:
    """Make one adapter of several.

    The changes of the weights are put together, not the factors: ranks, alphas, dtypes, kinds and modules may differ, and weights
    may be negative. A sum without --rank loses nothing but the rounding to float32; else, and for methods that prune, the error is
    stated beside the best possible.

    \b
    The sum of two, at their weights:
      loratools combine style/:0.7 subject/:0.5 -o both/
    What one adds to the other, at rank 16:
      loratools combine tuned/ style/:-1 -o rest/ --rank 16
    TIES of three, a fifth of each:
      loratools combine a/ b/ c/ -o one/ --method ties --density 0.2 --rank 32
    A DoRA and a LoRA as one LoRA:
      loratools combine dora/ style/ -o both/ --base base/ --rank 64
    """
    from loratools.errors import OptionError
    from loratools.ops._combine_options import checked

    try:
        checked(words)
    except OptionError as error:  # the synopsis says what goes with what, so it is wrong usage
        raise click.UsageError(str(error), click.get_current_context()) from None
    from loratools.ops.combine import combine

    with progress("Combining", quiet=quiet) as told:
        receipt = combine(adapters, out, progress=told, **words)
    notes(receipt["notes"], quiet=quiet)
    if as_json:
        say_json(receipt)
        return
    from loratools.cli._algebra import combined
    from loratools.cli._table import width

    say(combined(receipt, out, width()))
