"""One module's tensors in a file of kohya's family, by suffix: what is taken of them is remembered, so that nothing is left over unsaid."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from loratools.errors import AmbiguousError, FormatError, LoratoolsError, ShapeError
from loratools.formats._scalar import scalar
from loratools.refs import Ref
from loratools.source.handles import NotFetched

# other spellings of the same things: peft's, those of diffusers' older releases, and bare ones
OTHERS = {
    "lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight", "lora.down.weight": "lora_down.weight", "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight", "lora_linear_layer.up.weight": "lora_up.weight", "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight", "lora_B.bias": "lora_bias", "lora_B.default.bias": "lora_bias", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "lora_magnitude_vector.default.weight": "magnitude", "magnitude": "magnitude",
}  # fmt: skip


@dataclass
class Slots:
    """One module's tensors by suffix, and the keys they came from; what a kind takes is remembered."""

    refs: dict[str, Ref] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def __getitem__(self, slot: str) -> Ref:
        if slot not in self.refs:
            raise FormatError(f"has no {self.spelt(slot)} beside it", tensor=self.first, remedy="the file is incomplete")
        self.used.add(slot)
        return self.refs[slot]

    @property
    def first(self) -> str:
        """The key that stands for the module in a message: that of a factor rather than of its alpha."""
        return next((key for slot, key in self.keys.items() if slot != "alpha"), next(iter(self.keys.values())))

    def spelt(self, slot: str) -> str:
        """A slot as this file would spell it."""
        pair = ("lora_down.weight", "lora_up.weight")
        if slot not in pair or (key := self.keys.get(pair[slot == pair[0]])) is None:
            return slot
        suffix = max((text for text in (*OTHERS, *pair) if key.endswith(text)), key=len, default=pair[slot == pair[0]])
        for words in (("lora_A", "lora_B"), ("down", "up")):
            here, there = words if slot == pair[1] else words[::-1]
            if here in suffix:
                return suffix.replace(here, there)
        return slot

    def get(self, slot: str) -> Ref | None:
        self.used.add(slot)
        return self.refs.get(slot)

    def __contains__(self, slot: str) -> bool:
        return slot in self.refs

    def number(self, slot: str) -> float:
        """The one number that a slot holds. Raises FormatError where it is none."""
        ref = self[slot]
        try:
            return scalar(ref, slot)
        except LoratoolsError as error:
            raise error.at(tensor=self.keys.get(slot, self.first)) from None

    def stated_alpha(self) -> float:
        """The alpha in the file; nan where its header alone was fetched from the Hub, so that nothing but a report can come of it."""
        try:
            return self.number("alpha")
        except NotFetched:
            return math.nan

    def alpha(self, rank: int, given: float | None) -> float:
        """The alpha in the file, else the one a user gave, else the rank, which is what trainers mean by none."""
        ref = self.get("alpha")
        if ref is None:
            return float(rank) if given is None else given
        value = self.stated_alpha()
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
