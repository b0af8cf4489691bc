"""peft's methods whose layers are made of a decomposition of the base: rows of the table in `peft_methods`.

Keys, fields and formulas were read from peft 0.21.2, `tuners/<method>/`.
"""

from __future__ import annotations

from loratools.deltas.base import Delta
from loratools.deltas.frod import FRoD
from loratools.deltas.tinylora import TinyLoRA
from loratools.errors import FormatError, ShapeError, UnsupportedError
from loratools.formats.peft_banked import saved, seed_of
from loratools.formats.peft_decomposed_encode import FROD, TINYLORA, category
from loratools.formats.peft_method import Method
from loratools.formats.peft_part import Part
from loratools.formats.peft_tinylora import vector_of

AGAIN = "load it with peft, set save_projection to true in its config, and save it again"

# -- TinyLoRA: peft numbers its layers as the model registers them, which no file tells; the projections, seeded by that number, do


def _tinylora(part: Part) -> Delta:
    A, B, seed = part["tinylora_A"], part["tinylora_B"], seed_of(part, "projection_seed")
    P = part["tinylora_P"] if saved(part, "tinylora_P") else None
    count = len(part.paths)
    if P is None and count > 1:
        why = "its projections are not in the file, and are drawn in an order of the layers that only the model tells"
        raise UnsupportedError(why, remedy=AGAIN)
    tied = part.number("weight_tying")
    if not 0 <= tied <= 1:
        raise FormatError("adapter_config.json: weight_tying", found=tied, expected="a number from 0 to 1")
    v = part.shared(f"tinylora_v.{vector_of(P, seed, count, tied)}")
    delta = TinyLoRA(A=A, B=B, v=v, P=P, seed=None if P is not None else seed)
    most = min(part.whole("r"), *delta.shape())
    if delta.facts()["rank"] != most or v.spec.numel != part.whole("u"):
        found = f"rank {delta.facts()['rank']}, {v.spec.numel} projections"
        raise ShapeError("the factors are not the config's", found=found, expected=f"rank {most}, u {part.whole('u')}")
    if P is None:
        part.notes.append(f"its projections are not in the file: drawn again from projection_seed {seed}, as peft does")
    return delta


# -- FRoD: layers that play the same part in their blocks share a basis


def _frod(part: Part) -> Delta:
    kind = category(part.path)
    slots = [f"frod_{name}.{kind}" for name in ("V", "s_indices", "s_size")]
    if not saved(part, *slots):
        why = "its basis is not in the file, and a joint decomposition of all layers of one kind has other signs on another machine"
        raise UnsupportedError(why, remedy=AGAIN)
    V, places, size = (part.shared(slot) for slot in slots)
    return FRoD(V=V, places=places, size=size, l=part["frod_lambda_l"], values=part["frod_lambda_s_values"])


DECOMPOSED = (
    Method(
        peft_type="TINYLORA",
        title="a LoRA between singular vectors, whose core is a short vector's, which layers may share",
        slots=("tinylora_[ABP]",),
        shared=(r"tinylora_v\.\d+",),
        settings=("r", "u", "weight_tying", "projection_seed", "save_projection"),
        training=("init_v_bound", "tinylora_dropout", "init_weights"),
        own_biases="tinylora_only",
        make=_tinylora,
        writing=TINYLORA,
    ),
    Method(
        peft_type="FROD",
        title="a sparse turn and new lengths in a basis that layers of one kind share",
        slots=("frod_lambda_(?:l|s_values)",),
        shared=(r"frod_(?:V|s_indices|s_size)\.[^.]+",),
        settings=("save_projection",),
        training=(
            "projection_prng_key", "frod_dropout", "init_weights", "sparse_rate", "regularization_alpha", "progressbar",
            "runtime_offload_base_weight",
        ),
        own_biases="frod_only",
        make=_frod,
        writing=FROD,
    ),
)  # fmt: skip
