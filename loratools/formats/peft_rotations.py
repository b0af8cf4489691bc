"""peft's methods that turn or mirror what a weight is given: rows of the table in `peft_methods`.

Keys, fields and formulas were read from peft 0.21.2, `tuners/<method>/`, and those of older files from peft 0.15 to 0.18.
"""

from __future__ import annotations

import math
import re

from loratools.deltas.base import Delta
from loratools.deltas.butterfly import Butterfly
from loratools.deltas.reflected import Reflected
from loratools.deltas.rotated import Rotated
from loratools.errors import FormatError, ShapeError, UnsupportedError
from loratools.formats.peft_method import Method
from loratools.formats.peft_part import Part
from loratools.formats.peft_turned_encode import BOFT, HRA, OFT, divisor

_OLD = "OFT as peft wrote it up to 0.15.2, with oft_r: another parametrisation, which peft reads no more"


def _oft(part: Part) -> Delta:
    """A linear layer's or a convolution's input is turned, W·Rᵀ; an embedding's output, W·R."""
    if part.get("oft_r") is not None or part.get("oft_s") is not None:
        raise UnsupportedError(_OLD, remedy="merge it with the peft that wrote it")
    table = part.get("oft_embedding_R.weight")
    numbers = part["oft_R.weight"] if table is None else table
    shared, series = part.flag("block_share"), part.flag("use_cayley_neumann")
    # the exact transform is that of −Q, its series that of Q; both are transposed where the input is turned
    factor = 1.0 if series == (table is not None) else -1.0
    degree, last = _terms(part) if series else (None, 2.0)
    count = numbers.spec.shape[0] if numbers.spec.shape else 1
    bound = part.number("eps") / math.sqrt(max(1, count)) if part.flag("coft") else None
    made = Rotated(numbers=numbers, factor=factor, degree=degree, last=last, bound=bound, shared=shared, pointwise=True)
    _check_blocks(part, made)
    return made


def _terms(part: Part) -> tuple[int, float]:
    """(degree, last) of the series: from peft 0.18 on the last power counts once, as it does in the sum, and there are at least three."""
    terms, version = part.whole("num_cayley_neumann_terms"), str(part.config.get("peft_version"))
    found = re.match(r"(\d+)\.(\d+)(\.0\.?(?:dev|rc|a|b))?", version)  # peft writes its version since 0.18
    release = (int(found[1]), int(found[2]), not found[3]) if found else (0, 0, True)
    if release < (0, 18, True):
        return max(0, terms - 1), 2.0
    return (max(0, terms - 1), 2.0) if terms < 3 else (max(3, terms - 1), 1.0)


def _check_blocks(part: Part, made: Rotated) -> None:
    """Blocks are as large, or as many, as the config says, or the nearest to it that divides; shared ones, as large as they are."""
    if "oft_block_size" not in part.config:
        raise UnsupportedError(_OLD, remedy="merge it with the peft that wrote it")
    count, size = made.blocks()
    wanted_count, wanted_size = part.whole("r"), part.whole("oft_block_size")
    if (wanted_count == 0) == (wanted_size == 0) or min(wanted_count, wanted_size) < 0:
        stated = f"r {wanted_count}, oft_block_size {wanted_size}"
        raise FormatError("adapter_config.json: number and size of blocks", found=stated, expected="one of them, the other 0")
    if made.shared:
        return
    whole, found, wanted = count * size, *((count, wanted_count) if wanted_count else (size, wanted_size))
    if found != divisor(whole, wanted):
        what = "many" if wanted_count else "large"
        raise ShapeError(f"the blocks are not as {what} as the config says", found=found, expected=divisor(whole, wanted))


def _boft(part: Part) -> Delta:
    """Without its CUDA extension peft makes one factor, however many the config says."""
    numbers, scale = part["boft_R"], part["boft_s"]
    factors, size, count = (part.whole(f"boft_{name}") for name in ("n_butterfly_factor", "block_size", "block_num"))
    made = Butterfly(numbers=numbers, scale=scale, factor=0.5)
    shape = numbers.spec.shape
    if len(scale.spec.shape) != 2:
        raise ShapeError("boft_s is no vector along an axis", found=list(scale.spec.shape), expected="[out, 1] or [1, out]")
    if factors < 1 or shape[0] not in (1, factors):
        raise ShapeError("not as many factors as the config says", found=shape[0], expected=factors)
    if (size == 0) == (count == 0) or (size or shape[2], count or shape[1]) != (shape[2], shape[1]):
        expected = f"boft_block_num {count}, boft_block_size {size}, one of them 0"
        raise ShapeError("the blocks are not the config's", found=f"{shape[1]} blocks of {shape[2]}", expected=expected)
    return made


def _hra(part: Part) -> Delta:
    U = part["hra_u"]
    made = Reflected(U=U, orthogonal=part.flag("apply_GS"))
    part.rank("r", U.spec.shape[1], pattern=None)
    return made


ROTATIONS = (
    Method(
        peft_type="OFT",
        title="small rotations side by side, before the layer",
        slots=(r"oft_(?:embedding_)?R\.weight", "oft_[rs]"),
        settings=("r", "oft_block_size", "block_share", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms"),
        training=("module_dropout", "init_weights"),
        own_biases="oft_only",
        conv1d=False,
        make=_oft,
        writing=OFT,
    ),
    Method(
        peft_type="BOFT",
        title="small rotations in several places in turn, before the layer, and each row times a number",
        slots=("boft_[Rs]",),
        settings=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
        training=("boft_dropout", "init_weights"),
        own_biases="boft_only",
        conv1d=False,
        make=_boft,
        writing=BOFT,
    ),
    Method(
        peft_type="HRA",
        title="a chain of reflections, before the layer",
        slots=("hra_u",),
        settings=("r", "apply_GS"),
        training=("init_weights",),
        own_biases="hra_only",
        conv1d=False,
        make=_hra,
        writing=HRA,
    ),
)
