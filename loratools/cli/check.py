"""loratools check: what a runtime would refuse, ignore or mis-scale of an adapter."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, say, say_json
from loratools.cli._target import target as target_option


@click.command()
@click.argument("adapter")
@target_option
@click.option("--base", metavar="BASE", help="The checkpoint it belongs to, which tells how large a DoRA or a saved tensor is.")
@options.reading
@options.together(options.as_json, options.quiet)
def command(adapter: str, target: str, base: str | None, as_json: bool, quiet: bool, **words: Any) -> int:
    """Say what a runtime would refuse, ignore or mis-scale of an adapter.

    Each finding has its share of the adapter's ‖ΔW‖² and the source that the rule was read from. Exit code 0 where the runtime
    takes all of it, 1 where anything would be lost.

    \b
      loratools check adapter/ --for vllm
    With the base, DoRA and saved tensors are weighed too:
      loratools check adapter/ --for llama.cpp --base model/
    """
    from loratools.workflows.check import check

    found = check(adapter, target, base=base, **words)
    notes(found["notes"], quiet=quiet)
    if as_json:
        say_json(found)
    else:
        from loratools.cli._checked import checked
        from loratools.cli._table import width

        say(checked(found, width(), base=base))
    return 0 if found["clean"] else 1
