"""peft's methods that read a whole weight to change it: rows of the table in `peft_methods`.

Keys, fields and formulas were read from peft 0.21.2, `tuners/<method>/`.
"""

from __future__ import annotations

import re
from typing import Any

from loratools.deltas.base import Delta
from loratools.deltas.networked import Networked
from loratools.deltas.projected import METHODS, Projected
from loratools.deltas.subspace import Subspace
from loratools.errors import FormatError, ShapeError
from loratools.formats._scalar import finite
from loratools.formats.peft_method import Method
from loratools.formats.peft_part import Part
from loratools.formats.peft_projections_encode import DEFT, OSF, PEANUT
from loratools.formats.peft_values import short


def _deft(part: Part) -> Delta:
    """An alpha of 0 counts as none, as peft has it; a rank above the outputs is theirs."""
    P = part["deft_P"]
    R = None if part.flag("para") else part["deft_R"]
    made = Projected(P=P, R=R, method=part.word("decomposition_method", *METHODS))
    out, rank = P.spec.shape
    if rank != min(part.whole("r"), out):
        raise ShapeError("the rank is not the config's", found=rank, expected=min(part.whole("r"), out))
    alpha = part.number("alpha") if part.config.get("alpha") is not None else 0.0
    return Projected(P=P, R=R, method=made.method, scale=alpha / rank if alpha else 1.0)


def _peanut(part: Part) -> Delta:
    A, depth = part["peanut_A.weight"], part.whole("depth")
    encoders, decoders = (tuple(part[f"peanut_{side}.{i}.weight"] for i in range(depth)) for side in ("encoders", "decoders"))
    name = part.config.get("act_fn")
    if not isinstance(name, str):
        raise FormatError("adapter_config.json: act_fn", found=short(name), expected="an activation's name")
    inner = {"encoders": encoders, "decoders": decoders}
    made = Networked(A=A, B=part["peanut_B.weight"], **inner, activation=name, scale=part.number("scaling"))
    part.rank("r", A.spec.shape[0], pattern=None)
    return made


def _osf(part: Part) -> Delta:
    U, S, V = (part[f"osf_svd_params.{name}_low"] for name in "USV")
    made = Subspace(U=U, S=S, V=V)
    expected = _kept(part, min(U.spec.shape[0], V.spec.shape[1]))
    if made.kept != expected:
        raise ShapeError("not as many singular values are kept as the config says", found=made.kept, expected=expected)
    return made


def _kept(part: Part, most: int) -> int:
    """How many singular values the config keeps: a number, a share of all, or half; by the first pattern found anywhere in the path."""
    patterns = part.config.get("rank_pattern") or {}
    if not isinstance(patterns, dict):
        raise FormatError("adapter_config.json: rank_pattern", found=short(patterns), expected="regular expressions mapped to ranks")
    value: Any = part.config.get("effective_rank")
    for pattern, chosen in patterns.items():
        if _search(pattern, part.path):
            value = chosen
            break
    if value is None:
        return most // 2
    if not finite(value):
        raise FormatError("adapter_config.json: effective_rank", found=short(value), expected="a rank or a share of one")
    share = isinstance(value, float) and 0 < value <= 1
    return max(0, min(most, int(most * value if share else value)))


def _search(pattern: str, path: str) -> bool:
    try:
        return re.search(pattern, path) is not None
    except re.error as error:
        raise FormatError(f"adapter_config.json: rank_pattern: not a regular expression ({error})", found=pattern) from None


PROJECTIONS = (
    Method(
        peft_type="DEFT",
        title="a small part of the outputs replaced, or with para taken out",
        slots=("deft_[PR]",),
        settings=("r", "alpha", "para", "decomposition_method"),
        training=("deft_dropout", "init_scale", "init_weights"),
        own_biases="deft_only",
        make=_deft,
        writing=DEFT,
    ),
    Method(
        peft_type="PEANUT",
        title="what a small network makes of the weight's columns",
        slots=(r"peanut_[AB]\.weight", r"peanut_(?:en|de)coders\.\d+\.weight"),
        settings=("r", "depth", "act_fn", "scaling"),
        training=("init_weights",),
        conv1d=False,
        make=_peanut,
        writing=PEANUT,
    ),
    Method(
        peft_type="OSF",
        title="the smallest singular directions replaced",
        slots=(r"osf_svd_params\.[USV]_low",),
        settings=("effective_rank", "rank_pattern"),
        training=("target_svd_config", "init_weights"),
        conv1d=False,
        make=_osf,
        writing=OSF,
    ),
)
