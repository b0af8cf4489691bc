"""Adapters and checkpoints of random numbers, as large as a test may have them, for pictures: some spectra steep, some magnitudes moved.

python tests/pictures.py     writes the pictures of spec/pictures.md anew
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path

import torch
from torch import Tensor

from tests.files import peft_config, write_adapter, write_checkpoint

SHAPES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (16, 64), "self_attn.v_proj": (16, 64), "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (176, 64), "mlp.up_proj": (176, 64), "mlp.down_proj": (64, 176),
}  # fmt: skip
Shapes = Mapping[str, tuple[int, int]]


def llama(layers: int, modules: tuple[str, ...] = tuple(SHAPES)) -> dict[str, tuple[int, int]]:
    """The modules of a small model with Llama's names."""
    return {f"model.layers.{layer}.{module}": SHAPES[module] for layer in range(layers) for module in modules}


def weights(shapes: Shapes) -> dict[str, Tensor]:
    """A base's tensors by their names, some layers larger than others."""
    return {f"{name}.weight": _random(shape, index) / 8 for index, (name, shape) in enumerate(shapes.items())}


def tuned(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A fine-tune of it: a steep change of rank 12, and a little noise."""
    steep = 0.6 ** torch.arange(12.0)
    return {
        name: W + (_random((W.shape[0], 12), index) * steep) @ _random((12, W.shape[1]), index + 7) / 100 + _random(W.shape, index) / 1500
        for index, (name, W) in enumerate(base.items())
    }


def adapter(folder: Path, shapes: Shapes, rank: int, base: Mapping[str, Tensor] | None = None) -> Path:
    """LoRA with falling spectra on all of them; with a base DoRA, whose magnitudes move more in later layers."""
    tensors = {}
    for index, (name, (rows, columns)) in enumerate(shapes.items()):
        falling = 0.75 ** torch.arange(float(rank)) * (0.3 + 0.7 * math.sin(1 + 0.37 * index) ** 2)
        tensors[f"base_model.model.{name}.lora_A.weight"] = _random((rank, columns), index) / 20
        tensors[f"base_model.model.{name}.lora_B.weight"] = _random((rows, rank), index + 1) / 20 * falling
        if base is not None:
            layer, norms = int(name.split(".")[2]), base[f"{name}.weight"].norm(dim=1)
            moved = 0.01 * math.sin(layer / 3) + _random((rows,), index) * (0.003 + 0.001 * layer)
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = norms * (1 + moved)
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    config = peft_config(r=rank, lora_alpha=2 * rank, target_modules=targets, use_dora=base is not None)
    return write_adapter(folder, tensors, config)


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def main(target: Path) -> None:
    """The pictures of spec/pictures.md, by the commands it names, in a folder of their own."""
    from loratools.cli import run
    from loratools.ops import _figure

    _figure.DPI = 90  # small enough to keep

    with tempfile.TemporaryDirectory() as place, chdir(place):
        few = llama(6, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"))
        base = weights(few)
        adapter(Path("adapter"), llama(1, ("self_attn.q_proj", "self_attn.v_proj")), 8)
        adapter(Path("dora"), few, 12, base)
        write_checkpoint(Path("base"), base)
        write_checkpoint(Path("tuned"), tuned(base))
        run(["inspect", "adapter", "--plot", str(target / "plot-two.png")])
        run(["inspect", "dora", "--base", "base", "--plot", str(target / "plot-dora.png")])
        run(["extract", "base", "tuned", "-o", "out", "--rank", "6", "--plot", str(target / "plot-extract.png"), "-q"])


if __name__ == "__main__":
    main(Path(__file__).parents[1] / "spec" / "pictures")
    sys.exit(0)
