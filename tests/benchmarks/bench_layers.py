"""Forward and forward+backward of LoRALinear and DoRALinear beside peft's layers, in one process, interleaved.

    python tests/benchmarks/bench_layers.py [--device cpu|cuda] [--dtype float32] [--quick]

4096×4096, rank 16, a batch of 8×512, no dropout. Each case is timed in rounds that take every variant once, so that all meet
the same moments of the machine; medians are printed. Peak memory is what one step holds beyond the parameters and the input: on a
CUDA device as its allocator counts it, on the CPU as the sum of live tensors that a profiler of the dispatcher counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loratools.layers import layer_for

RANK, ALPHA = 16, 32


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive, but for those of `before`, and the most there were at once."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key in self._seen or not storage.nbytes():
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def ours(base: nn.Linear, dora: bool) -> nn.Module:
    return layer_for(base, dora=dora, rank=RANK, alpha=ALPHA)


def theirs(base: nn.Linear, dora: bool) -> nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=dora, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    return model.base_model.model[0]  # type: ignore[no-any-return,index,union-attr]


def alike(mine: nn.Module, other: Any) -> None:
    """The same factors in both, so that they compute the same."""
    with torch.no_grad():
        mine.lora_A.copy_(other.lora_A["default"].weight)
        mine.lora_B.copy_(other.lora_B["default"].weight)
        if hasattr(mine, "magnitude"):
            mine.magnitude.copy_(other.lora_magnitude_vector["default"].weight)


def step(layer: nn.Module, x: Tensor, g: Tensor, backward: bool) -> Callable[[], None]:
    def run() -> None:
        for parameter in (*layer.parameters(), x):
            parameter.grad = None
        out = layer(x)
        if backward:
            out.backward(g)

    return run


def seconds(run: Callable[[], None], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak(run: Callable[[], None], before: list[Tensor], cuda: bool) -> float:
    """MiB that one step holds at once, beyond what was there before."""
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    with Live(before) as live:
        run()
    return live.peak / 2**20


def busy(run: Callable[[], None]) -> float:
    """Milliseconds that a CUDA device is at work in one step, whatever waits for its launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in found.key_averages()) / 5e3


def measure(device: str, dtype: torch.dtype, size: int, tokens: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    cuda = device.startswith("cuda")
    torch.manual_seed(0)
    x = torch.randn(*tokens, size, device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(*tokens, size, device=device, dtype=dtype)
    rows = []
    for dora in (False, True):
        base = nn.Linear(size, size, bias=False, device=device, dtype=dtype)
        other = theirs(nn.Linear(size, size, bias=False, device=device, dtype=dtype), dora)
        other.get_base_layer().load_state_dict(base.state_dict())  # type: ignore[operator]
        mine = ours(base, dora)
        alike(mine, other)
        difference = float((mine(x) - other(x)).detach().norm() / other(x).detach().norm())
        for backward in (False, True):
            runs = {"loratools": step(mine, x, g, backward), "peft": step(other, x, g, backward)}
            times: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(rounds + 2):
                for name in sorted(runs, reverse=bool(turn % 2)):
                    taken = seconds(runs[name], cuda)
                    if turn >= 2:  # the first two warm up
                        times[name].append(taken)
            medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
            memory = {name: peak(runs[name], [x, g, *layer.parameters()], cuda) for name, layer in (("loratools", mine), ("peft", other))}
            rows.append(
                {
                    "layer": "DoRALinear" if dora else "LoRALinear", "pass": "forward+backward" if backward else "forward",
                    "ms": medians, "busy": {name: busy(run) for name, run in runs.items()} if cuda else None,
                    "faster": medians["peft"] / medians["loratools"], "MiB": memory, "difference": difference,
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRALinear and DoRALinear beside peft's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"], help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="1024×1024, a batch of 4×128, three rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    size, tokens, rounds = (1024, (4, 128), 3) if options.quick else (4096, (8, 512), 30 if cuda else 5)
    dtypes = options.dtype or (["float32", "bfloat16"] if cuda else ["float32"])
    place = torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    found = {dtype: measure(options.device, getattr(torch, dtype), size, tokens, rounds) for dtype in dtypes}
    if options.json:
        print(json.dumps({"device": place, "torch": torch.__version__, "peft": peft.__version__, "size": size, "rows": found}, indent=2))
        return
    print(f"{size}×{size}, rank {RANK}, batch {tokens[0]}×{tokens[1]}; {place}; torch {torch.__version__}, peft {peft.__version__}")
    print("| dtype | layer | pass | loratools ms | peft ms | faster | loratools MiB | peft MiB | outputs differ by |", end="")
    print(" loratools GPU ms | peft GPU ms |" if cuda else "")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|" + ("--:|--:|" if cuda else ""))
    for dtype, rows in found.items():
        for row in rows:
            ms, memory = row["ms"], row["MiB"]
            print(
                f"| {dtype} | {row['layer']} | {row['pass']} | {ms['loratools']:.2f} | {ms['peft']:.2f} | {row['faster']:.2f} × "
                f"| {memory['loratools']:.0f} | {memory['peft']:.0f} | {row['difference']:.1e} |"
                + (f" {row['busy']['loratools']:.2f} | {row['busy']['peft']:.2f} |" if cuda else "")
            )


if __name__ == "__main__":
    main()
