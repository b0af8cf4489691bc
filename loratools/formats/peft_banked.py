"""peft's methods whose layers share tensors of the whole adapter, stored or drawn from a seed: rows of the table in `peft_methods`.

Keys, fields and formulas were read from peft 0.21.2, `tuners/<method>/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loratools.deltas.base import Delta
from loratools.deltas.randlora import RandLoRA
from loratools.deltas.seeded import Bank, Bases, Projections
from loratools.deltas.unilora import UniLoRA
from loratools.deltas.vblora import VBLoRA
from loratools.deltas.vera import PVeRA, VeRA
from loratools.errors import FormatError, ShapeError
from loratools.formats.peft_banked_encode import PVERA, RANDLORA, UNILORA, VBLORA, VERA
from loratools.formats.peft_method import Method
from loratools.formats.peft_part import Part
from loratools.refs import Ref

INCOMPLETE = "the file is incomplete; if it was saved without projections, set save_projection to false"


def saved(part: Part, *slots: str) -> bool:
    """Whether the file holds the projections; where the config says that it does not, peft would draw its own."""
    if part.flag("save_projection", True):
        return True
    for slot in slots:
        if part.has_shared(slot) or part.get(slot) is not None:
            remedy = "set save_projection to true, if they are what it was trained with"
            raise FormatError(f"save_projection is false, so peft would drop {slot} and make its own", remedy=remedy)
    return False


def seed_of(part: Part, name: str) -> int:
    """A seed that torch's generator takes."""
    seed = part.whole(name)
    if not -(1 << 63) <= seed < 1 << 63:
        raise FormatError(f"adapter_config.json: {name}", found=seed, expected="a whole number of 64 bits")
    return seed


def _projections(part: Part, prefix: str, rank: int, bank: Callable[[int, int], Bank]) -> dict[str, Any]:
    """A and B as the file has them, or the bank that they are drawn from."""
    part.rank("r", rank, pattern=None)
    slots = f"{prefix}_A", f"{prefix}_B"
    if saved(part, *slots):
        A, B = (part.shared(slot, INCOMPLETE) for slot in slots)
        return {"A": A, "B": B}
    seed = seed_of(part, "projection_prng_key")
    part.notes.append(f"its projections are not in the file: drawn again from projection_prng_key {seed}, as peft does")
    return {"bank": bank(seed, rank)}


def _vera(part: Part) -> Delta:
    b, d = part["vera_lambda_b"], part["vera_lambda_d"]
    return VeRA(b=b, d=d, **_projections(part, "vera", d.spec.numel, lambda seed, rank: Projections(seed=seed, rank=rank)))


def _pvera(part: Part) -> Delta:
    b, d = part["pvera_lambda_b"], part["pvera_lambda_d"]
    bank = lambda seed, rank: Projections(seed=seed, rank=rank, parts=2)  # noqa: E731
    return PVeRA(b=b, d=d, **_projections(part, "pvera", d.spec.numel // 2, bank))


def _randlora(part: Part) -> Delta:
    lambdas, gamma, alpha = part["randlora_lambda"], part["randlora_gamma"], part.number("randlora_alpha")
    sparse, very = part.flag("sparse", False), part.flag("very_sparse", False)
    rank = lambdas.spec.shape[0] if lambdas.spec.shape else 0
    bank = lambda seed, rank: Bases(seed=seed, rank=rank, sparse=sparse, very_sparse=very)  # noqa: E731
    found = _projections(part, "randlora", rank, bank)
    if "bank" in found and not (sparse or very):
        part.notes.append("its bases are drawn in bfloat16, as peft does wherever torch has bfloat16")
    a, b = (part.get(f"randlora_{side}") for side in "AB")
    return RandLoRA(lambdas=lambdas, gamma=gamma, scale=alpha / max(1, rank), alpha=alpha, copy_a=a, copy_b=b, **found)


def _vblora(part: Part) -> Delta:
    vectors, topk = part.shared("vblora_vector_bank"), part.whole("topk")
    stated = (part.whole("num_vectors"), part.whole("vector_length"))
    if vectors.spec.shape != stated:
        raise ShapeError("the bank of vectors is not the config's", found=list(vectors.spec.shape), expected=list(stated))
    sides: dict[str, Ref] = {}
    for side in "AB":
        name = f"vblora_logits_{side}"
        if part.get(name) is not None:
            sides[f"logits_{side.lower()}"] = part[name]
            continue
        stored = {"places": part[f"{name}_topk_indices"], "weights": part[f"{name}_topk_weights"]}
        sides |= {f"{what}_{side.lower()}": ref for what, ref in stored.items()}
        if not part.flag("save_only_topk_weights", False):
            raise FormatError("save_only_topk_weights is false, so peft would drop what the file has", remedy="set it to true")
    delta = VBLoRA(vectors=vectors, topk=topk, **sides)
    part.rank("r", delta.facts()["rank"], pattern=None)
    return delta


def _unilora(part: Part) -> Delta:
    theta = part.shared("unilora_theta_d")
    refs = {f"{what}_{side.lower()}": part[f"unilora_{what}_{side}"] for what in ("indices", "scales") for side in "AB"}
    delta = UniLoRA(theta=theta, **refs)
    part.rank("r", delta.facts()["rank"], pattern=None)
    if theta.spec.numel != part.whole("theta_d_length"):
        raise ShapeError("θ is not of the config's length", found=theta.spec.numel, expected=part.whole("theta_d_length"))
    return delta


BANKED = (
    Method(
        peft_type="VERA",
        title="two vectors between projections that all layers share",
        slots=("vera_lambda_[bd]",),
        shared=("vera_[AB]",),
        settings=("r", "save_projection", "projection_prng_key"),
        training=("vera_dropout", "d_initial", "init_weights"),
        own_biases="vera_only",
        make=_vera,
        writing=VERA,
    ),
    Method(
        peft_type="PVERA",
        title="VeRA with a variance; a weight has the mean",
        slots=("pvera_lambda_[bd]",),
        shared=("pvera_[AB]",),
        settings=("r", "save_projection", "projection_prng_key"),
        training=("pvera_dropout", "d_initial", "init_weights", "generator_seed"),
        refused={"sample_at_inference": "adds noise to every forward: no weight edit"},
        own_biases="pvera_only",
        make=_pvera,
        writing=PVERA,
    ),
    Method(
        peft_type="RANDLORA",
        title="a sum of scaled random bases that all layers share, of full rank",
        slots=("randlora_(?:lambda|gamma|[AB])",),
        shared=("randlora_[AB]",),
        settings=("r", "randlora_alpha", "save_projection", "projection_prng_key", "sparse", "very_sparse"),
        training=("randlora_dropout", "init_weights"),
        own_biases="randlora_only",
        make=_randlora,
        writing=RANDLORA,
    ),
    Method(
        peft_type="VBLORA",
        title="a LoRA of mixtures of vectors that all layers share",
        slots=("vblora_logits_[AB](?:_topk_(?:indices|weights))?",),
        shared=("vblora_vector_bank",),
        settings=("r", "topk", "num_vectors", "vector_length", "save_only_topk_weights"),
        training=("vblora_dropout", "init_vector_bank_bound", "init_logits_std"),
        own_biases="vblora_only",
        make=_vblora,
        writing=VBLORA,
    ),
    Method(
        peft_type="UNILORA",
        title="a LoRA whose numbers are those of one short vector that all layers share",
        slots=("unilora_(?:indices|scales)_[AB]",),
        shared=("unilora_theta_d",),
        settings=("r", "theta_d_length"),
        training=("proj_seed", "unilora_dropout", "init_theta_d_bound", "init_weights"),
        needed={"save_indices": "where each number stands is not in the file, and is drawn in an order that only the model tells"},
        own_biases="unilora_only",
        make=_unilora,
        writing=UNILORA,
    ),
)
