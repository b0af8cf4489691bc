"""peft's methods that add a difference of their own to each weight: rows of the table in `peft_methods`.

Keys, fields and formulas were read from peft 0.21.2, `tuners/<method>/`.
"""

from __future__ import annotations

from loratools.deltas.base import Delta
from loratools.deltas.loha import LoHa
from loratools.deltas.rows import Rows
from loratools.formats.peft_method import Method, Part


def _loha(part: Part) -> Delta:
    alpha, rank = part.number("alpha", pattern="alpha_pattern"), part.rank("r", part["hada_w1_b"].spec.shape[0])
    refs = {name: part[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    return LoHa(**refs, t1=part.get("hada_t1"), t2=part.get("hada_t2"), scale=alpha / rank, alpha=alpha)


def _tokens(part: Part) -> Delta:
    return Rows(values=part["trainable_tokens_delta"], indices=part.naturals("token_indices"))


ADDITIVE = (
    Method(
        peft_type="LOHA",
        title="a Hadamard product of two low-rank ones",
        slots=("hada_w[12]_[ab]", "hada_t[12]"),
        settings=("r", "alpha", "rank_pattern", "alpha_pattern"),
        training=("rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"),
        make=_loha,
    ),
    Method(
        peft_type="TRAINABLE_TOKENS",
        title="rows of an embedding in the place of its own",
        slots=("trainable_tokens_delta",),
        settings=("token_indices",),
        training=("init_weights",),
        tying=True,
        make=_tokens,
    ),
)
