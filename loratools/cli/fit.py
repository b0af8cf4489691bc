"""loratools fit: an adapter as a runtime takes it."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, say, say_json
from loratools.cli._target import target as target_option


@click.command()
@click.argument("adapter")
@options.out
@target_option
@click.option("--max-rank", type=click.IntRange(1), metavar="N", help="No module gets a greater rank; the best factors of it.")
@click.option("--base", metavar="BASE", help="The checkpoint it belongs to, for what only its weights tell: DoRA as LoRA, dotted names.")
@options.reading
@options.together(options.overwrite, options.as_json, options.quiet)
def command(adapter: str, out: str, target: str, as_json: bool, quiet: bool, **words: Any) -> None:
    """Write an adapter as a runtime takes it.

    The format that it loads; one scaling and one rank where it has one, by zeros, or with --max-rank by the best truncation; DoRA,
    LoHa and their like as LoRA. Saved modules and biases that it has no place for go into OUT.saved.safetensors, to be merged into
    the base. The error of every tensor is stated beside the best possible, and `loratools check` finds nothing in the output.

    \b
      loratools fit adapter/ -o served/ --for vllm --max-rank 16
    A DoRA for a runtime without DoRA:
      loratools fit dora/ -o served/ --for sglang --base model/ --max-rank 32
    For ComfyUI, as one file:
      loratools fit adapter/ -o adapter.safetensors --for comfyui
    """
    from loratools.workflows.fit import fit

    receipt = fit(adapter, out, target, **words)
    notes(receipt["notes"], quiet=quiet)
    if as_json:
        say_json(receipt)
        return
    from loratools.cli._fitted import fitted
    from loratools.cli._table import width

    say(fitted(receipt, out, width()))
