"""spec/cli.md holds the help of every command as the program prints it.

python tests/cli/test_spec.py     writes it anew
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from loratools.cli import COMMANDS, cli

DOCUMENT = Path(__file__).parents[2] / "spec" / "cli.md"
BEGIN, END = "<!-- help: written by tests/cli/test_spec.py -->\n", "<!-- end of help -->\n"
WIDTH = 100


def helps() -> str:
    """The help of the program and of each command, as Markdown."""
    parts = [("loratools", cli), *((f"loratools {name}", cli.get_command(click.Context(cli), name)) for name in COMMANDS)]
    texts = []
    for name, command in parts:
        assert command is not None
        context = click.Context(command, info_name=name, terminal_width=WIDTH, help_option_names=["-h", "--help"])
        texts.append(f"## {name}\n\n```text\n{command.get_help(context).rstrip()}\n```\n")
    return "\n" + "\n".join(texts) + "\n"


def written() -> str:
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + helps() + END + after


def test_the_document_is_what_the_program_says() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert BEGIN in text and END in text
    assert text == written(), "python tests/cli/test_spec.py writes spec/cli.md anew"


def test_every_example_in_a_help_is_a_command_that_parses() -> None:
    import shlex

    lines = [part.strip() for line in helps().splitlines() for part in line.split("&&")]
    examples = [line for line in lines if line.startswith("loratools ") and "[OPTIONS]" not in line]
    assert len(examples) >= 10
    for example in examples:
        name, *arguments = shlex.split(example)[1:]
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, example
        command.make_context(name, arguments)  # raises what a user would be told


if __name__ == "__main__":
    DOCUMENT.write_text(written(), encoding="utf-8")
    sys.exit(0)
