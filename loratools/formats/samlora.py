"""SAM-LoRA and LoRA-ViT: queries and values of a vision transformer's blocks, counted: `w_a_000`, `w_b_000`, `w_a_001`, …

    w_a_NNN (r, dim)   w_b_NNN (dim, r)    NNN = 2·block of its queries, 2·block + 1 of its values; ΔW = scale · w_b·w_a
    fc_DIMin_CLASSESout (classes, dim)     the head's weight, whole; its bias is not in the file

Of a fused qkv (3·dim, dim) they are the first and the last dim rows. The scale is 1 in Sam_LoRA; in LoRA-ViT it is `alpha // r`, a
division of whole numbers. Read from MathieuNlp/Sam_LoRA `src/lora.py` (788decc) and JamesQFreeman/LoRA-ViT `lora.py` (45be249).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, MatchError, ShapeError, raise_all
from loratools.formats._derived import Joined, slots_apart
from loratools.formats._scale import ALPHA, exact_alpha, number
from loratools.formats.base import Container, ReadOptions
from loratools.refs import Ref, Spec

NAME = "samlora"
MARKS = ("w_a_", "w_b_", "fc_")
HEAD = "head.weight"
_KEY = re.compile(r"w_(?P<side>[ab])_(?P<index>\d{3}|[1-9]\d{3,})")
_HEAD = re.compile(r"fc_(?P<into>\d+)in_(?P<out>\d+)out")
DECODER = ("prompt_encoder.", "mask_decoder.")  # of a SAM that was trained whole beside its encoder's LoRA
FUSED = re.compile(r"(?P<root>(?:.+\.)?(?:blocks|layers))\.(?P<block>\d+)\.attn\.qkv\.weight")
APART = re.compile(r"(?P<root>(?:.+\.)?blocks)\.(?P<block>\d+)\.attn\.proj_(?P<side>[qv])\.weight")
_SLOTS = (True, False, True)


def detect(container: Container) -> bool:
    """Whether it holds counted factors."""
    return any(_KEY.fullmatch(key) for key in container.tensors)


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter in such a file: a change of each block's fused weight, under the block's number, which a base's blocks give a name.

    Raises FormatError for strays and for factors without their other half, ShapeError for ones that do not meet, AmbiguousError for a
    LoRA-ViT, whose file has a head, without an alpha.
    """
    options = options or ReadOptions()
    try:
        factors, others, faults = _sorted(container.tensors)
        scale, notes = _scale(container, options, factors, vit=any(_HEAD.fullmatch(key) for key in others))
        blocks: list[tuple[LowRank, LowRank]] = []
        for block in range((max(factors, default=-1) + 2) // 2):
            try:
                query, value = (_pair(factors, 2 * block + place, scale) for place in (0, 1))
                blocks.append(_alike(block, query, value))
            except LoratoolsError as error:
                faults.append(error)
        deltas: dict[str, Delta] = {f"block:{block}.weight": _fused(*pair) for block, pair in enumerate(blocks)}
        for key, ref in others.items():
            if _HEAD.fullmatch(key):
                faults += _check_head(key, ref)
                notes += (f"{key} is the head's weight alone: its bias is not in the file",)
            deltas[HEAD if _HEAD.fullmatch(key) else key] = Replacement(value=ref)
        raise_all(faults)
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    metadata = {"safetensors": dict(container.metadata)}
    return Adapter(
        deltas, metadata, {}, container.path, NAME, container.files, notes=notes, numbered=Blocks(tuple(blocks)),
    )  # fmt: skip


def _sorted(tensors: Mapping[str, Ref]) -> tuple[dict[int, dict[str, Ref]], dict[str, Ref], list[LoratoolsError]]:
    factors: dict[int, dict[str, Ref]] = {}
    others: dict[str, Ref] = {}
    faults: list[LoratoolsError] = []
    for key, ref in tensors.items():
        match = _KEY.fullmatch(key)
        if match is not None:
            factors.setdefault(int(match["index"]), {})[match["side"]] = ref
        elif _HEAD.fullmatch(key) or key.startswith(DECODER):
            others[key] = ref
        else:
            expected = "w_a_NNN, w_b_NNN, fc_DIMin_CLASSESout or a tensor of SAM's decoder"
            faults.append(FormatError("not a key of this format", tensor=key, expected=expected))
    heads = [key for key in others if _HEAD.fullmatch(key)]
    faults += [FormatError("a second head", tensor=key, found=heads[0]) for key in heads[1:]]
    return factors, others, faults


def _pair(factors: Mapping[int, Mapping[str, Ref]], index: int, scale: float) -> LowRank:
    pair, beside = factors.get(index, {}), factors.get(index ^ 1, {})
    for side in "ab":
        if side not in pair:
            whose = "queries" if index % 2 == 0 else "values"
            here = next((f"w_{other}_{place:03}" for place, held in ((index, pair), (index ^ 1, beside)) for other in held), None)
            fact = f"has no w_{side}_{index:03} beside it, of its block's {whose}"
            raise FormatError(fact, tensor=here or f"w_{side}_{index:03}", remedy="the file is incomplete")
    A, B = pair["a"], pair["b"]
    a, b = A.spec.shape, B.spec.shape
    strange = next((f"w_{side}_{index:03}" for side, ref in pair.items() if not ref.spec.floating), None)
    if strange is not None:
        raise FormatError("not a floating-point tensor", tensor=strange, found=pair[strange[2]].spec)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[1] != b[0] or a[0] > a[1]:
        found, remedy = f"w_a {list(a)}, w_b {list(b)}", "they are swapped" if a == b[::-1] and len(a) == 2 else None
        raise ShapeError("w_a and w_b do not meet", tensor=f"w_a_{index:03}", found=found, expected="[r, dim], [dim, r]", remedy=remedy)
    try:
        return LowRank(A=A, B=B, alpha=exact_alpha(scale, a[0]), layer="linear")
    except LoratoolsError as error:
        raise error.at(tensor=f"w_a_{index:03}") from None


def _alike(block: int, query: LowRank, value: LowRank) -> tuple[LowRank, LowRank]:
    if query.A.spec.shape != value.A.spec.shape:
        found, expected = list(value.A.spec.shape), f"{list(query.A.spec.shape)}, as its queries have"
        fact = "a block's values are changed at another size than its queries"
        raise ShapeError(fact, tensor=f"w_a_{2 * block + 1:03}", found=found, expected=expected)
    return query, value


def _fused(query: LowRank, value: LowRank) -> LowRank:
    """Both as one change of the fused weight: the A's one above the other, each B's rows in columns of its own."""
    plain = (False, False)
    A, B = Joined((query.A, value.A), 0, negated=plain), Joined((query.B, value.B), 0, negated=plain)
    return LowRank(A=A, B=slots_apart(B, _SLOTS), alpha=exact_alpha(query.scaling, 2 * query.rank), layer="linear")


def _check_head(key: str, ref: Ref) -> list[LoratoolsError]:
    match = _HEAD.fullmatch(key)
    assert match is not None
    expected = [int(match["out"]), int(match["into"])]
    wrong = list(ref.spec.shape) != expected
    return [ShapeError("not the shape that its name tells", tensor=key, found=list(ref.spec.shape), expected=expected)] if wrong else []


def _scale(
    container: Container, options: ReadOptions, factors: Mapping[int, Mapping[str, Ref]], *, vit: bool
) -> tuple[float, tuple[str, ...]]:
    """The factor of w_b·w_a, and what to say of it."""
    alpha = options.alpha if options.alpha is not None else number(container.metadata, ALPHA)
    rank = next((pair["a"].spec.shape[0] for pair in factors.values() if "a" in pair and pair["a"].spec.shape), 1)
    if alpha is None and vit:
        fact = "alpha is not in the file: it is an argument of LoRA-ViT's class, which scales by alpha // r"
        raise AmbiguousError(fact, remedy="give it with --alpha-in A")
    if alpha is None:
        return 1.0, ("scale 1, as Sam_LoRA has it; of a LoRA-ViT's file --alpha-in A tells it",)
    if options.scale == "alpha" or not rank:
        return alpha, ()
    if options.scale == "alpha/r":
        return alpha / rank, ()
    if alpha < rank:
        return 0.0, (f"scale 0: LoRA-ViT divides whole numbers, and alpha {alpha:g} // rank {rank} is 0; --scale alpha/r divides exactly",)
    return float(alpha // rank), ()


# -- which weight a number means


@dataclass(frozen=True)
class Blocks:
    """The changes of queries and values, block by block."""

    pairs: tuple[tuple[LowRank, LowRank], ...]

    def __call__(self, deltas: Mapping[str, Delta], base: Mapping[str, Spec]) -> Mapping[str, Delta]:
        """The deltas under a base's names: fused weights', or those of queries and values where the base has them apart.

        Raises MatchError for a base without such blocks, AmbiguousError where it has several transformers, or other blocks in number:
        which of them are meant is not in the file.
        """
        own = [name for name in deltas if re.fullmatch(r"block:\d+\.weight", name)]
        found = {name: delta for name, delta in deltas.items() if name not in own}
        if HEAD in found and HEAD not in base and "fc.weight" in base:
            found = {"fc.weight" if name == HEAD else name: delta for name, delta in found.items()}
        if not own:
            return found
        root, numbers, fused = self._root(own[0], base)
        if len(numbers) != len(own):
            fact = "changes another number of blocks than the base has, and which of them is not in the file"
            remedy = f"name each: --rename block:0={root}.N.attn.qkv" if fused else None
            raise AmbiguousError(fact, tensor=own[0], found=len(own), expected=f"{len(numbers)} of {root}", remedy=remedy)
        for name, block, (query, value) in zip(own, numbers, self.pairs, strict=True):
            if fused:
                found[f"{root}.{block}.attn.qkv.weight"] = deltas[name]
            else:
                found |= {f"{root}.{block}.attn.proj_q.weight": query, f"{root}.{block}.attn.proj_v.weight": value}
        return found

    def _root(self, name: str, base: Mapping[str, Spec]) -> tuple[str, list[int], bool]:
        """What stands before the blocks' numbers, the numbers, and whether queries, keys and values are one weight."""
        roots: dict[tuple[str, bool], set[int]] = {}
        for other in base:
            for grammar, fused in ((FUSED, True), (APART, False)):
                if match := grammar.fullmatch(other):
                    roots.setdefault((match["root"], fused), set()).add(int(match["block"]))
        if not roots:
            fact, expected = "the base has no blocks with attention that could be meant", "….blocks.N.attn.qkv.weight"
            raise MatchError(fact, tensor=name, found=f"a base with {', '.join(list(base)[:2])}, …", expected=expected)
        if len(roots) > 1:
            raise AmbiguousError("the base has several transformers", tensor=name, found=", ".join(root for root, _ in roots))
        (root, fused), numbers = next(iter(roots.items()))
        return root, sorted(numbers), fused
