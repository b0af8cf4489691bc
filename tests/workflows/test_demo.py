"""The demo: honest numbers, the same for the same seed, and measured on the files it wrote."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import Checkpoint, load
from loratools.errors import MissingExtra, OutputError
from loratools.tensors import read_tensor
from loratools.workflows.demo import accuracy, best_distance, demo, distance, forward, load_digits, new_weights, read_weights, train

RANK_8 = 3  # its row after base, fine-tune and rank 1 in a quick demo


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """A quick demo whose files were kept, and the steps it told."""
    folder, steps = tmp_path_factory.mktemp("demo") / "kept", list[str]()
    return folder, demo(keep=folder, quick=True, progress=steps.append), steps


def test_rows_say_what_was_done(kept: tuple[Path, dict[str, Any], list[str]]) -> None:
    _, result, steps = kept
    assert [row["name"] for row in result["rows"]] == ["base", "fine-tune", "rank 1", "rank 8"]
    assert [row["rank"] for row in result["rows"]] == [None, None, 1, 8]
    assert len(steps) == 4
    assert result["images"] == {"learnt_from": 1200, "held_out": 597}


def test_the_files_hold_what_the_rows_say(kept: tuple[Path, dict[str, Any], list[str]]) -> None:
    folder, result, _ = kept
    digits = load_digits(torch.Generator().manual_seed(0)).turned()
    for row, name in zip(result["rows"], ("base", "tuned", "merged-1", "merged-8"), strict=True):
        weights = {tensor: read_tensor(ref) for tensor, ref in Checkpoint(folder / name).items()}
        assert accuracy(weights, digits) == row["accuracy"]
    size = sum((folder / "rank-8" / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors"))
    assert result["rows"][RANK_8]["bytes"] == size
    assert sum(tensor.numel() for tensor in weights.values()) == result["parameters"]


def test_the_error_is_the_measured_one_and_near_the_best(kept: tuple[Path, dict[str, Any], list[str]]) -> None:
    """Against torch's whole SVD in float64; the tail of what is saved whole is nothing."""
    folder, result, _ = kept
    base, tuned = (read_weights(folder / name) for name in ("base", "tuned"))
    ranks = {row["name"]: row["rank"] for row in result["extract"]["tensors"]}
    tails = [
        torch.linalg.svdvals((tuned[name] - base[name]).double().flatten(1))[rank:].norm().item()
        for name, rank in ranks.items()
        if rank is not None
    ]
    best = torch.tensor(tails).norm().item() / distance(base, tuned)
    row = result["rows"][RANK_8]
    assert row["optimal_error"] <= best * (1 + 1e-6)  # the demo's sums are in float64, the tails above went through float32
    assert best * (1 - 1e-6) <= row["error"] <= 1.0001 * best + 1e-6  # the default tolerance, and float32 factors and weights


def test_every_change_was_applied(kept: tuple[Path, dict[str, Any], list[str]]) -> None:
    folder, result, _ = kept
    for row in result["rows"][2:]:
        assert row["applied"] == row["expected"] == 10  # five layers, weight and bias
    assert result["merge"]["applied"] == result["merge"]["expected"] == 10
    assert len(load(folder / "rank-8")) == 10


def test_a_fine_tune_is_worth_having_and_rank_8_keeps_it(kept: tuple[Path, dict[str, Any], list[str]]) -> None:
    base, tuned, _, rank_8 = (row["accuracy"] for row in kept[1]["rows"])
    assert tuned > base + 0.3
    assert rank_8 > base + 0.3


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(kept: tuple[Path, dict[str, Any], list[str]]) -> None:
    again, other = demo(quick=True), demo(quick=True, seed=1)
    assert again["rows"] == kept[1]["rows"]
    assert other["rows"] != kept[1]["rows"]


def test_the_demo_leaves_torchs_own_generator_alone() -> None:
    before = torch.random.get_rng_state()
    demo(quick=True)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_kept_does_not_replace_anything(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        demo(keep=tmp_path, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_without_scikit_learn_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra) as caught:
        demo(quick=True)
    assert str(caught.value) == (
        'the demo\'s handwritten digits come with scikit-learn, which is not installed; pip install "loratools[demo]"'
    )


def test_held_out_images_were_never_learnt_from() -> None:
    digits = load_digits(torch.Generator().manual_seed(0))
    assert not set(digits.learn.tolist()) & set(digits.held_out.tolist())
    assert sorted([*digits.learn.tolist(), *digits.held_out.tolist()]) == list(range(1797))
    assert torch.equal(digits.turned().turned().turned().turned().images, digits.images)
    assert digits.images.max() == 1
    assert digits.images.min() == 0


def test_training_changes_a_copy_of_every_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    digits, weights = load_digits(generator), new_weights(generator)
    before = {name: value.clone() for name, value in weights.items()}
    after = train(weights, digits, generator, epochs=1, rate=1e-3)
    for name, value in before.items():
        assert torch.equal(weights[name], value)
        assert not torch.equal(after[name], value)
    assert forward(after, digits.images[:3]).shape == (3, 10)


def test_distances_are_frobenius_norms() -> None:
    one = {"a.weight": torch.zeros(2, 2), "b.weight": torch.zeros(3)}
    other = {"a.weight": torch.ones(2, 2), "b.weight": torch.full((3,), 2.0)}
    assert distance(one, other) == pytest.approx(4.0, rel=1e-12)  # √(4·1 + 3·4)
    receipt = {"tensors": [{"name": "a.weight", "optimal_error": 0.5}, {"name": "b.weight", "optimal_error": 0.0}]}
    assert best_distance(receipt, one, other) == pytest.approx(1.0, rel=1e-12)  # half of ‖ones(2, 2)‖ = 2
