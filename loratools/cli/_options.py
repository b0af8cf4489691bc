"""Options that several commands share, each written once, so that a word means the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
Option = Callable[[F], F]

out: Option[Any] = click.option("-o", "--out", required=True, metavar="OUT", help="Where the output goes; it must not exist yet.")
overwrite: Option[Any] = click.option("--overwrite", is_flag=True, help="Replace what is at OUT.")
as_json: Option[Any] = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the summary.")
quiet: Option[Any] = click.option("-q", "--quiet", is_flag=True, help="No notes and no progress; errors all the same.")
dtype: Option[Any] = click.option("--dtype", metavar="D", help="float64, float32, float16 or bfloat16 (or F64, F32, F16, BF16).")
device: Option[Any] = click.option("--device", default="cpu", show_default=True, metavar="D", help="cpu, cuda or cuda:N.")
threads: Option[Any] = click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="Tensors worked on at once; by default one a core, at most 8."
)
sha256: Option[Any] = click.option("--sha256", is_flag=True, help="Add the files' SHA-256 to the receipt.")
embedding: Option[Any] = click.option("--embedding", multiple=True, metavar="GLOB", help="Tensors that are embeddings; may be repeated.")
transposed: Option[Any] = click.option(
    "--transposed", multiple=True, metavar="GLOB", help="Weights stored (in, out), as GPT-2's; may be repeated."
)
from_format: Option[Any] = click.option("--from", "from_format", metavar="F", help="The format an adapter is in, where several claim it.")
alpha_in: Option[Any] = click.option("--alpha-in", type=float, metavar="A", help="The adapter's alpha, where its config lacks it.")

format: Option[Any] = click.option("--format", metavar="F", help="The format to write; by default the one that was read.")


scale: Option[Any] = click.option("--scale", metavar="WORD", help="What multiplies B·A in a tutorial's file: alpha or alpha/r.")
scratch_dora: Option[Any] = click.option(
    "--scratch-dora", metavar="WORD", help="Which DoRA a tutorial's square layers are: merged or output."
)
enable_lora: Option[Any] = click.option(
    "--enable-lora", metavar="1,0,1", help="Adapted slots of loralib's MergedLinear, or litgpt's q, k, v."
)
conv: Option[Any] = click.option(
    "--conv", multiple=True, metavar="GLOB=K", help="loralib's convolutions and their kernel; may be repeated."
)
initial: Option[Any] = click.option(
    "--initial", metavar="ADAPTER", help="The adapter as it was initialised, for PiSSA and others that changed the base."
)


def together(*options: Option[Any]) -> Option[Any]:
    """Several options as one decorator, in the order they shall stand in the help."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def exactly_one(words: Mapping[str, Any], *names: str) -> None:
    """Wrong usage unless exactly one of these options is given: the synopsis asks for one, as it asks for arguments."""
    given = [f"--{name.replace('_', '-')}" for name in names if words[name] is not None]
    if len(given) != 1:
        choice = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise click.UsageError(f"exactly one of {choice} is needed: found {' and '.join(given) or 'none'}", click.get_current_context())


# what tells of an adapter's file what it leaves open
reading = together(from_format, alpha_in, scale, scratch_dora, enable_lora, conv, transposed, embedding, initial)
