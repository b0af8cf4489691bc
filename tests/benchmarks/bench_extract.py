"""extract of a whole pair at rank 16, certified, beside torch.linalg.svd of sample matrices scaled to all of them.

usage: python tests/benchmarks/bench_extract.py PAIR [--rank 16] [--threads N] [--runs 1]

PAIR is what make_pair.py writes. extract is timed as a process, imports aside, reading, writing, receipt and fsync included.
The reference is one SVD (full_matrices=False, float32) of the true difference of one matrix of each shape, times their number,
in the same run: once with torch on all N threads, once as N single-threaded processes would do, if they did not disturb each
other; the faster of the two is the one compared with. CPU seconds are printed too: they compare where other work runs beside.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from loratools.checkpoint import Checkpoint
from loratools.differences import difference

EXTRACT = """
import resource, sys, time
import torch, blake3, loratools.ops.extract, loratools.linalg.svd
start, before = time.perf_counter(), time.process_time()
receipt = loratools.ops.extract.extract(sys.argv[1], sys.argv[2], sys.argv[3], rank=int(sys.argv[4]), threads=int(sys.argv[5]))
seconds, used = time.perf_counter() - start, time.process_time() - before
assert receipt["applied"] == receipt["expected"] > 0
gaps = [row["error"] / row["optimal_error"] - 1 for row in receipt["tensors"] if row["rank"]]
print(seconds, used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, max(gaps), len(gaps))
"""


def extracted(pair: Path, rank: int, threads: int) -> list[float]:
    """Seconds, CPU seconds, peak megabytes, the largest error above its certified bound, matrices."""
    out = pair / "bench_out"
    shutil.rmtree(out, ignore_errors=True)
    words = [str(pair / "base"), str(pair / "tuned"), str(out), str(rank), str(threads)]
    done = subprocess.run([sys.executable, "-c", EXTRACT, *words], check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(out)
    return [float(word) for word in done.stdout.split()]


def matrices(pair: Path) -> tuple[dict[tuple[int, ...], str], Counter[tuple[int, ...]]]:
    """One changed matrix of each shape, and how many there are."""
    base = Checkpoint(pair / "base")
    names = [name for name, spec in base.specs.items() if "_proj" in name and len(spec.shape) == 2]
    counts = Counter(base[name].spec.shape for name in names)
    return {base[name].spec.shape: name for name in names}, counts


def svd_seconds(pair: Path, name: str, threads: int) -> tuple[float, float]:
    """Wall and CPU seconds."""
    base, tuned = Checkpoint(pair / "base"), Checkpoint(pair / "tuned")
    found = difference(base[name], tuned[name])
    D = found.D.view(base[name].spec.shape).float()
    torch.set_num_threads(threads)
    start, before = time.perf_counter(), time.process_time()
    torch.linalg.svd(D, full_matrices=False)
    return time.perf_counter() - start, time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pair", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args()
    samples, counts = matrices(options.pair)
    svd_seconds(options.pair, min(samples.items())[1], 1)  # the first call loads LAPACK
    totals = {"one after another": 0.0, "beside each other": 0.0}
    work = 0.0
    print(f"{'shape':>14} {'number':>7} {f'svd, {options.threads} threads':>16} {'svd, 1 thread':>15} {'its CPU':>10}")
    for shape, name in samples.items():
        (wide, _), (single, used) = svd_seconds(options.pair, name, options.threads), svd_seconds(options.pair, name, 1)
        totals["one after another"] += wide * counts[shape]
        totals["beside each other"] += single * counts[shape] / options.threads
        work += used * counts[shape]
        print(f"{'x'.join(map(str, shape)):>14} {counts[shape]:>7} {wide:>14.2f} s {single:>13.2f} s {used:>8.2f} s")
    rows = [extracted(options.pair, options.rank, options.threads) for _ in range(options.runs)]
    seconds, used, peak, gap, number = (statistics.median(column) for column in zip(*rows, strict=True))
    said = f"peak {peak:.0f} MB, errors within {gap:.1e} of their bounds"
    print(f"extract --rank {options.rank}, {number:.0f} matrices: {seconds:.1f} s, {used:.1f} s of CPU, {said}")
    for way, total in totals.items():
        print(f"torch.linalg.svd of all, {way}: {total:.0f} s   {total / seconds:.1f} x")
    print(f"against the faster: {min(totals.values()) / seconds:.1f} x; in CPU seconds, {work:.0f} s to {used:.1f} s: {work / used:.1f} x")


if __name__ == "__main__":
    main()
