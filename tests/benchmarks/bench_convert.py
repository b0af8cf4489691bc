"""convert of a large adapter between formats beside `cp` and `sync` of its file; times, ratios, CPU seconds, peak memory.

usage: python tests/benchmarks/bench_convert.py ROOM [--megabytes 1000] [--runs 5] [--to kohya] [--quiet 0.4]

An adapter of so many megabytes is made in ROOM: rank 256, Llama-shaped, float32. Runs alternate in one process, imports aside, digests and
fsync included, and the ratio is the median of the ratios of neighbours. What was written is removed before the next run: on a virtual
machine, pages that were just given back are had at once and others are not, and both are to begin alike. Formats of the same
orientation only move bytes: the factors' are compared in the end. --quiet waits, before each pair, for others to leave the machine so much
of one processor, and leaves pairs out beside which they took more (Linux).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

RANK, WIDTH = 256, 4096


def make_adapter(out: Path, size: float) -> None:
    """A peft adapter of about `size` bytes on q_proj and v_proj of as many layers as that takes."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors, each = {}, 2 * RANK * WIDTH * 4
    for place in range(max(1, round(size / each))):
        root = f"base_model.model.model.layers.{place // 2}.self_attn.{'qv'[place % 2]}_proj"
        tensors[f"{root}.lora_A.weight"] = torch.randn(RANK, WIDTH)
        tensors[f"{root}.lora_B.weight"] = torch.randn(WIDTH, RANK)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "v_proj"]}
    (out / "adapter_config.json").write_text(json.dumps(config))


def copied(file: Path, out: Path) -> None:
    subprocess.run(["cp", str(file), str(out)], check=True)
    subprocess.run(["sync", str(out)], check=True)


def converted(adapter: Path, out: Path, to: str) -> None:
    from loratools.ops.convert import convert

    receipt = convert(adapter, out, format=to)
    assert receipt["applied"] == receipt["expected"] > 0


def timed(what: Callable[[], None], of: int) -> tuple[float, float, float]:
    """Wall and CPU seconds, those of this process (`RUSAGE_SELF`) or of its children, and how many processors others kept busy."""
    busy, before, start = _busy(), resource.getrusage(of), time.perf_counter()
    what()
    seconds, after = time.perf_counter() - start, resource.getrusage(of)
    own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, own, (_busy() - busy - own) / seconds


def _busy() -> float:
    """CPU seconds of all processes since the machine started."""
    stat = Path("/proc/stat")
    user, nice, system, _, _, *interrupts = stat.read_text().split("\n")[0].split()[1:8] if stat.exists() else ["0"] * 7
    return sum(map(int, (user, nice, system, *interrupts))) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(share: float) -> None:
    while timed(partial(time.sleep, 1), resource.RUSAGE_SELF)[2] > share:
        pass


def gone(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    subprocess.run(["sync"], check=True)
    return path


def same_bytes(adapter: Path, out: Path) -> bool:
    """Whether the two files hold the same factors, by the digests of all their bytes, whatever they are called."""
    from loratools.digests import digests
    from loratools.tensorfile import TensorFile

    one, other = (digests({name: ref for name, ref in TensorFile(path).items() if ref.spec.numel > 1}) for path in (adapter, out))
    return sorted(one.values()) == sorted(other.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("room", type=Path)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--to", default="kohya")
    parser.add_argument("--quiet", type=float, default=math.inf)
    options = parser.parse_args()
    file = options.room / "bench_adapter" / "adapter_model.safetensors"
    maker = multiprocessing.get_context("spawn").Process(target=make_adapter, args=(file.parent, options.megabytes * 1e6))
    maker.start()  # a process of its own: a child's peak memory is never below what its parent had
    maker.join()
    beside, out = options.room / "bench_copy", options.room / "bench_out"
    rows: list[tuple[float, ...]] = []
    disturbed = -1  # the first pair warms the page cache, and imports
    while len(rows) < options.runs:
        wait_for_quiet(options.quiet)
        gone(beside), gone(out)
        *copy, others = timed(partial(copied, file, beside), resource.RUSAGE_CHILDREN)
        gone(beside)
        *own, more = timed(partial(converted, file.parent, out, options.to), resource.RUSAGE_SELF)
        if disturbed >= 0 and max(others, more) <= options.quiet:
            rows.append((*copy, *own))
        else:
            disturbed += 1
    times = [statistics.median(column) for column in zip(*rows, strict=True)]
    ratio, work = statistics.median(row[2] / row[0] for row in rows), statistics.median(row[3] / row[1] for row in rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"cp and sync of {file.stat().st_size / 1e6:.0f} MB   {times[0]:6.2f} s   {times[1]:6.2f} CPU seconds")
    print(f"convert to {options.to:13}  {times[2]:6.2f} s   {times[3]:6.2f} CPU seconds   peak {peak:.0f} MB")
    print(f"  {ratio:.2f} x the copy, {work:.2f} x its CPU seconds (medians of pairs)")
    print(f"  each ratio: {[round(row[2] / row[0], 2) for row in rows]}; pairs left out: {disturbed}")
    print(f"  factors' bytes equal: {same_bytes(file, next(out.glob('*.safetensors')))}")
    for path in (beside, out, file.parent):
        gone(path)


if __name__ == "__main__":
    main()
