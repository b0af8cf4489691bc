"""The layout that a conversion writes: the one asked for, or that which the format's readers look for."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.adapter import Adapter
from loratools.deltas.cut import restacked
from loratools.errors import AmbiguousError, LoratoolsError, MatchError
from loratools.layouts.networks import TEXT, form_of, networks
from loratools.layouts.relayout import Relayout, relayout_of
from loratools.layouts.roots import split_root
from loratools.refs import Spec

_EITHER = ("unet", *TEXT)


def layout_for(
    adapter: Adapter, format: str, layout: str | None, base: Mapping[str, Spec] | None, network: str | None = None
) -> tuple[Relayout | None, str | None]:
    """How the adapter's names change on their way into a format, None for not at all, and what to say of it.

    A layout that is asked for must be possible; without one, a format that has names of one side alone gets them where the network is
    known, and a file that is written as what it was, without a base, keeps its own.
    """
    if layout is not None:
        found = _planned(adapter, layout, base, network)
        return found, found.said()
    side = _SIDES.get(format)
    if side is None or (format == adapter.format and base is None) or (format == "kohya" and (adapter.flat or _either(adapter))):
        return None, None
    try:
        found = _planned(adapter, side, base, network)
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
    if unchanged:
        return None, None
    return found, f"{found.said()}, as --format {format} has them"


def _either(adapter: Adapter) -> bool:
    """Whether all its names are those of networks whose names kohya's readers take from either side; of others they want the authors'."""
    forms = {form for network in networks() if network.name in _EITHER for form in network.forms}
    return all(form_of(split_root(name)[2]) in forms for name in adapter)


# of formats that have names of one side alone, which
_SIDES = {"diffusers": "diffusers", "cloneofsimo": "diffusers", "comfyui": "original", "kohya": "original", "xlabs": "original"}


def _planned(adapter: Adapter, side: str, base: Mapping[str, Spec] | None, network: str | None) -> Relayout:
    try:
        return relayout_of(adapter, side, flat=adapter.flat, base=base, network=network)
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
