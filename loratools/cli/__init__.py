"""The command line: `loratools COMMAND …`. Every command is the function of the same name with the same words.

Commands are loaded when they are called: `--help` imports click and nothing else. Here is the one place where an error
becomes a line and an exit code: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from loratools import __version__
from loratools.cli._lazy import LazyGroup
from loratools.cli._say import download
from loratools.cli._signals import stop_on_signals
from loratools.errors import Faults, LoratoolsError, UsageError
from loratools.source.handles import name_of
from loratools.source.watch import watching

# what `loratools --help` says of each command; its module has its name
COMMANDS = {
    "inspect": "Show what an adapter or a checkpoint holds.",
    "extract": "Make an adapter from the difference of two checkpoints.",
    "merge": "Merge adapters into a checkpoint.",
    "unmerge": "Undo a merge, bit for bit.",
    "convert": "Write an adapter in another format, or as another kind.",
    "rescale": "Change an adapter's alpha, strength or rsLoRA flag.",
    "resize": "Give an adapter other ranks.",
    "combine": "Make one adapter of several.",
    "compare": "Compare two adapters, module by module.",
    "check": "Say what a runtime would refuse, ignore or mis-scale of an adapter.",
    "fit": "Write an adapter as a runtime takes it.",
    "report": "Write a page about adapters, to look at and to send.",
    "verify": "Check an output against its receipt, and against the merge itself.",
    "push": "Publish an adapter or a merge on the Hub, with a model card.",
    "demo": "Train, extract and merge a small network, and print what it cost.",
}
SHOWN = 10  # faults told one by one; the others are counted


@click.group(cls=LazyGroup, commands_in="loratools.cli", table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="loratools", message="%(prog)s %(version)s")
def cli() -> None:
    """Merge, extract and inspect adapter weights: LoRA, DoRA and their kin.

    Base first, then what changes it, then -o OUT. An output appears whole or not at all, with a receipt of what was done
    to each tensor beside it (loratools.json).

    \b
      loratools inspect adapter/
      loratools extract base/ tuned/ -o adapter/ --rank 8
      loratools merge   base/ adapter/ -o merged/
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line (`sys.argv` without its first word if none is given) and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ‖ΔW‖ in its character set still gets the numbers
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, having told every error on stderr."""
    try:
        with stop_on_signals(), watching(download):
            code = cli.main(list(arguments) if arguments is not None else None, prog_name="loratools", standalone_mode=False)
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted", err=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit has somewhere to go
        return 1
    except Exception as error:
        lines = told(error)
        if lines is None:
            raise
        for line in lines:
            click.echo(f"Error: {line}", err=True)
        return 2 if isinstance(error, UsageError) else 1


def told(error: Exception) -> list[str] | None:
    """One line a fault, at most ten and a count; None for an exception that is a bug and shall show its traceback."""
    if isinstance(error, LoratoolsError):
        faults = error.errors if isinstance(error, Faults) else (error,)
        lines = [str(fault) for fault in faults]
        more = len(lines) - SHOWN
        return lines[:SHOWN] + ([f"… and {more} more faults"] if more > 0 else [])
    if isinstance(error, OSError):
        return [f"{name_of(error.filename)}: {error.strerror}" if error.filename else error.strerror or str(error)]
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # the latter is torch's RuntimeError
        return ["out of memory; fewer --threads need less"]
    if type(error).__name__ == "OutOfMemoryError":  # torch's own, which naming by import would cost a second
        return ["out of memory on the device; --device cpu needs none of it"]
    return None
