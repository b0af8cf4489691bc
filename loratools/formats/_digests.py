"""Digests that programs of kohya's family keep in a file's metadata, of the tensors beside it.

sd-scripts `library/train_util.py` (`precalculate_safetensors_hashes`): SHA-256 of the data of the file that holds the tensors and, of the
metadata, what begins with `ss_`; and the older one of 64 KiB of that file. `library/sai_model_spec.py`: the first, after 0x.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from loratools.header import build_header
from loratools.refs import Spec

MODEL, LEGACY, SPEC = "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"
_BLANK = {MODEL: "0" * 64, LEGACY: "0" * 8, SPEC: "0x" + "0" * 64}
_START, _LENGTH = 0x100000, 0x10000  # what the older digest looks at


@dataclass(frozen=True)
class Seal:
    """Those of the digests that a file's metadata is to hold, which are taken of its tensors as they are written.

    `blank` has them as zeros: each has one length, so that the file's header has its own before they are known.
    """

    keys: tuple[str, ...]

    @property
    def blank(self) -> dict[str, str]:
        return {key: _BLANK[key] for key in self.keys}

    def begun(self, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> Taking:
        """The digests of a file of these tensors, in this order, to be shown their bytes; no metadata but what begins with ss_ counts.

        >>> Seal((LEGACY,)).begun({}, {}).found()
        {'sshs_legacy_hash': 'e3b0c442'}
        """
        header, _, _ = build_header(specs, {key: value for key, value in metadata.items() if key.startswith("ss_")})
        return Taking(self.keys, header)


class Taking:
    """The digests on their way through a file: its header, then its data, in blocks."""

    def __init__(self, keys: tuple[str, ...], header: bytes) -> None:
        self.keys, self._place = keys, 0
        self._model, self._legacy = hashlib.sha256(), hashlib.sha256()
        self._window(memoryview(struct.pack("<Q", len(header)) + header))

    def data(self, block: memoryview) -> None:
        """The next bytes of the tensors."""
        self._model.update(block)
        self._window(block)

    def _window(self, block: memoryview) -> None:
        low, high = max(_START - self._place, 0), max(_START + _LENGTH - self._place, 0)
        self._legacy.update(block[low:high])
        self._place += len(block)

    def found(self) -> dict[str, str]:
        """The digests by their keys."""
        model = self._model.hexdigest()
        found = {MODEL: model, LEGACY: self._legacy.hexdigest()[:8], SPEC: f"0x{model}"}
        return {key: found[key] for key in self.keys}


def sealed(metadata: Mapping[str, str]) -> Seal:
    """The seal with kohya's digests; modelspec's only where the metadata has one."""
    return Seal((MODEL, LEGACY, *([SPEC] if SPEC in metadata else [])))


def resealed(metadata: Mapping[str, str]) -> Seal | None:
    """The seal with those digests alone that the metadata has already."""
    held = tuple(key for key in _BLANK if key in metadata)
    return Seal(held) if held else None
