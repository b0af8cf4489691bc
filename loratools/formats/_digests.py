"""Digests that programs of kohya's family keep in a file's metadata, of the tensors beside it.

sd-scripts `library/train_util.py` (`precalculate_safetensors_hashes`): SHA-256 of the data of the file that holds the tensors and, of the
metadata, what begins with `ss_`; and the older one of 64 KiB of that file. `library/sai_model_spec.py`: the first, after 0x.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loratools.tensorfile import Buffer, Ref
from loratools.tensorwriter import build_header, canonical

MODEL, LEGACY, SPEC = "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"
_BLANK = {MODEL: "0" * 64, LEGACY: "0" * 8, SPEC: "0x" + "0" * 64}
_START, _LENGTH = 0x100000, 0x10000  # what the older digest looks at


@dataclass(frozen=True)
class Seal:
    """Those of the digests that a file's metadata is to hold, which are taken of its tensors beside their writing.

    `blank` has them as zeros: each has one length, so that the file's header has its own before they are known.
    """

    keys: tuple[str, ...]

    @property
    def blank(self) -> dict[str, str]:
        return {key: _BLANK[key] for key in self.keys}

    def taken(self, tensors: Mapping[str, Ref], metadata: Mapping[str, str]) -> dict[str, str]:
        """The digests, in one pass over the tensors' bytes; no metadata but what begins with ss_ counts.

        >>> Seal((LEGACY,)).taken({}, {})
        {'sshs_legacy_hash': 'e3b0c442'}
        """
        model, legacy = hashlib.sha256(), hashlib.sha256()
        specs = canonical({name: ref.spec for name, ref in tensors.items()})
        header, _, _ = build_header(specs, {key: value for key, value in metadata.items() if key.startswith("ss_")})
        place = 0
        for block, data in _file(header, (tensors[name] for name in specs)):
            low, high = max(_START - place, 0), max(_START + _LENGTH - place, 0)
            legacy.update(block[low:high])
            place += len(block)
            if data:
                model.update(block)
        found = {MODEL: model.hexdigest(), LEGACY: legacy.hexdigest()[:8], SPEC: f"0x{model.hexdigest()}"}
        return {key: found[key] for key in self.keys}


def sealed(metadata: Mapping[str, str]) -> Seal:
    """The seal with kohya's digests; modelspec's only where the metadata has one."""
    return Seal((MODEL, LEGACY, *([SPEC] if SPEC in metadata else [])))


def resealed(metadata: Mapping[str, str]) -> Seal | None:
    """The seal with those digests alone that the metadata has already."""
    held = tuple(key for key in _BLANK if key in metadata)
    return Seal(held) if held else None


def _file(header: bytes, refs: Iterator[Ref]) -> Iterator[tuple[memoryview, bool]]:
    """The file's bytes in blocks, and whether they are data."""
    yield memoryview(struct.pack("<Q", len(header)) + header), False
    for ref in refs:
        for block in ref.blocks():
            yield _flat(block), True


def _flat(block: Buffer) -> memoryview:
    view = memoryview(block)
    return view.cast("B") if view.nbytes else memoryview(b"")
