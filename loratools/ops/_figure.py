"""What all pictures share: the file they go to, fonts, colours, and bytes that are the same each time.

matplotlib is the extra `plot`, imported when something is drawn and not before. Colours are told apart by people who see few: cividis
(Nuñez, Anderton, Renslow 2018) for numbers, for groups what Okabe and Ito (2008) chose, without their red and yellow, dashed
when they come round again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import MissingExtra, UsageError
from loratools.output import check_output, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")
COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#000000")
DASHES = ("-", (0, (4, 1.5)))
GREY = "#8a8a8a"
DPI = 150  # of a PNG
OUTSIDE = "–"  # the column of modules in no layer


def checked(path: str | Path, inputs: Iterable[str | Path] = (), out: str | Path | None = None) -> Path:
    """The file to draw to, which may be replaced, but is no input and not within the output `out`.

    Raises UsageError for another ending or a place in `out`, MissingExtra without matplotlib, OutputError.
    """
    target = Path(path)
    if target.suffix.lower() not in ENDINGS:
        raise UsageError("--plot", found=target.name, expected=f"a name that ends in {' or '.join(ENDINGS)}")
    if out is not None and _within(target, out):
        raise UsageError("--plot", found=str(target), expected="a file that is not the output or in it")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingExtra("--plot draws with matplotlib, which is not installed", remedy='pip install "loratools[plot]"') from None
    return check_output(target, overwrite=True, inputs=inputs)


def _within(target: Path, out: str | Path) -> bool:
    real = Path(os.path.realpath(target))
    return real.is_relative_to(os.path.realpath(out))


@contextmanager
def styled() -> Iterator[None]:
    """Fonts, and what makes an SVG's names the same each time; a figure is made and saved within."""
    import matplotlib

    fonts = {"font.size": 8, "font.family": "DejaVu Sans", "svg.fonttype": "none", "pdf.fonttype": 42}
    style: dict[Any, Any] = {"svg.hashsalt": "loratools", "axes.linewidth": 0.6, "axes.unicode_minus": True, **fonts}
    with matplotlib.rc_context(style):
        yield


def save(figure: Figure, target: Path) -> None:
    """The figure at `target`, whole or not at all, without a date."""
    kind = target.suffix.lower()
    dated: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(kind, {})
    with whole(target) as place:
        figure.savefig(place, format=kind[1:], dpi=DPI, metadata=dated)


def plain(ax: Axes, title: str, across: str, up: str) -> None:
    """A panel of lines: its title and axes named, a faint grid, nothing above and to the right."""
    ax.set_title(title, fontsize=8.5, loc="left")
    ax.set_xlabel(across, fontsize=7.5)
    ax.set_ylabel(up, fontsize=7.5)
    ax.tick_params(labelsize=7, length=2.5, width=0.6)
    ax.grid(color="#e6e6e6", linewidth=0.5)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
