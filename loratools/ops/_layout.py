"""The layout that a conversion writes: the one asked for, or that which the format's readers look for."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.adapter import Adapter
from loratools.deltas.cut import restacked
from loratools.errors import AmbiguousError, LoratoolsError, MatchError
from loratools.layouts.relayout import Relayout, relayout_of
from loratools.refs import Spec

# networks whose authors' names kohya's trainer looks for; of Stable Diffusion's UNets it reads both
_BY_AUTHORS = frozenset(("flux", "sd3"))


def layout_for(adapter: Adapter, format: str, layout: str | None, base: Mapping[str, Spec] | None) -> tuple[Relayout | None, str | None]:
    """How the adapter's names change on their way into a format, None for not at all, and what to say of it.

    A layout that is asked for must be possible; without one, a format that has names of one side alone gets them where the network is
    known, and a file that is written as what it was, without a base, keeps its own.
    """
    if layout is not None:
        found = _planned(adapter, layout, base)
        return found, found.said()
    side = _SIDES.get(format)
    if side is None or (format == adapter.format and base is None) or (format == "kohya" and adapter.flat):
        return None, None
    try:
        found = _planned(adapter, side, base)
    except AmbiguousError as error:
        error.remedy = f"{error.remedy}, or choose with --layout" if format == "kohya" else error.remedy
        raise
    except LoratoolsError as error:
        if not _unknown(error):
            raise
        if adapter.flat:
            raise _remedied(error) from None
        return None, None  # another model's names, which the format takes or refuses as they are
    unchanged = all(step.pair is None and step.names == step.places for step in found.steps)
    if unchanged or (format == "kohya" and not _BY_AUTHORS & set(found.titles)):
        return None, None
    return found, f"{found.said()}, as --format {format} has them"


# of formats that have names of one side alone, which
_SIDES = {"diffusers": "diffusers", "comfyui": "original", "kohya": "original"}


def _planned(adapter: Adapter, side: str, base: Mapping[str, Spec] | None) -> Relayout:
    try:
        return relayout_of(adapter, side, flat=adapter.flat, base=base)
    except LoratoolsError as error:
        raise error.at(file=adapter.path) from None


def _unknown(error: LoratoolsError) -> bool:
    return any(isinstance(one, MatchError) for one in getattr(error, "errors", (error,)))


def _remedied(error: LoratoolsError) -> LoratoolsError:
    """Of names that nobody asked another layout for: this format needs their dots, which a base tells too."""
    for one in getattr(error, "errors", (error,)):
        one.remedy = "give the base with --base, whose names tell where the dots are"
    return error


def stacked(adapter: Adapter, base: Mapping[str, Spec]) -> Adapter:
    """The adapter with changes of several rows of one of the base's matrices, such as of q, k and v, as one change where there is one."""
    matrices = {name for name in adapter if name in base and len(base[name].shape) < 3}
    return adapter.map(lambda name, delta: restacked(delta, base[name].shape[0]) if name in matrices else delta)
