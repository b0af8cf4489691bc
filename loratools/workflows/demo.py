"""demo: a real fine-tune of a small network, turned into adapters of several ranks, merged back and measured.

The images are the 1797 handwritten digits that ship with scikit-learn (the test part of E. Alpaydin and C. Kaynak, "Optical
Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998). A convolutional network learns to read them, and
all of it is then fine-tuned to read them turned by a quarter. Every number comes from the files that extract and merge wrote.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, linear, max_pool2d, relu

from loratools.errors import MissingExtra
from loratools.ops.extract import extract
from loratools.ops.merge import merge
from loratools.output import check_output
from loratools.threads import single_threaded_blas

Weights: TypeAlias = dict[str, Tensor]
Progress: TypeAlias = Callable[[str], None]

TASK = "read handwritten digits turned by a quarter"
RANKS = (1, 2, 4, 8, 16)
STORY = 8  # the rank whose receipts are shown
_TRAINED_ON = 1200  # of the 1797 images; the others are held out, and accuracy is measured on them alone
_BATCH = 64
_SHAPES = {  # (out, in, *kernel): 349 578 parameters with the biases
    "conv1": (32, 1, 3, 3),
    "conv2": (64, 32, 3, 3),
    "fc1": (256, 64 * 4 * 4),
    "fc2": (256, 256),
    "head": (10, 256),
}


@dataclass(frozen=True)
class Task:
    """Images (n, 1, 8, 8) in 0…1 and labels (n,), split into a part to learn from and one held out."""

    images: Tensor
    labels: Tensor
    learn: Tensor
    held_out: Tensor

    def turned(self) -> Task:
        """The same digits, each image turned by a quarter."""
        return Task(self.images.rot90(1, (2, 3)), self.labels, self.learn, self.held_out)


def demo(*, keep: str | Path | None = None, seed: int = 0, quick: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Train, fine-tune, extract at several ranks, merge back, measure; offline, in under two minutes on two cores.

    `keep` names a folder for the checkpoints, adapters and merged models (else they are temporary); `quick` trains less and
    tries fewer ranks; `progress` is told each step. Gives `rows` (name, rank, accuracy on held-out images of the changed task,
    bytes on disk, error ‖merged − tuned‖ / ‖tuned − base‖, a lower bound of the best error at that rank, applied, expected)
    and the `extract` and `merge` receipts of rank 8. Raises MissingExtra without scikit-learn.

    >>> result = demo(quick=True)  # doctest: +SKIP
    >>> [row["name"] for row in result["rows"]]  # doctest: +SKIP
    ['base', 'fine-tune', 'rank 1', 'rank 8']
    """
    start = time.perf_counter()
    say = progress or (lambda step: None)
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits(generator)
    with single_threaded_blas(), _room(keep) as root:
        _make_pair(root, digits, generator, epochs=2 if quick else 12, say=say)
        rows = [_checkpoint_row("base", root / "base", digits.turned()), _checkpoint_row("fine-tune", root / "tuned", digits.turned())]
        receipts: dict[str, Any] = {}
        for rank in (1, STORY) if quick else RANKS:
            say(f"extracting at rank {rank} and merging back")
            row, made = _rank_row(root, rank, digits.turned(), seed)
            rows.append(row)
            receipts = made if rank == STORY else receipts
    return {
        "task": TASK,
        "parameters": sum(math.prod(shape) + shape[0] for shape in _SHAPES.values()),
        "images": {"learnt_from": len(digits.learn), "held_out": len(digits.held_out)},
        "rows": rows,
        **receipts,
        "kept": None if keep is None else str(keep),
        "seed": seed,
        "seconds": time.perf_counter() - start,
    }


# -- the task and the network


def load_digits(generator: torch.Generator) -> Task:
    """scikit-learn's handwritten digits, split at random; MissingExtra where it is not installed."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise MissingExtra(
            "the demo's handwritten digits come with scikit-learn, which is not installed", remedy='pip install "loratools[demo]"'
        ) from None
    bunch = load()
    order = torch.randperm(len(bunch.target), generator=generator)
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    return Task(images, torch.tensor(bunch.target), order[:_TRAINED_ON], order[_TRAINED_ON:])


def new_weights(generator: torch.Generator) -> Weights:
    """Weights uniform within √(6 / fan-in) (He et al., 2015), biases zero."""
    weights: Weights = {}
    for name, shape in _SHAPES.items():
        bound = math.sqrt(6 / math.prod(shape[1:]))
        weights[f"{name}.weight"] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        weights[f"{name}.bias"] = torch.zeros(shape[0])
    return weights


def forward(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Logits (n, 10) of images (n, 1, 8, 8): two convolutions, one halving, three linear layers."""
    x = relu(conv2d(images, weights["conv1.weight"], weights["conv1.bias"], padding=1))
    x = relu(conv2d(x, weights["conv2.weight"], weights["conv2.bias"], padding=1))
    x = max_pool2d(x, 2).flatten(1)
    for name in ("fc1", "fc2"):
        x = relu(linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"]))
    return linear(x, weights["head.weight"], weights["head.bias"])


def train(weights: Weights, task: Task, generator: torch.Generator, *, epochs: int, rate: float) -> Weights:
    """The weights after AdamW on all of them, a fresh copy."""
    weights = {name: value.clone().requires_grad_() for name, value in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=rate)
    for _ in range(epochs):
        order = task.learn[torch.randperm(len(task.learn), generator=generator)]
        for first in range(0, len(order), _BATCH):
            batch = order[first : first + _BATCH]
            optimizer.zero_grad()
            cross_entropy(forward(weights, task.images[batch]), task.labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {name: value.detach() for name, value in weights.items()}


@torch.no_grad()
def accuracy(weights: Mapping[str, Tensor], task: Task) -> float:
    """The share of held-out images read right."""
    hits = forward(weights, task.images[task.held_out]).argmax(1) == task.labels[task.held_out]
    return hits.double().mean().item()


# -- files, and what is measured on them


@contextmanager
def _room(keep: str | Path | None) -> Iterator[Path]:
    """The folder to keep, new or empty; a temporary one if none is given."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="loratools-demo-") as folder:
            yield Path(folder)
        return
    path = check_output(keep, overwrite=False)
    path.mkdir(parents=True, exist_ok=True)
    yield path


def _make_pair(root: Path, digits: Task, generator: torch.Generator, *, epochs: int, say: Progress) -> None:
    say(f"training a network on {len(digits.learn)} handwritten digits")
    base = train(new_weights(generator), digits, generator, epochs=epochs, rate=1e-3)
    save_checkpoint(base, root / "base")
    say("fine-tuning all of it on digits turned by a quarter")
    save_checkpoint(train(base, digits.turned(), generator, epochs=epochs, rate=5e-4), root / "tuned")


def save_checkpoint(weights: Weights, folder: Path) -> None:
    """A folder as `save_pretrained` leaves it: model.safetensors and config.json."""
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["DigitsNet"], "model_type": "digits", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_weights(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def _checkpoint_row(name: str, folder: Path, task: Task) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in folder.iterdir())
    unmeasured = dict.fromkeys(("error", "optimal_error", "applied", "expected"))
    return {"name": name, "rank": None, "accuracy": accuracy(read_weights(folder), task), "bytes": size, **unmeasured}


def _rank_row(root: Path, rank: int, task: Task, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One rank: extracted, merged back, and its error measured from the files, not taken from the receipts."""
    adapter, merged = root / f"rank-{rank}", root / f"merged-{rank}"
    extracted = extract(root / "base", root / "tuned", adapter, rank=rank, seed=seed)
    receipt = merge(root / "base", adapter, merged)
    base, tuned, written = (read_weights(folder) for folder in (root / "base", root / "tuned", merged))
    change = distance(base, tuned)
    row = {
        "name": f"rank {rank}",
        "rank": rank,
        "accuracy": accuracy(written, task),
        "bytes": sum(entry["bytes"] for entry in extracted["outputs"]),
        "error": distance(written, tuned) / change,
        "optimal_error": best_distance(extracted, base, tuned) / change,
        "applied": receipt["applied"],
        "expected": receipt["expected"],
    }
    return row, {"extract": extracted, "merge": receipt}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """‖one − other‖ over all tensors of two models, in float64."""
    return math.hypot(*(torch.dist(one[name].double(), other[name].double()).item() for name in one))


def best_distance(receipt: Mapping[str, Any], base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> float:
    """The least distance to the fine-tune that any adapter of these ranks leaves, by the receipt's lower bound of each tensor."""
    shares = {row["name"]: row["optimal_error"] or 0.0 for row in receipt["tensors"]}
    return math.hypot(*(share * distance({name: base[name]}, {name: tuned[name]}) for name, share in shares.items()))
