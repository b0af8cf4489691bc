"""TinyLoRA and FRoD as peft has them: the inverse of what `peft_decomposed` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.deltas.frod import FRoD
from loratools.deltas.tinylora import TinyLoRA
from loratools.errors import LoratoolsError
from loratools.formats.peft_tinylora import vector_of
from loratools.formats.peft_writing import Modules, Writing, Written, alike, each, one_tensor, refused, weights
from loratools.refs import Ref


def _tinylora(modules: Modules, stated: Mapping[str, Any]) -> Written:
    """Each vector under the number that its layers' projections tell, where there is more than one."""
    deltas = weights(modules, TinyLoRA)
    drawn = alike({path: delta.P is None for path, delta in deltas.items()}, "save_projection")
    tied, seed = stated.get("weight_tying", 0.0), _seed(deltas, stated, drawn=drawn)
    vectors: dict[int, dict[str, Ref]] = {}
    for path, delta in deltas.items():
        try:
            vectors.setdefault(vector_of(delta.P, seed, len(deltas), tied), {})[path] = delta.v
        except LoratoolsError as error:
            raise refused(error.fact, found=error.found).at(tensor=f"{path}.weight") from None
    shared = {f"tinylora_v.{number}": one_tensor(held, "vector of these layers") for number, held in sorted(vectors.items())}
    settings = {"u": alike({path: delta.v.spec.numel for path, delta in deltas.items()}, "u"), "r": _rank(deltas, stated)}
    settings |= {"projection_seed": seed, "weight_tying": tied, "save_projection": not drawn, "init_weights": True}
    return Written(each(deltas, _tinylora_slots), settings, shared)


def _seed(deltas: Mapping[str, TinyLoRA], stated: Mapping[str, Any], *, drawn: bool) -> int:
    if drawn:
        if len(deltas) > 1:
            path, fact = next(iter(deltas)), "projections that are drawn in an order of the layers that only the model tells"
            raise refused(fact).at(tensor=f"{path}.weight")
        return int(alike({path: delta.seed for path, delta in deltas.items()}, "projection_seed"))
    seed = stated.get("projection_seed")
    if type(seed) is int:
        return seed
    if len(deltas) > 1:
        path, fact = next(iter(deltas)), "the vectors of several layers are told apart by projection_seed, which is not known"
        raise refused(fact).at(tensor=f"{path}.weight")
    return 42


def _rank(deltas: Mapping[str, TinyLoRA], stated: Mapping[str, Any]) -> int:
    """The one r of which each layer has as much as its sides allow."""
    ranks = {path: delta.A.spec.shape[0] for path, delta in deltas.items()}
    told = stated.get("r")
    for r in (told, max(ranks.values())):
        if type(r) is int and all(ranks[path] == min(r, *delta.shape()) for path, delta in deltas.items()):
            return r
    return int(alike(ranks, "r"))


def _tinylora_slots(delta: TinyLoRA) -> dict[str, Ref]:
    return {"tinylora_A": delta.A, "tinylora_B": delta.B} | ({} if delta.P is None else {"tinylora_P": delta.P})


def _frod(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, FRoD)
    kinds: dict[str, dict[str, FRoD]] = {}
    for path, delta in deltas.items():
        kinds.setdefault(category(path), {})[path] = delta
    shared: dict[str, Ref] = {}
    for kind, held in kinds.items():
        for name, slot in (("V", "V"), ("places", "s_indices"), ("size", "s_size")):
            shared[f"frod_{slot}.{kind}"] = one_tensor({path: delta.refs()[name] for path, delta in held.items()}, f"{slot} of a kind")
    tensors = each(deltas, lambda delta: {"frod_lambda_l": delta.l, "frod_lambda_s_values": delta.values})
    return Written(tensors, {"save_projection": True, "init_weights": True}, shared)


def category(path: str) -> str:
    """The kind of a layer, by the end of its path (`tuners/frod/model.py::_category_from_key`).

    >>> [category(path) for path in ("h.0.c_fc", "layers.3.self_attn.q_proj", "layer.1.attention.output.dense")]
    ['c_fc', 'self_attn_q_proj', 'attention_output']
    """
    *before, last = path.split(".")
    if not before or before[-1].isdigit():
        return last
    return "attention_output" if [*before, last][-3:] == ["attention", "output", "dense"] else f"{before[-1]}_{last}"


TINYLORA = Writing((TinyLoRA,), _tinylora, leaves=("weight",))
FROD = Writing((FRoD,), _frod, leaves=("weight",))
