"""The fused q, k and v of litgpt taken apart, in both of its orders of rows."""

from __future__ import annotations

from loratools.errors import AmbiguousError, ShapeError
from loratools.formats._derived import Derived
from loratools.formats._heads import Heads, Rows, rows_of
from loratools.formats._pieces import Piece, picked
from loratools.refs import Ref
from loratools.sliced import Sliced


def parts_of(
    order: str, A: Ref, B: Ref, alpha: float, heads: Heads, enabled: tuple[bool, ...] | None, *, dated: bool
) -> list[tuple[int, Piece]]:
    """(slot, its change) of each of q, k and v that is enabled.

    Raises ShapeError for factors of other sizes than the heads', AmbiguousError where which are enabled is not told, and for some of them
    in the older order in a file that is not `dated`: one without hyperparameters may be of before 2024-02-05, when rows were laid wrongly.
    """
    rank = B.spec.shape[1]
    count, odd = divmod(A.spec.shape[0], rank)
    on = _slots(count, B.spec.shape[0], heads, enabled)
    if odd or len(on) != count or sum(heads.slots()[slot] for slot in on) != B.spec.shape[0]:
        found = f"lora_A {list(A.spec.shape)}, lora_B {list(B.spec.shape)}"
        expected = f"{rank} rows of A and {heads.slots()} of B for each of q, k, v that is enabled: {len(on)}"
        raise ShapeError("not the factors of q, k and v of the model's heads", found=found, expected=expected)
    ends = [sum(heads.slots()[slot] for slot in on[: index + 1]) for index in range(count)]
    starts = [0, *ends[:-1]]
    if order == "interleaved" and count == 3:
        return [(slot, _mixed(A, B, alpha, rows_of("grouped", slot, heads.fused, heads), ends)) for slot in on]
    if order == "interleaved" and not dated:
        fact = "how its rows lie among q, k and v changed on 2024-02-05, and nothing tells when it was written"
        raise AmbiguousError(fact, remedy="files with a hyperparameters.yaml beside them are newer: put it there")
    cut = [list(range(start, end)) for start, end in zip(starts, ends, strict=True)]
    own = [Sliced(A, slice(index * rank, (index + 1) * rank)) for index in range(count)]
    return [(slot, Piece(factor, picked(B, rows), alpha)) for slot, factor, rows in zip(on, own, cut, strict=True)]


def _slots(count: int, rows: int, heads: Heads, enabled: tuple[bool, ...] | None) -> list[int]:
    if enabled is not None:
        return [slot for slot, flag in enumerate(enabled) if flag]
    if count == 3:
        return [0, 1, 2]
    raise AmbiguousError(
        "which of q, k and v are enabled is not in the file", found=f"{count} of them, {rows} rows",
        remedy="put litgpt's hyperparameters.yaml beside it, or say with --enable-lora, such as 1,0,1",
    )  # fmt: skip


def _mixed(A: Ref, B: Ref, alpha: float, rows: Rows, ends: list[int]) -> Piece:
    """Rows of the older order with all three enabled: row i of B, with the factor A of the slot in whose stretch i lies."""
    rank, count = B.spec.shape[1], len(ends)
    blocks = [next(block for block, end in enumerate(ends) if row < end) for row in rows]
    used = sorted(set(blocks))

    def make(found):  # type: ignore[no-untyped-def]
        import numpy as np

        made = np.zeros((len(rows), len(used), rank), found.dtype)
        made[range(len(rows)), [used.index(block) for block in blocks]] = found[rows]
        return made.reshape(len(rows), len(used) * rank)

    wide = rank * len(used)
    factor = A if len(used) == count else Derived(A, (wide, A.spec.shape[1]), lambda found: _chosen(found, used, rank))
    return Piece(factor, Derived(B, (len(rows), wide), make), alpha * len(used))


def _chosen(found, used: list[int], rank: int):  # type: ignore[no-untyped-def]
    return found.reshape(-1, rank, found.shape[1])[used].reshape(len(used) * rank, found.shape[1])
