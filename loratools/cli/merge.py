"""loratools merge: adapters into a checkpoint."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, progress, say, say_json


@click.command()
@click.argument("base")
@click.argument("adapters", metavar="ADAPTER[:STRENGTH]...", nargs=-1, required=True)
@options.out
@options.together(options.dtype, options.device)
@click.option("--untie", is_flag=True, help="Write a tied head as a tensor of its own where only one of the two changes.")
@click.option("--dequantize", is_flag=True, help="Merge onto a plain copy of a base in fp8 or in bitsandbytes' 4 bits.")
@click.option("--rename", multiple=True, metavar="OLD=NEW", help="Replace part of the adapters' names, whole components; may be repeated.")
@click.option("--allow-unmatched", is_flag=True, help="Leave out deltas whose weight the base lacks, and say so.")
@options.reading
@click.option("--full-report", is_flag=True, help="Measure what survived rounding on every weight, not on a sample.")
@click.option("--reversible", is_flag=True, help="Keep beside OUT what unmerge needs to give BASE back, bit for bit.")
@options.together(options.sha256, options.overwrite, options.threads, options.as_json, options.quiet)
def command(base: str, adapters: tuple[str, ...], out: str, as_json: bool, quiet: bool, **words: Any) -> None:
    """Merge adapters into a checkpoint.

    BASE is a checkpoint: a folder of safetensors or of torch's .bin, a diffusers pipeline, or one file of either kind; OUT is
    safetensors, with its names, order, shards and dtypes. Weights that no adapter changes keep their bytes, the others are
    computed wide and rounded at the end. An adapter that does not fit stops the merge before anything is written.

    \b
    One adapter:
      loratools merge model/ adapter/ -o merged/
    Two, the second at half its strength:
      loratools merge model/ adapter/ style/:0.5 -o merged/
    Its names lack a component that the base's have:
      loratools merge model/ adapter/ -o merged/ --rename model=language_model.model
    Trained with QLoRA, onto the 4-bit base it was trained on:
      loratools merge model-bnb-4bit/ adapter/ -o merged/ --dequantize
    """
    from loratools.ops.merge import merge

    with progress("Merging", quiet=quiet) as told:
        receipt = merge(base, adapters, out, progress=told, **words)
    notes(receipt["notes"], quiet=quiet)
    if as_json:
        say_json(receipt)
        return
    from loratools.cli._summary import merged
    from loratools.cli._table import width

    say(merged(receipt, out, width()))
