"""loratools push: an adapter or a merge on the Hub, with its receipt and a card."""

from __future__ import annotations

import sys
from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli._say import notes, say, say_json


@click.command()
@click.argument("path")
@click.argument("repo", metavar="USER/REPO")
@click.option("--private", is_flag=True, help="Create the repository as a private one.")
@click.option("--message", metavar="TEXT", help="Of the commit.")
@click.option("--base-model", metavar="ID", help="The base's id on the Hub, where the files name none or a local path.")
@click.option("--dry-run", is_flag=True, help="Tell what would go up and what would stay, and send nothing.")
@options.reading
@options.together(options.as_json, options.quiet)
def command(path: str, repo: str, as_json: bool, quiet: bool, **words: Any) -> None:
    """Publish an adapter or a merge on the Hub, with a model card.

    Weights, config, receipt and a card go up in one commit; whatever else the folder holds stays, and is listed. The card tells what
    it is, how it is loaded, how it was made and what its limits are; prose and keys that a README.md has already are kept. Who may
    write is told by huggingface_hub: `hf auth login` or HF_TOKEN.

    \b
    What would go up?
      loratools push adapter/ user/style --base-model user/model --dry-run
    A private repository:
      loratools push adapter/ user/style --private
    """
    from loratools.workflows.push import push

    done = push(path, repo, progress=not quiet and sys.stderr.isatty(), **words)
    notes(done["notes"], quiet=quiet)
    if as_json:
        say_json(done)
        return
    from loratools.cli._pushed import pushed
    from loratools.cli._table import width

    say(pushed(done, width()))
