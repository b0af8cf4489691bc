"""ties: tensors that are one in the model or its file stay so where they are changed alike; else it takes --untie, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.checkpoint import Checkpoint
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.deltas.rows import Rows
from loratools.errors import UnsupportedError
from loratools.plan import Plan
from loratools.tensors import to_ref
from loratools.ties import check_shared, replaces, tie
from tests.files import llama_config, llama_tensors, write_checkpoint
from tests.strategies import randn

EMBEDDING, HEAD = TIED = "model.embed_tokens.weight", "lm_head.weight"


def low(seed: int) -> LowRank:
    return LowRank(A=to_ref(randn(2, 8, seed=seed)), B=to_ref(randn(17, 2, seed=seed)), alpha=2.0)


def whole(seed: int) -> Replacement:
    return Replacement(value=to_ref(randn(17, 8, seed=seed)))


def rows(seed: int) -> Rows:
    return Rows(indices=(3, 5), values=to_ref(randn(2, 8, seed=seed)))


@pytest.fixture
def tied(tmp_path: Path) -> Checkpoint:
    """A Llama whose head is its embedding, and is not stored."""
    return Checkpoint(write_checkpoint(tmp_path / "tied", llama_tensors(head=False), llama_config(tie_word_embeddings=True)))


def plan(**changes: Delta) -> Plan:
    names = {"embedding": EMBEDDING, "head": HEAD}
    return Plan({names[word]: [(delta, 1.0)] for word, delta in changes.items()}, expected=len(changes))


@pytest.mark.parametrize("make", [low, whole, lambda seed: Chain(first=whole(seed), then=low(seed))], ids=["lora", "saved", "both"])
def test_alike_they_stay_tied(tied: Checkpoint, make: Any) -> None:
    """Equal bytes are alike, in tensors of their own; the head, which is not stored, is written by its embedding."""
    made = plan(embedding=make(1), head=make(1))
    tie(made, tied, TIED, untie=False)
    assert list(made.changes) == [EMBEDDING] and made.without_effect == 1 and made.config == {}
    assert made.notes == [f"{HEAD} stays tied to {EMBEDDING}: the adapter changes both alike"]


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"embedding": low(1)}, f"{EMBEDDING} alone"),
        ({"head": low(1)}, f"{HEAD} alone"),
        ({"embedding": low(1), "head": low(2)}, "each in a way of its own"),
        ({"embedding": low(1), "head": whole(1)}, "each in a way of its own"),
    ],
)  # fmt: skip
def test_unlike_they_take_untie(tied: Checkpoint, changes: dict[str, Delta], how: str) -> None:
    with pytest.raises(UnsupportedError, match=f"changes {how}; give --untie"):
        tie(plan(**changes), tied, TIED, untie=False)
    made = plan(**changes)
    tie(made, tied, TIED, untie=True)
    assert made.config == {"tie_word_embeddings": False} and made.sources == {HEAD: EMBEDDING}
    assert set(made.changes) == {HEAD, *([EMBEDDING] if "embedding" in changes else [])}, "both are written, one as it was"


def test_an_encoders_and_decoders_embedding_is_never_untied(tied: Checkpoint) -> None:
    made = Plan({"shared.weight": [(low(1), 1.0)]})
    with pytest.raises(UnsupportedError, match="the embedding of encoder and decoder"):
        tie(made, tied, ("shared.weight", HEAD), untie=True)


def test_the_base_of_one_that_was_saved_is_the_others_too(tied: Checkpoint) -> None:
    saved = whole(1)
    made = plan(embedding=Chain(first=saved, then=low(2)))
    tie(made, tied, TIED, untie=True)
    assert made.changes[HEAD] == [(saved, 1.0)] and made.expected == 2
    made = plan(embedding=Chain(first=saved, then=low(2)), head=low(3))
    tie(made, tied, TIED, untie=True)
    ((found, _),) = made.changes[HEAD]
    assert isinstance(found, Chain) and found.first is saved


def test_trained_rows_of_an_embedding_are_its_heads(tied: Checkpoint) -> None:
    made = plan(embedding=rows(1))
    tie(made, tied, TIED, untie=False)
    assert HEAD not in made.changes and made.notes[0].startswith(f"{HEAD} stays tied")
    with pytest.raises(UnsupportedError, match="trained rows of"):
        tie(plan(embedding=rows(1), head=Chain(first=low(1), then=low(1))), tied, TIED, untie=True)
    made = plan(embedding=rows(1), head=low(2))
    tie(made, tied, TIED, untie=True)
    assert [delta.kind for delta, _ in made.changes[HEAD]] == ["rows", "lora"] and made.expected == 3


def test_names_of_one_tensor_in_a_pickle(tmp_path: Path) -> None:
    tensor = torch.ones(17, 8)
    (tmp_path / "b").mkdir()
    torch.save({"a.weight": tensor, "b.weight": tensor}, tmp_path / "b" / "pytorch_model.bin")
    checkpoint = Checkpoint(tmp_path / "b")
    assert checkpoint.shared
    check_shared(Plan({name: [(low(1), 1.0)] for name in ("a.weight", "b.weight")}), checkpoint, untie=False)
    for changes in ({"a.weight": [(low(1), 1.0)]}, {"a.weight": [(low(1), 1.0)], "b.weight": [(low(1), 0.5)]}):
        with pytest.raises(UnsupportedError, match=r"one tensor in the base's file under the names a\.weight, b\.weight"):
            check_shared(Plan(dict(changes)), checkpoint, untie=False)
        check_shared(Plan(dict(changes)), checkpoint, untie=True)
    check_shared(Plan({"other": [(low(1), 1.0)]}), checkpoint, untie=False)


def test_what_leaves_nothing_of_the_base() -> None:
    assert replaces(whole(1)) and replaces(Chain(first=whole(1), then=low(1)))
    assert not replaces(low(1)) and not replaces(Chain(first=low(1), then=low(1)))
