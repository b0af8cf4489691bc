"""peft's methods whose layers share tensors of the whole adapter: rows of the table in `peft_methods`.

Keys, fields and formulas were read from peft 0.21.2, `tuners/<method>/`.
"""

from __future__ import annotations

from loratools.deltas.base import Delta
from loratools.deltas.vera import VeRA
from loratools.formats.peft_method import Method, Part

PROJECTION = "save the adapter with save_projection=True: another machine's random numbers may differ"


def _vera(part: Part) -> Delta:
    A, B = part.shared("vera_A", PROJECTION), part.shared("vera_B", PROJECTION)
    part.rank("r", A.spec.shape[0])
    return VeRA(A=A, B=B, b=part["vera_lambda_b"], d=part["vera_lambda_d"])


BANKED = (
    Method(
        peft_type="VERA",
        title="two vectors between projections that all layers share",
        slots=("vera_lambda_[bd]",),
        shared=("vera_[AB]",),
        settings=("r",),
        training=("projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"),
        own_biases="vera_only",
        make=_vera,
    ),
)
