"""loratools rescale: another alpha, strength or rsLoRA flag."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, say, say_json


@click.command()
@click.argument("adapter")
@options.out
@click.option("--alpha", type=float, metavar="A", help="This alpha for every module; B takes the factor, so that ΔW stays.")
@click.option("--by", type=float, metavar="F", help="ΔW times F; the factors keep their bytes, alpha moves.")
@click.option("--rslora/--no-rslora", default=None, help="Set or clear rsLoRA (alpha / √r); without --by ΔW stays.")
@click.option("--bake", is_flag=True, help="alpha = r everywhere, no rsLoRA, no patterns: the scaling goes into B.")
@options.reading
@options.together(options.format, options.sha256, options.overwrite, options.as_json, options.quiet)
def command(adapter: str, out: str, as_json: bool, quiet: bool, **words: Any) -> None:
    """Change an adapter's alpha, strength or rsLoRA flag.

    ΔW = scaling · B·A, with scaling = alpha / r, or alpha / √r for rsLoRA. Powers of two go into B exactly; other factors are
    rounded once, and what that costs is stated. A DoRA's magnitudes are untouched, and its strength needs the base: merge
    takes one.

    \b
    The same function for a reader that takes alpha to be the rank:
      loratools rescale adapter/ -o baked/ --bake
    Half the strength:
      loratools rescale adapter/ -o weaker/ --by 0.5
    """
    ways = ("--alpha", words["alpha"] is not None), ("--by", words["by"] is not None), ("--bake", words["bake"])
    chosen = [way for way, given in ways if given]
    if len(chosen) > 1 or not (chosen or words["rslora"] is not None):  # as Rescaling has it, told as wrong usage
        told = "one of --alpha, --by, --bake, --rslora, --no-rslora is needed"
        raise click.UsageError(f"{told}: found {' and '.join(chosen) or 'none'}", click.get_current_context())
    from loratools.ops.rescale import rescale

    receipt = rescale(adapter, out, **words)
    notes(receipt["notes"], quiet=quiet)
    if as_json:
        say_json(receipt)
        return
    from loratools.cli._algebra import rescaled
    from loratools.cli._table import width

    say(rescaled(receipt, out, width()))
