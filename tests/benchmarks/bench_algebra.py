"""resize and combine of a Llama-8B-shaped all-linear adapter beside the dense routes, in one process.

Run by hand: python tests/benchmarks/bench_algebra.py [--layers N] [--rank 64] [--to 16] [--sampled N] [--svd N] [--ties]
32 layers are the whole model: 224 modules. The operations run on files, reading, digests and writing counted. The dense routes,
torch.svd_lowrank(B @ A) and with --svd torch.linalg.svd(B @ A), run in memory on one module of each of the N smallest shapes and
are scaled up. All times are CPU seconds of one thread, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096), "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336),
}  # fmt: skip


def write(folder: Path, layers: int, rank: int, seed: int) -> int:
    """An adapter whose singular values fall as k**-0.7; returns its bytes."""
    generator = torch.Generator().manual_seed(seed)
    fall = torch.arange(1, rank + 1).float() ** -0.35
    tensors = {}
    for layer in range(layers):
        for module, (m, n) in SHAPES.items():
            root = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{root}.lora_A.weight"] = torch.randn(rank, n, generator=generator) / n**0.5 * fall.unsqueeze(1)
            tensors[f"{root}.lora_B.weight"] = torch.randn(m, rank, generator=generator) / m**0.5 * fall
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": [name.rpartition(".")[2] for name in SHAPES]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return (folder / "adapter_model.safetensors").stat().st_size


def operation(arguments: str) -> dict[str, Any]:
    """An operation in a process of its own: CPU seconds and peak memory beyond its imports', and its error."""
    code = (
        "import json, time, torch, loratools, loratools.compress, loratools.ops.resize, loratools.ops.combine\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"  # ru_maxrss is inherited from the parent
        "torch.set_num_threads(1); torch.linalg.svd(torch.randn(256, 256).double()); before, start = peak(), time.process_time()\n"
        f"receipt = loratools.{arguments}\n"
        "held = sum(row['share'] for row in receipt['tensors'])\n"
        "errors = [(sum(row['share'] * row[key] ** 2 for row in receipt['tensors']) / held) ** 0.5 for key in ('error', 'optimal_error')]\n"
        "print(json.dumps({'seconds': time.process_time() - start, 'memory': (peak() - before) * 1024, 'errors': errors}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return dict(json.loads(found.stdout))


def seconds(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.thread_time()
    result = call()
    return time.thread_time() - start, result


def dense(sources: list[dict[str, Tensor]], to: int, layers: int, count: int, exact: bool) -> tuple[float, float]:
    """CPU seconds of a dense route for all modules, and the root mean square over its sample of error / ‖ΔW‖."""
    ordered = sorted(SHAPES.items(), key=lambda item: math.prod(item[1]))
    known: dict[tuple[int, ...], float] = {}
    squares, total = [], 0.0
    for module, shape in ordered:
        key = tuple(sorted(shape))
        if key not in known and len(known) < count:
            known[key], error = _one(f"base_model.model.model.layers.0.{module}", sources, to, exact)
            squares.append(error**2)
        small, large = key if key in known else max(known, key=math.prod)
        # where a shape was not sampled: as the largest that was, by m·n·min(m, n), the cost of a whole SVD
        total += known[small, large] * layers * (key[0] ** 2 * key[1]) / (small**2 * large)
    return total, math.sqrt(sum(squares) / len(squares))


def _one(root: str, sources: list[dict[str, Tensor]], to: int, exact: bool) -> tuple[float, float]:
    pairs = [(one[f"{root}.lora_B.weight"], one[f"{root}.lora_A.weight"]) for one in sources]

    def call() -> Tensor:
        D = sum((2.0 * B @ A for B, A in pairs), torch.zeros(()))
        U, S, V = (lambda u, s, vh: (u, s, vh.T))(*torch.linalg.svd(D, full_matrices=False)) if exact else torch.svd_lowrank(D, q=to)
        return (U[:, :to] * S[:to]) @ V[:, :to].T

    spent, found = seconds(call)
    D = sum((2.0 * B.double() @ A.double() for B, A in pairs), torch.zeros(()))
    return spent, float((D - found.double()).norm() / D.norm())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--to", type=int, default=16)
    parser.add_argument("--sampled", type=int, default=3, help="shapes on which torch.svd_lowrank runs; 3 are all")
    parser.add_argument("--ties", action="store_true", help="TIES of the two as well, on their dense changes; peak memory is what counts")
    parser.add_argument("--svd", type=int, default=0, help="shapes on which torch.linalg.svd runs: k_proj takes seconds, others minutes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="bench-algebra-"))
    try:
        sizes = [write(folder / name, given.layers, given.rank, seed) for seed, name in enumerate(("a", "b"))]
        print(f"{len(SHAPES) * given.layers} modules of rank {given.rank}, {sizes[0] / 1e6:.0f} MB")
        tensors = [load_file(folder / name / "adapter_model.safetensors") for name in ("a", "b")]
        common = "threads=1, overwrite=True"
        jobs = {
            f"resize to {given.to}": (f"resize('{folder}/a', '{folder}/out', rank={given.to}, {common})", 1),
            f"combine to {given.to}": (f"combine(['{folder}/a', '{folder}/b'], '{folder}/out', rank={given.to}, {common})", 2),
            "combine, lossless": (f"combine(['{folder}/a', '{folder}/b'], '{folder}/out', {common})", 2),
        }
        if given.ties:
            words = f"method='ties', density=0.2, rank={given.to}, {common}"
            jobs[f"ties to {given.to}"] = (f"combine(['{folder}/a', '{folder}/b'], '{folder}/out', {words})", 2)
        for name, (arguments, count) in jobs.items():
            found = operation(arguments)
            error, best = found["errors"]
            memory = found["memory"] / sum(sizes[:count])
            peak = f"memory {found['memory'] / 1e6:.0f} MB, {memory:.2f} × the input"
            print(f"{name:20} {found['seconds']:8.2f} s  error {error:.7f}, best {best:.7f}; {peak}", flush=True)
            routes = [("svd_lowrank(B @ A)", given.sampled, False), ("linalg.svd(B @ A)", given.svd, True)]
            for route, shapes, exact in routes if name.endswith(f"to {given.to}") and "ties" not in name else []:
                if shapes:
                    spent, lost = dense(tensors[:count], given.to, given.layers, shapes, exact)
                    ratio = spent / found["seconds"]
                    print(f"  {route:18} {spent:8.1f} s  error {lost:.7f} on its sample: {ratio:.1f} × as long", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
