"""One module's tensors in a file of kohya's family, by suffix: what is taken of them is remembered, so that nothing is left over unsaid."""

from __future__ import annotations

from dataclasses import dataclass, field

from loratools.errors import AmbiguousError, FormatError, ShapeError
from loratools.formats._scalar import scalar
from loratools.tensorfile import Ref


@dataclass
class Slots:
    """One module's tensors by suffix, and the keys they came from; what a kind takes is remembered."""

    refs: dict[str, Ref] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def __getitem__(self, slot: str) -> Ref:
        if slot not in self.refs:
            raise FormatError(f"has no {slot} beside it", tensor=next(iter(self.keys.values())), remedy="the file is incomplete")
        self.used.add(slot)
        return self.refs[slot]

    def get(self, slot: str) -> Ref | None:
        self.used.add(slot)
        return self.refs.get(slot)

    def __contains__(self, slot: str) -> bool:
        return slot in self.refs

    def alpha(self, rank: int, given: float | None) -> float:
        """The alpha in the file, else the one a user gave, else the rank, which is what trainers mean by none."""
        ref = self.get("alpha")
        if ref is None:
            return float(rank) if given is None else given
        value = scalar(ref, "alpha")
        if value == 0 and given is None:
            raise AmbiguousError(
                "alpha is 0, which kohya reads as the rank and ComfyUI as no effect", tensor=self.keys["alpha"],
                remedy="give the one it was trained with by --alpha-in A",
            )  # fmt: skip
        return given if value == 0 and given is not None else value


def matrix(ref: Ref) -> Ref:
    """A factor without the axes of 1 that a convolution gives it."""
    return ref.reshape(*ref.spec.shape[:2])


def check_tail(ref: Ref, key: str) -> None:
    """Raise ShapeError for what is no matrix, axes of 1 behind it left aside."""
    if len(ref.spec.shape) < 2 or any(size != 1 for size in ref.spec.shape[2:]):
        raise ShapeError("not a matrix", tensor=key, found=list(ref.spec.shape), expected="[rows, columns], or with axes of 1 behind")
