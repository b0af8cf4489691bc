"""FourierFT: ΔW is the real part of the inverse Fourier transform of a matrix that is zero but for few, real coefficients.

Gao et al. 2024 (arXiv:2405.03003), section 3; peft 0.21.2 `tuners/fourierft/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.deltas.base import Dense
from loratools.deltas.drawn import Drawn
from loratools.refs import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False, kw_only=True)
class FourierFT(Drawn):
    """W′ = W + scale·Re(F⁻¹(S)), S (out, in) with the spectrum at the places drawn.

    ΔW is computed whole, once: each element hangs on every coefficient, so that rows by themselves would cost as many steps as there
    are coefficients for each element. The transform is numpy's, which no number of threads changes.
    """

    kind = "fourierft"

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        import torch

        out, width = base.shape
        whole = torch.from_numpy(self._inverse(out, width)).to(device)
        factor = self.scale * scale
        return lambda part: whole[part] * factor

    def _inverse(self, out: int, width: int) -> NDArray[np.float64]:
        """Re(F⁻¹(S)) is the transform of S's even part, which is real: of its columns it takes half."""
        import numpy as np

        found = self.coefficients(out, width)
        values, (u, v) = found.values.numpy() / 2, np.divmod(found.places.numpy(), width)
        half = np.zeros((out, width // 2 + 1), dtype=np.complex128)
        for rows, columns in ((u, v), (-u % out, -v % width)):
            inside = columns <= width // 2
            np.add.at(half.real, (rows[inside], columns[inside]), values[inside])
        return np.fft.irfft2(half, s=(out, width))
