"""peft's methods that add a difference of their own to each weight: rows of the table in `peft_methods`.

Keys, fields and formulas were read from peft 0.21.2, `tuners/<method>/`.
"""

from __future__ import annotations

import re

from loratools.deltas.adalora import AdaLoRA
from loratools.deltas.base import Delta
from loratools.deltas.bat import Bat
from loratools.deltas.c3a import C3A
from loratools.deltas.delora import DeLoRA
from loratools.deltas.gralora import GraLoRA
from loratools.deltas.loha import LoHa
from loratools.deltas.lokr import LoKr
from loratools.deltas.miss import MiSS
from loratools.errors import FormatError, ShapeError, UnsupportedError
from loratools.formats.peft_additive_encode import ADALORA, C3AS, DELORA, GRALORA, MISS
from loratools.formats.peft_config import REFUSED
from loratools.formats.peft_lycoris_encode import LOHA, LOKR
from loratools.formats.peft_method import Method
from loratools.formats.peft_part import Part
from loratools.formats.peft_values import short

_LYCORIS = ("rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights")


def _adalora(part: Part) -> Delta:
    A, first, alpha = part["lora_A"], part.whole("init_r"), part.number("lora_alpha")
    rank, found = _kept(part, first), A.spec.shape[0]
    if found != rank:
        raise ShapeError("the rank is not the config's, after what rank_pattern takes off", found=found, expected=rank)
    if alpha <= 0 and rank != first:
        raise UnsupportedError("lora_alpha is not positive: in training peft took init_r, once loaded the rank left", found=f"{alpha:g}")
    return AdaLoRA(A=A, B=part["lora_B"], E=part["lora_E"], alpha=alpha if alpha > 0 else float(first), first=first)


def _kept(part: Part, first: int) -> int:
    """How many of the first ranks the config keeps: `rank_pattern` has a truth value for each, by the name of the module's lora_E."""
    table = part.config.get("rank_pattern")
    masks = {} if table is None else table
    if not isinstance(masks, dict) or not all(isinstance(mask, list) and {*map(type, mask)} <= {bool} for mask in masks.values()):
        expected = "names of lora_E mapped to lists of truth values"
        raise FormatError("adapter_config.json: rank_pattern", found=short(table), expected=expected)
    kept = {re.sub(r"\.lora_E(\.[^.]+)?$", "", name): mask for name, mask in masks.items()}
    strange = [path for path in kept if path not in part.paths]
    if strange and part.path == next(iter(part.paths)):
        raise FormatError("adapter_config.json: rank_pattern names modules that the file lacks", found=short(strange))
    mask = kept.get(part.path, [True] * first)
    if len(mask) != first:
        raise FormatError(f"rank_pattern of {part.path} has not a truth value for each rank", found=len(mask), expected=first)
    return sum(mask)


def _loha(part: Part) -> Delta:
    alpha, rank = part.number("alpha", pattern="alpha_pattern"), part.rank("r", part["hada_w1_b"].spec.shape[0])
    refs = {name: part[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    return LoHa(**refs, t1=part.get("hada_t1"), t2=part.get("hada_t2"), scale=alpha / rank, alpha=alpha)


def _lokr(part: Part) -> Delta:
    """Always alpha/r, though a factor that is whole has no rank of its own; a Conv1d's whole w2 has its indices before w1's."""
    alpha, rank = part.number("alpha", pattern="alpha_pattern"), part.whole("r", pattern="rank_pattern")
    refs = {name: ref for name in ("w1", "w2", "t2") if (ref := part.get(f"lokr_{name}")) is not None}
    refs |= {f"{name}_{side}": part[f"lokr_{name}_{side}"] for name in ("w1", "w2") if name not in refs for side in "ab"}
    for name in ("w1_b", "w2_b"):
        if name in refs:
            part.rank("r", refs[name].spec.shape[0])
    exchanged = "w2" in refs and len(refs["w2"].spec.shape) == 3
    return LoKr(**refs, scale=alpha / rank, alpha=alpha, exchanged=exchanged)


def _c3a(part: Part) -> Delta:
    delta, size = C3A(kernel=part["c3a_kernel"]), part.whole("block_size", pattern="block_size_pattern")
    if delta.kernel.spec.shape[2] != size:
        raise ShapeError("the block is not as large as the config's", found=delta.kernel.spec.shape[2], expected=size)
    return delta


def _miss(part: Part) -> Delta:
    """`init_weights` is the variant: true or false the matrix as it is, "mini" a narrow one, "bat" a product with the weight."""
    block, variant = part["miss_block"], part.config.get("init_weights")
    if variant not in (True, False, "bat", "mini"):
        raise FormatError("adapter_config.json: init_weights", found=short(variant), expected='true, false, "mini" or "bat"')
    if variant == "bat":
        part.rank("r", block.spec.shape[-1], pattern=None)
        return Bat(M=block)
    delta = MiSS(block=block, mini=variant == "mini")
    rank, unit = block.spec.shape
    part.rank("r", rank, pattern=None)
    if variant == "mini" and part.whole("mini_r") != unit:
        raise ShapeError("the block is not as wide as mini_r", found=unit, expected=part.whole("mini_r"))
    return delta


def _delora(part: Part) -> Delta:
    delta = DeLoRA(A=part["delora_A"], B=part["delora_B"], strength=part["delora_lambda"], w_norm=part["delora_w_norm"])
    part.rank("r", delta.A.spec.shape[0])
    return delta


def _gralora(part: Part) -> Delta:
    hybrid = part.whole("hybrid_r")
    up, down = (part[f"gralora_{side}_general.weight"] if hybrid else None for side in "BA")
    delta = GraLoRA(A=part["gralora_A"], B=part["gralora_B"], alpha=part.number("alpha"), up=up, down=down)
    k, _, rank = delta.A.spec.shape
    part.rank("r", rank, pattern=None)
    if k != part.whole("gralora_k"):
        raise ShapeError("not as many parts as gralora_k", found=k, expected=part.whole("gralora_k"))
    if delta.rank - rank != hybrid:
        raise ShapeError("the hybrid's rank is not hybrid_r", found=delta.rank - rank, expected=hybrid)
    return delta


_OF_LORA = (
    "use_dora", "use_qalora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config", "target_parameters",
    "trainable_token_indices",
)  # fmt: skip
ADDITIVE = (
    Method(
        peft_type="ADALORA",
        title="a product with a diagonal between, ranks taken off in training",
        slots=("lora_[ABE]",),
        settings=("init_r", "lora_alpha", "rank_pattern"),
        # peft reads r, alpha_pattern and use_rslora of LoRA's config for LoRA alone
        training=(
            "lora_dropout", "megatron_config", "megatron_core", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "r",
            "alpha_pattern", "qalora_group_size", "use_rslora", "init_lora_weights", "lora_bias", "ensure_weight_tying",
            "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
        ),
        refused=REFUSED | dict.fromkeys(_OF_LORA, "a variant of LoRA that AdaLoRA has not"),
        own_biases="lora_only",
        make=_adalora,
        writing=ADALORA,
    ),
    Method(
        peft_type="LOHA",
        title="a Hadamard product of two low-rank ones",
        slots=("hada_w[12]_[ab]", "hada_t[12]"),
        settings=("r", "alpha", "rank_pattern", "alpha_pattern"),
        training=_LYCORIS,
        conv1d=False,
        make=_loha,
        writing=LOHA,
    ),
    Method(
        peft_type="LOKR",
        title="a Kronecker product of two small matrices",
        slots=("lokr_w[12](?:_[ab])?", "lokr_t2"),
        settings=("r", "alpha", "rank_pattern", "alpha_pattern"),
        training=(*_LYCORIS, "decompose_both", "decompose_factor", "rank_dropout_scale"),
        conv1d=False,
        make=_lokr,
        writing=LOKR,
    ),
    Method(
        peft_type="C3A",
        title="circulant blocks",
        slots=("c3a_kernel",),
        settings=("block_size", "block_size_pattern"),
        training=("init_weights",),
        own_biases="c3a_only",
        dotted=("block_size_pattern",),
        conv1d=False,
        make=_c3a,
        writing=C3AS,
    ),
    Method(
        peft_type="MISS",
        title="one small matrix repeated along the inputs, or multiplied with the weight's blocks",
        slots=("miss_block",),
        settings=("r", "mini_r", "init_weights"),
        training=("miss_dropout",),
        own_biases="miss_only",
        conv1d=False,
        make=_miss,
        writing=MISS,
    ),
    Method(
        peft_type="DELORA",
        title="normalized ranks under a strength of their own",
        slots=("delora_[AB]", "delora_lambda", "delora_w_norm"),
        settings=("r", "rank_pattern"),
        training=("delora_lambda", "lambda_pattern", "module_dropout", "init_weights"),  # what lambda began with
        own_biases="delora_only",
        conv1d=False,
        make=_delora,
        writing=DELORA,
    ),
    Method(
        peft_type="GRALORA",
        title="blocks that are each low-rank, and an ordinary product beside them",
        slots=("gralora_[AB]", r"gralora_[AB]_general\.weight"),
        settings=("r", "alpha", "gralora_k", "hybrid_r"),
        training=("gralora_dropout", "init_weights"),
        own_biases="gralora_only",
        make=_gralora,
        writing=GRALORA,
    ),
)
