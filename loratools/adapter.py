"""An adapter: base tensor names mapped to deltas.

Keys are tensor names (`…q_proj.weight`), not module names: merging is then a join on equal keys, and biases, norms and saved
modules need no second concept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.errors import LoratoolsError
from loratools.families import Family
from loratools.layouts.relayout import Relayout, relayout_of
from loratools.listing import Listing, listing
from loratools.refs import Ref, Spec, origin
from loratools.resolution import Told, resolve
from loratools.source.handles import name_of
from loratools.tensorfile import identity

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Adapter(Mapping[str, Delta]):
    """Deltas by the name of the base tensor they change.

    `metadata` is what its file said beside the weights, by format; `passengers` are tensors that are no weight edit and are
    carried or refused, never lost; `expects` tells, of a base's specs, which tensors its file promises to change; `notes`
    are what a person should be told; `left` counts the deltas that a base should have a tensor for, and had none; `initial` are
    the files of the adapter as it was initialised, where its own do not tell what it means; names of a `flat` one have underscores
    for dots (`flatnames`); of one whose file counts modules instead of naming them, `numbered` puts its deltas under a base's names,
    and leaves as they are those that the base tells nothing of. `pending` makes, of the `config.json` of the base that it meets, the
    adapter that its file could not tell without, and `model` is that config once it has met one: what formats need that are written
    for one model.
    """

    deltas: Mapping[str, Delta]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    passengers: Mapping[str, Ref] = field(default_factory=dict)
    path: Path | None = None
    format: str | None = None
    files: tuple[Path, ...] = ()
    expects: Callable[[Mapping[str, Spec]], Iterable[str]] | None = None
    notes: tuple[str, ...] = ()
    left: int = 0
    initial: tuple[Path, ...] = ()
    flat: bool = False
    pending: Callable[[Mapping[str, Any]], Adapter] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    numbered: Callable[[Mapping[str, Delta], Mapping[str, Spec]], Mapping[str, Delta]] | None = None

    def __getitem__(self, name: str) -> Delta:
        return self.deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.deltas)

    def __len__(self) -> int:
        return len(self.deltas)

    def __repr__(self) -> str:
        """A short table, from headers: repeated layers in one row, at most twenty rows."""
        return self._listing().text()

    def _repr_html_(self) -> str:
        return self._listing().html()

    def __rich__(self) -> Table:
        return self._listing().rich()

    def _listing(self) -> Listing:
        return listing(self.deltas, path=self.path and name_of(self.path), format=self.format, parameters=self.parameters)

    @property
    def parameters(self) -> int:
        """Elements of its tensors; one that several deltas share, such as a bank of vectors, counts once."""
        refs = [ref for delta in self.values() for ref in delta.refs().values()]
        return sum({identity(ref): origin(ref).spec.numel for ref in refs}.values())

    def map(self, fn: Callable[[str, Delta], Delta]) -> Adapter:
        """The adapter with each delta replaced by fn(name, delta)."""
        return replace(self, deltas={name: fn(name, delta) for name, delta in self.items()})

    def resolve(
        self,
        base: Mapping[str, Spec],
        family: Family | None = None,
        *,
        renames: Iterable[tuple[str, str]] = (),
        allow_unmatched: bool = False,
    ) -> Adapter:
        """The same adapter under the base's names, each delta known to fit its weight.

        A prefix that the whole adapter lacks or has too much is aligned once, and noted; so are names of transformers' in memory and
        in files, with the matrices of fused experts. Raises, all together: MatchError for deltas the base lacks (with the nearest names)
        and for tensors the adapter promises but does not hold, ShapeError for those that do not fit, AmbiguousError for square
        weights whose orientation nothing tells, UnsupportedError for what only a conversion of transformers would bring together.
        """
        family = family or Family({})
        if self.pending is not None:
            told = replace(self.pending(family.config), pending=None)
            return told.resolve(base, family, renames=renames, allow_unmatched=allow_unmatched)
        try:
            found = resolve(self.deltas, base, family, told=self._told(), renames=list(renames), allow_unmatched=allow_unmatched)
        except LoratoolsError as error:
            raise error.at(file=self.path) from None
        notes = (*self.notes, *found.notes)
        return replace(
            self, deltas=found.deltas, notes=notes, expects=None, left=found.left, flat=False, numbered=None, model=family.config,
        )  # fmt: skip

    def relaid(self, layout: str | Relayout, base: Mapping[str, Spec] | None = None, *, network: str | None = None) -> Adapter:
        """The same adapter of a diffusion network under the names of a layout: "diffusers", or "original" (BFL, mmdit, LDM, …).

        No base is needed; the specs of one that has the adapter's names tell what they leave open, or the `network`, such as "flux". Flat
        names get their dots back.
        Fused weights are cut and stacked exactly (`layouts.relayout`). Raises, all together: MatchError for names of no known network,
        AmbiguousError for names that two would call differently, NotExpressible for kinds that cannot be cut or stacked.
        """
        try:
            plan = relayout_of(self.deltas, layout, flat=self.flat, base=base, network=network) if isinstance(layout, str) else layout
            deltas = plan.apply(self.deltas)
        except LoratoolsError as error:
            raise error.at(file=self.path) from None
        return replace(self, deltas=deltas, notes=(*self.notes, plan.said()), expects=None, flat=False)

    def _told(self) -> Told:
        peft = self.metadata.get("peft", {})
        # peft's OLoRA moves a part of W as it lies, and adds the change to it turned: for a weight stored (in, out) that is no LoRA
        olora = str(peft.get("init_lora_weights")).lower() == "olora"
        straight = "peft's OLoRA changes weights stored (in, out) as if they were (out, in)" if olora else None
        flagged = bool(peft.get("fan_in_fan_out"))
        return Told(flat=self.flat, numbered=self.numbered, expects=self.expects, flagged=flagged, straight=straight)


def is_whole(delta: Delta) -> bool:
    """Whether the delta puts another tensor in the weight's place, bytes and all."""
    return isinstance(delta, Replacement)
