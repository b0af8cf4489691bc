"""DoRA beside plain LoRA, which formats whose flag holds for a whole file cannot say: who is which, and what makes them alike."""

from __future__ import annotations

from collections.abc import Iterable

from loratools.errors import NotExpressible
from loratools.formats.base import nearest

# the first is exact but for the rounding of the magnitudes, ‖W + ΔW‖, to float32
REMEDY = (
    "convert --kind dora --base BASE gives each LoRA the magnitudes that leave W + ΔW as it is, "
    "convert --kind lora --base BASE --rank R makes each DoRA the nearest LoRA"
)


def mixed(doras: Iterable[str], plain: Iterable[str], flag: str) -> list[NotExpressible]:
    """The error that names both sorts of tensors, none where there is one sort; `flag` says what holds for the whole of a file.

    >>> print(*mixed(["b"], ["a"], "use_dora holds for a file"))
    a: use_dora holds for a file: DoRA on b, plain LoRA on a; convert --kind dora --base BASE gives each LoRA the magnitudes that leave \
W + ΔW as it is, convert --kind lora --base BASE --rank R makes each DoRA the nearest LoRA
    """
    one, other = list(doras), list(plain)
    if not one or not other:
        return []
    return [NotExpressible(f"{flag}: DoRA on {nearest(one)}, plain LoRA on {nearest(other)}", tensor=other[0], remedy=REMEDY)]
