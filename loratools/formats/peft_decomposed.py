"""peft's methods whose layers are made of a decomposition of the base: rows of the table in `peft_methods`.

Keys, fields and formulas were read from peft 0.21.2, `tuners/<method>/`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from loratools.deltas.base import Delta
from loratools.deltas.frod import FRoD
from loratools.deltas.seeded import normal
from loratools.deltas.tinylora import TinyLoRA
from loratools.errors import AmbiguousError, FormatError, ShapeError, UnsupportedError
from loratools.formats.peft_banked import saved, seed_of
from loratools.formats.peft_method import Method, Part
from loratools.refs import Ref
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

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
    groups = max(1, round(count * (1 - tied)))
    number = 0 if groups == 1 or P is None else _number(P, seed, count)
    v = part.shared(f"tinylora_v.{min(number // max(1, count // groups), groups - 1)}")
    delta = TinyLoRA(A=A, B=B, v=v, P=P, seed=None if P is not None else seed)
    most = min(part.whole("r"), *delta.shape())
    if delta.facts()["rank"] != most or v.spec.numel != part.whole("u"):
        found = f"rank {delta.facts()['rank']}, {v.spec.numel} projections"
        raise ShapeError("the factors are not the config's", found=found, expected=f"rank {most}, u {part.whole('u')}")
    if P is None:
        part.notes.append(f"its projections are not in the file: drawn again from projection_seed {seed}, as peft does")
    return delta


_FIRST = 256  # numbers by which projections are told apart
_CLOSE = {"F32": 1e-4, "F64": 1e-4}  # of their size: machines differ in the last bits of a normal number, bfloat16 by 2⁻⁹


def _number(P: Ref, seed: int, count: int) -> int:
    """Which layer its projections were drawn for."""
    import torch

    shape = P.spec.shape
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ShapeError("no projections", found=list(shape), expected="[u, r, r]")
    held = read_tensor(P, torch.float64).flatten()[:_FIRST]
    limit = _CLOSE.get(P.spec.dtype, 4e-3)
    found = [number for number in range(count) if _apart(held, _first(seed + number, shape[0], shape[1])) <= limit]
    if len(found) != 1:
        why = "which of the shared vectors is this layer's is told by its projections, and these are" + (" no" if not found else " several")
        raise AmbiguousError(f"{why} layer's", found=f"projection_seed {seed}", remedy="is that the seed it was trained with?")
    return found[0]


@lru_cache(maxsize=4096)
def _first(seed: int, count: int, rank: int) -> Tensor:
    return normal(seed, count, rank).flatten()[:_FIRST].clone()


def _apart(held: Tensor, drawn: Tensor) -> float:
    """‖held − drawn‖ / ‖drawn‖."""
    return float((held - drawn).norm() / drawn.norm())


# -- FRoD: layers that play the same part in their blocks share a basis


def _frod(part: Part) -> Delta:
    kind = category(part.path)
    slots = [f"frod_{name}.{kind}" for name in ("V", "s_indices", "s_size")]
    if not saved(part, *slots):
        why = "its basis is not in the file, and a joint decomposition of all layers of one kind has other signs on another machine"
        raise UnsupportedError(why, remedy=AGAIN)
    V, places, size = (part.shared(slot) for slot in slots)
    return FRoD(V=V, places=places, size=size, l=part["frod_lambda_l"], values=part["frod_lambda_s_values"])


def category(path: str) -> str:
    """The kind of a layer, by the end of its path (`tuners/frod/model.py::_category_from_key`).

    >>> [category(path) for path in ("h.0.c_fc", "layers.3.self_attn.q_proj", "layer.1.attention.output.dense")]
    ['c_fc', 'self_attn_q_proj', 'attention_output']
    """
    *before, last = path.split(".")
    if not before or before[-1].isdigit():
        return last
    return "attention_output" if [*before, last][-3:] == ["attention", "output", "dense"] else f"{before[-1]}_{last}"


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
    ),
)  # fmt: skip
