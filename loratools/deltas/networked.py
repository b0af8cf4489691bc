"""Networked: a weight plus what a small network makes of its columns: PEANuT.

Zhong et al. 2024 (arXiv:2410.01870); peft 0.21.2 `tuners/peanut/layer.py` (`_compute_delta_weight`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Bound, Delta, Read, exact_rows, require_floating
from loratools.errors import ShapeError, UnsupportedError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

KNOWN = (
    "gelu", "gelu_python", "gelu_10", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "quick_gelu",
    "hardswish", "laplace", "leaky_relu", "linear", "mish", "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "sqrtsoftplus", "tanh",
)  # fmt: skip
OWN_PARAMETERS = ("prelu", "xielu")  # activations that would have to be saved with the adapter, and are not


@dataclass(frozen=True, eq=False, kw_only=True)
class Networked(Delta):
    """W′ = W + scale·B·h(W), A (r, out), B (out, r), encoders E and decoders D (r, r) each, as many of the one as of the other.

    h is f(A·W), then f(Eᵢ·h) for each encoder, then f(Dᵢ·h) for each decoder with, added to it, what the encoder as far from the end was
    given. f: `activation`, by transformers' name. Needs a pass over W. Raises ShapeError where the parts do not meet or fit, and
    UnsupportedError for an activation that is not known or has parameters of its own.
    """

    kind = "peanut"

    A: Ref
    B: Ref
    encoders: tuple[Ref, ...] = ()
    decoders: tuple[Ref, ...] = ()
    activation: str = "relu"
    scale: float = 1.0

    def __post_init__(self) -> None:
        a, b = self.A.spec.shape, self.B.spec.shape
        inner = [ref.spec.shape for ref in (*self.encoders, *self.decoders)]
        met = len(a) == len(b) == 2 and a == b[::-1] and all(shape == (a[0], a[0]) for shape in inner)
        if not met or not a[0] or len(self.encoders) != len(self.decoders):
            found = f"A {list(a)}, B {list(b)}, " + ", ".join(str(list(shape)) for shape in inner)
            raise ShapeError("the layers do not meet", found=found, expected="A [r, out], B [out, r], as many [r, r] in as out")
        if self.activation not in KNOWN:
            why = "has parameters that the adapter does not save" if self.activation in OWN_PARAMETERS else "is not known"
            raise UnsupportedError(f"the activation {self.activation} {why}", expected=", ".join(KNOWN))

    def spec(self, base: Spec | None) -> Spec:
        rows = self.B.spec.shape[0]
        if base is None or base.matrix[0] != rows:
            raise ShapeError("changes other rows than the weight has", found=rows, expected=None if base is None else base.matrix[0])
        require_floating(base, *(ref.spec for ref in self.refs().values()))
        return base

    def facts(self) -> dict[str, Any]:
        return {"rank": self.A.spec.shape[0], "scaling": self.scale}

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        import torch

        from loratools.linalg.exact import from_left
        from loratools.linalg.norms import ROWS

        assert base is not None
        A, B = (read_tensor(ref, torch.float64, device) for ref in (self.A, self.B))
        hidden = self._hidden(from_left(A, read(ROWS), slices=3))
        dense = exact_rows(B, hidden, base, self.scale)

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            return W.add_(dense(part))

        return rows

    def _hidden(self, first: Tensor) -> Tensor:
        """h, (r, columns), of A·W."""
        import torch

        from loratools.linalg.activations import ACTIVATIONS
        from loratools.linalg.exact import ExactProduct

        f = ACTIVATIONS[self.activation]
        weights = [read_tensor(ref, torch.float64, first.device.type) for ref in (*self.encoders, *self.decoders)]
        given: list[Tensor] = []
        h = f(first)
        for E in weights[: len(self.encoders)]:
            given.append(h)
            h = f(ExactProduct(E, h, slices=3).rows(0, len(E)))
        for D in weights[len(self.encoders) :]:
            h = f(ExactProduct(D, h, slices=3).rows(0, len(D))) + given.pop()
        return h

    def refs(self) -> dict[str, Ref]:
        inner = {f"{place}.{number}": ref for place in ("encoders", "decoders") for number, ref in enumerate(getattr(self, place))}
        return {"A": self.A, "B": self.B, **inner}

    def map(self, fn: Callable[[Ref], Ref]) -> Self:
        encoders, decoders = (tuple(fn(ref) for ref in refs) for refs in (self.encoders, self.decoders))
        return replace(self, A=fn(self.A), B=fn(self.B), encoders=encoders, decoders=decoders)
