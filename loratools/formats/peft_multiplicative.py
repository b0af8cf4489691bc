"""peft's methods that turn, scale or otherwise change a weight by what it is: rows of the table in `peft_methods`.

Keys, fields and formulas were read from peft 0.21.2, `tuners/<method>/`.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.deltas.base import Delta
from loratools.deltas.laid import WherePresent
from loratools.deltas.scaled import Scaled
from loratools.errors import ShapeError
from loratools.formats.peft_method import Method, Part


def _ia3(part: Part) -> Mapping[str, Delta]:
    """l (1, in, 1…) before a feedforward layer's product, else (out, 1) or a convolution's (1, out, 1…) after it, bias included."""
    l, before = part["ia3_l"], part.listed("feedforward_modules")  # noqa: E741
    shape = l.spec.shape
    side = 1 if before or len(shape) > 2 else 0
    if len(shape) < 2 or shape[side] != l.spec.numel:
        raise ShapeError("ia3_l is no vector along its axis", found=list(shape), expected="[1, in, ...]" if side else "[out, 1]")
    weight = Scaled(l=l, axis=1 if before else 0)
    return {"weight": weight} if before else {"weight": weight, "bias": WherePresent(delta=Scaled(l=l))}


MULTIPLICATIVE = (
    Method(
        peft_type="IA3",
        title="each row, or each column, times a number",
        slots=("ia3_l",),
        settings=("feedforward_modules",),
        training=("init_ia3_weights",),
        make=_ia3,
    ),
)
