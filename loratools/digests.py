"""The identity of weights is their content: BLAKE3 of each tensor's bytes, and of a set of tensors that of their digests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from blake3 import blake3

from loratools import threads
from loratools.refs import Ref


def digests(refs: Mapping[str, Ref], workers: int = 1) -> dict[str, str]:
    """BLAKE3 of each tensor's bytes."""
    found: dict[str, str] = {}

    def digest(name: str, ref: Ref) -> None:
        made = blake3()
        for block in ref.blocks():
            made.update(block)
        found[name] = made.hexdigest()

    threads.run_all([partial(digest, name, ref) for name, ref in refs.items()], workers)
    return found


def combined_digest(digests: Mapping[str, str]) -> str:
    """BLAKE3 of the tensors' digests, as bytes, in the order of their names: the identity of a set of weights."""
    digest = blake3()
    for name in sorted(digests):
        digest.update(bytes.fromhex(digests[name]))
    return digest.hexdigest()


def weights_entry(name: str, size: int, header_sha256: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """The row of a file of weights in a receipt, from its tensors' digests."""
    return {"path": name, "bytes": size, "header_sha256": header_sha256, "blake3": combined_digest(digests)}
