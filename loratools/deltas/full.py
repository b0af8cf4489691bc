"""Full and Replacement: a dense difference, and a tensor that takes the weight's place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Additive, Bound, Delta, Dense, Read, require_floating
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import as_tensor, read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Full(Additive):
    """W′ = W + scale·diff, diff of W's shape."""

    kind = "full"
    reproducible = True

    diff: Ref
    scale: float = 1.0

    def shape(self) -> tuple[int, ...]:
        return self.diff.spec.shape

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        read, factor = _rows_of(self.diff, base.matrix[1], device), self.scale * scale
        return lambda part: read(part).mul_(factor)

    def facts(self) -> dict[str, Any]:
        return {"scaling": self.scale}

    def norm(self) -> float:
        import torch

        return abs(self.scale) * float(torch.linalg.vector_norm(read_tensor(self.diff, torch.float64)))


@dataclass(frozen=True, eq=False, kw_only=True)
class Replacement(Delta):
    """W′ = value; if `new` the base may lack the tensor (a head), unless `alike` the rows may be more or less (a resized vocabulary)."""

    kind = "replacement"

    value: Ref
    new: bool = True
    alike: bool = False

    def spec(self, base: Spec | None) -> Spec:
        found = self.value.spec
        if found.dtype == "C64" or (base is not None and base.dtype != found.dtype):
            require_floating(found, *([base] if base else []))
        if base is None and not self.new:
            raise ShapeError("replaces a tensor that the base lacks", found=list(found.shape))
        if base is None:
            return found
        resized = not self.alike and bool(found.shape) and len(found.shape) == len(base.shape) and found.shape[1:] == base.shape[1:]
        if found.shape != base.shape and not resized:
            raise ShapeError("the saved tensor does not fit the base's", found=list(found.shape), expected=list(base.shape))
        return Spec(base.dtype, found.shape, base.encoding)

    @property
    def needs_base(self) -> bool:
        return not self.new

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        rows = _rows_of(self.value, self.value.spec.matrix[1], device)
        return lambda part, W: rows(part)


def _rows_of(ref: Ref, columns: int, device: str) -> Dense:
    import torch

    def rows(part: slice) -> Tensor:
        data = ref.rows(part.start, part.stop)
        count = part.stop - part.start
        return as_tensor(bytearray(data), Spec(ref.spec.dtype, (count, columns))).to(device=device, dtype=torch.float64)

    return rows
