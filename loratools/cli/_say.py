"""What a command tells: its result on stdout, notes and progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

Progress = Callable[[int, int], None]


def say(lines: Iterable[str]) -> None:
    """Lines of text on stdout."""
    click.echo("\n".join(lines))


def say_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def notes(texts: Iterable[str], *, quiet: bool) -> None:
    """A line each on stderr, for what a person should know though nothing failed."""
    for text in texts:
        if not quiet:
            click.echo(f"Note: {text}", err=True)


@contextmanager
def progress(label: str, *, quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr (bytes, rate, time left), told (done, total); None where nobody watches: quiet, or not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with _display() as bar:
        task = bar.add_task(label, total=None, visible=False)
        last = 0.0

        def told(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > 0.05 or done == total:  # a block is done each millisecond, and an update costs a tenth of one
                last = now
                bar.update(task, completed=done, total=total, visible=True, refresh=done == total)

        try:
            yield told
        finally:
            bar.remove_task(task)


@contextmanager
def download(name: str, size: int) -> Iterator[Callable[[int], None]]:
    """A bar for a file on its way, told the bytes there are: the watcher of `source.watch`, for whichever command runs."""
    context = click.get_current_context(silent=True)
    with progress(name, quiet=context is not None and context.params.get("quiet", False)) as told:
        yield (lambda done: told(done, size)) if told is not None else (lambda done: None)


_displays: list[Bar] = []  # the one on the terminal: a download within an operation is a second bar in it


@contextmanager
def _display() -> Iterator[Bar]:
    if _displays:
        yield _displays[-1]
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Made

    label = TextColumn("{task.description}", markup=False)
    columns = label, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Made(*columns, console=Console(stderr=True), transient=True) as bar:
        _displays.append(bar)
        try:
            yield bar
        finally:
            _displays.remove(bar)
