"""loratools convert: an adapter in another format, or as another kind."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, say, say_json


@click.command()
@click.argument("adapter")
@options.out
@options.format
@click.option(
    "--kind", type=click.Choice(["lora", "dora", "dense"]), metavar="K",
    help="What each change becomes: lora, dora, or dense, W' - W itself.",
)  # fmt: skip
@click.option(
    "--magnitude-axis", type=click.Choice(["in", "out"]), metavar="AXIS",
    help="DoRA's magnitudes: out, one for each output (peft), or in, one for each input.",
)  # fmt: skip
@click.option(
    "--layout", type=click.Choice(["diffusers", "original"]), metavar="L",
    help="Whose names the tensors of a diffusion network get: diffusers, or original, their authors'.",
)  # fmt: skip
@click.option("--network", metavar="NET", help="Which network it is of, where its names are those of several, such as flux, sd3 or wan.")
@click.option("--base", metavar="BASE", help="The checkpoint it belongs to, for names and for all that depends on the weights.")
@click.option("--rank", type=click.IntRange(1), metavar="N", help="No module gets a greater rank; the best factors of it.")
@click.option("--energy", type=float, metavar="F", help="The least ranks that keep this share of each squared change, such as 0.99.")
@click.option("--max-error", type=float, metavar="F", help="The least ranks whose relative error is at most this, such as 0.1.")
@options.together(options.dtype, options.device)
@click.option("--rename", multiple=True, metavar="OLD=NEW", help="Replace part of the adapter's names, whole components; may be repeated.")
@options.reading
@options.together(options.sha256, options.overwrite, options.threads, options.as_json, options.quiet)
def command(adapter: str, out: str, as_json: bool, quiet: bool, **words: Any) -> None:
    """Write an adapter in another format, or as another kind.

    A change of format alone keeps every tensor's bytes. Of kinds, LoHa, LoKr and their like become LoRA exactly where the rank
    allows; a DoRA, whose magnitudes scale the weight itself, is approximated, and its error stated beside the best at that
    rank. A DoRA is never written without its magnitudes' part. The format `loratools` can say every kind.

    Tensors of diffusion networks get the names that the format's readers look for, or those of --layout, by a table: no base is
    needed. Fused weights are cut and stacked exactly.

    \b
    Another format:
      loratools convert adapter/ -o adapter.safetensors --format loratools
    A DoRA for a reader that has only LoRA, and what that costs:
      loratools convert dora/ -o plain/ --kind lora --base model/ --rank 32
    A LoRA as a DoRA of the same weights:
      loratools convert adapter/ -o dora/ --kind dora --base model/
    A Flux LoRA of kohya's trainer, for diffusers:
      loratools convert flux.safetensors -o diffusers.safetensors --format diffusers
    A tutorial's DoRA, one magnitude for each input, as peft's:
      loratools convert tutorial.safetensors -o peft/ --alpha-in 8 --magnitude-axis out --base model/ --format peft
    """
    from loratools.ops.convert import convert

    receipt = convert(adapter, out, **words)
    notes(receipt["notes"], quiet=quiet)
    if as_json:
        say_json(receipt)
        return
    from loratools.cli._converted import converted
    from loratools.cli._table import width

    say(converted(receipt, out, width()))
