"""Truncated SVD and exact products beside what they replace.

Run by hand: python tests/benchmarks/bench_svd.py [--threads N] [--crossover | --exact].
Each line compares in one process. Times are the best of three and CPU time where one thread is used, so that a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from loratools.linalg import svd
from loratools.linalg.exact import ExactProduct
from loratools.linalg.svd import truncated_svd


def seconds(call: Callable[[], object], repeat: int = 3) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = float("inf")
    for _ in range(repeat):
        start = clock()
        call()
        best = min(best, clock() - start)
    return best


def difference(m: int, n: int) -> Tensor:
    """A bf16 fine-tune of a bf16 weight: 64 directions falling as k**-0.7 from 0.3, and noise of 2e-5."""
    base = (0.02 * torch.randn(m, n)).bfloat16()
    sigma = 0.3 * torch.arange(1, 65).float() ** -0.7
    change = (torch.randn(m, 64) / m**0.5 * sigma) @ (torch.randn(64, n) / n**0.5) + 2e-5 * torch.randn(m, n)
    return (base.float() + change).bfloat16().float() - base.float()


def cases() -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    yield "difference 2048×2048", difference(2048, 2048), (1, 8, 16, 32, 64)
    yield "difference 5632×2048", difference(5632, 2048), (16,)
    yield "difference 2048×5632", difference(2048, 5632), (16,)
    yield "Gaussian 2048×2048", torch.randn(2048, 2048), (1, 16, 32)
    left, right = (torch.linalg.qr(torch.randn(2048, 2048))[0] for _ in range(2))
    index = torch.arange(1, 2049).float()
    yield "k**-0.5 2048×2048", (left * index**-0.5) @ right, (16, 32, 128)
    yield "0.99**k 2048×2048", (left * 0.99**index) @ right, (16, 32)


def table() -> None:
    print(f"{'case':24} {'rank':>4} {'method':8} {'passes':>6} {'error/optimal - 1':>18} {'ms':>7} {'faster than svd':>16}")
    for name, D, ranks in cases():
        whole = seconds(lambda D=D: torch.linalg.svd(D, full_matrices=False), 1)  # type: ignore[misc]
        for rank in ranks:
            found, spent = truncated_svd(D, rank), seconds(lambda D=D, rank=rank: truncated_svd(D, rank))  # type: ignore[misc]
            quality = f"{found.error / found.optimal - 1:.1e}"
            print(
                f"{name:24} {rank:4} {found.method:8} {found.passes:6} {quality:>18} {spent * 1e3:7.0f} {whole / spent:15.1f}×", flush=True
            )


def crossover() -> None:
    print("ms by the iterative route (what it fell back to, if it did) and by the Gram route")
    for m, n in ((384, 384), (1536, 384), (512, 512), (2048, 512), (768, 768), (3072, 768), (1024, 1024)):
        for name, D in (("difference", difference(m, n)), ("Gaussian", torch.randn(m, n))):
            for rank in (8, 32):
                times = {}
                for limit in (0, 10_000):
                    svd._SMALL = limit
                    times[limit] = truncated_svd(D, rank).method, seconds(lambda D=D, rank=rank: truncated_svd(D, rank))  # type: ignore[misc]
                (method, iterative), (_, gram) = times[0], times[10_000]
                print(f"{name:12} {m}×{n} rank {rank:3}: {iterative * 1e3:6.0f} ({method}) {gram * 1e3:6.0f}", flush=True)


def exact() -> None:
    print("ms for the whole matrix, float32 product with the same blocks / one slice / two slices, by elements in a block")
    for m, n, rank in ((2048, 2048, 16), (5632, 2048, 16), (2048, 5632, 16), (2048, 2048, 128)):
        B, A = torch.randn(m, rank), torch.randn(rank, n)
        products = [ExactProduct(B, A, slices=slices) for slices in (1, 2)]
        for elements in (1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 20):
            step = elements // n
            starts = range(0, m - step + 1, step)
            out, scratch, narrow = (torch.empty(step, n, dtype=dtype) for dtype in (torch.float64, torch.float64, torch.float32))
            times = [seconds(lambda: [torch.mm(B[i : i + step], A, out=narrow) for i in starts])]  # noqa: B023
            times += [seconds(lambda p=p: [p.rows(i, i + step, out=out, scratch=scratch) for i in starts]) for p in products]  # type: ignore[misc]  # noqa: B023
            print(f"{m}×{n} rank {rank:3} {elements >> 10:5} Ki: " + " / ".join(f"{t * 1e3:6.1f}" for t in times), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument("--exact", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    crossover() if options.crossover else exact() if options.exact else table()


if __name__ == "__main__":
    main()
