"""A full fine-tune as an adapter, merged back into the base, and what was lost on the way, measured on the files.

    python examples/extract_and_merge.py base/ tuned/ out/ 8

writes out/adapter/ (rank 8, in PEFT's format) and out/merged/, each with its receipt.
"""

import math
import sys
from pathlib import Path

import torch

import loratools
from loratools.tensors import read_tensor


def distance(one: loratools.Checkpoint, other: loratools.Checkpoint) -> float:
    """‖one − other‖ over all tensors, one tensor in memory at a time."""
    pairs = ((read_tensor(one[name]), read_tensor(other[name])) for name in one)
    return math.hypot(*(torch.dist(a.double(), b.double()).item() for a, b in pairs))


def main(base: str, tuned: str, out: str, rank: str) -> None:
    adapter, merged = Path(out, "adapter"), Path(out, "merged")

    extracted = loratools.extract(base, tuned, adapter, rank=int(rank))
    for row in extracted["tensors"]:
        if row["rank"]:
            print(f"{row['name']}: rank {row['rank']}, error {row['error']:.4f}, at best {row['optimal_error']:.4f}")
        else:
            print(f"{row['name']}: saved whole")

    receipt = loratools.merge(base, adapter, merged)
    print(f"applied {receipt['applied']} of {receipt['expected']} changes")

    start, aim, reached = (loratools.Checkpoint(path) for path in (base, tuned, merged))
    print(f"‖merged − tuned‖ is {distance(reached, aim) / distance(start, aim):.2%} of ‖tuned − base‖")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
