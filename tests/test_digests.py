"""digests: those of tensors are of their bytes, those of sets of tensors do not depend on how they lie in files."""

from __future__ import annotations

from pathlib import Path

import pytest
from blake3 import blake3

from loratools.checkpoint import Checkpoint
from loratools.digests import combined_digest, digests, weights_entry
from tests.files import llama_config, llama_tensors, raw, write_checkpoint


@pytest.mark.parametrize("workers", [1, 3])
def test_a_tensors_is_of_its_bytes(base: Path, workers: int) -> None:
    assert digests(Checkpoint(base), workers) == {name: blake3(raw(tensor)).hexdigest() for name, tensor in llama_tensors().items()}


def test_a_sets_is_of_its_tensors_by_their_names(tmp_path: Path) -> None:
    tensors = llama_tensors()
    held = [digests(Checkpoint(write_checkpoint(tmp_path / f"{n}", tensors, llama_config(), shards=n))) for n in (1, 2)]
    assert combined_digest(held[0]) == combined_digest(held[1]) == combined_digest(dict(reversed(held[0].items())))
    expected = blake3(b"".join(bytes.fromhex(held[0][name]) for name in sorted(held[0]))).hexdigest()
    row = weights_entry("model.safetensors", 7, "0" * 64, held[0])
    assert row == {"path": "model.safetensors", "bytes": 7, "header_sha256": "0" * 64, "blake3": expected}
    assert combined_digest({}) == blake3().hexdigest()
