"""merge beside `cp -r` and `sync` of the base, and beside peft as a user would run it; times, ratios, peak memory.

usage: python tests/benchmarks/bench_merge.py PAIR [--runs 5] [--no-peft] [--larger BASE4]

PAIR holds base/ as make_pair.py writes it; a rank-16 adapter on every linear layer is made in it. The runs alternate, so that
a machine whose speed drifts slows both; the ratio is the median of the ratios of neighbours. merge is timed inside its own
process, imports aside, receipt, digests and fsync included. `--larger` names a base to compare the peak memory on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

MERGE = """
import resource, sys, time
import torch, blake3, loratools.ops.merge, loratools.formats, loratools.linalg.exact, loratools.linalg.product
start = time.perf_counter()
receipt = loratools.ops.merge.merge(sys.argv[1], sys.argv[2], sys.argv[3])
seconds = time.perf_counter() - start
assert receipt["applied"] == receipt["expected"] > 0
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
"""
PEFT = """
import resource, sys, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3], max_shard_size="500MB")
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
"""


def make_adapter(base: Path, out: Path, rank: int = 16) -> None:
    """A peft adapter on every projection of a base, with random factors, made from the base's own headers."""
    import torch
    from safetensors.torch import save_file

    from loratools.checkpoint import Checkpoint

    torch.manual_seed(1)
    tensors = {}
    for name, spec in Checkpoint(base).specs.items():
        if "_proj." in name:
            root = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{root}.lora_A.weight"] = torch.randn(rank, spec.shape[1]) * spec.shape[1] ** -0.5
            tensors[f"{root}.lora_B.weight"] = torch.randn(spec.shape[0], rank) * 0.002
    out.mkdir(exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors")
    targets = sorted({key.split(".")[-3] for key in tensors})
    (out / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 32, "target_modules": targets}))


def child(code: str, *paths: Path) -> tuple[float, list[float]]:
    """Wall seconds of a whole process, and the numbers its last line prints."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - start, [float(word) for word in done.stdout.split()]


def copy(base: Path, out: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    subprocess.run(["sync", "-f", str(out)], check=True)
    return time.perf_counter() - start


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pair", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--larger", type=Path)
    options = parser.parse_args()
    base, adapter, out = options.pair / "base", options.pair / "bench_adapter", options.pair / "bench_out"
    make_adapter(base, adapter)
    rows = []
    for _ in range(options.runs + 1):
        copied = copy(base, fresh(out))
        whole, (inside, peak) = child(MERGE, base, adapter, fresh(out))
        rows.append((copied, inside, whole, peak, inside / copied))
    rows = rows[1:]  # the first pair warms the page cache
    copied, inside, whole, peak, ratio = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"cp -r and sync            {copied:6.2f} s")
    print(f"merge, imports aside      {inside:6.2f} s   {ratio:.2f} x the copy (median of pairs)")
    print(f"  each ratio: {[round(row[4], 2) for row in rows]}")
    print(f"merge, whole process      {whole:6.2f} s   peak {peak:.0f} MB")
    if not options.no_peft:
        _, (seconds, theirs) = child(PEFT, base, adapter, fresh(out))
        print(f"peft, imports aside       {seconds:6.2f} s   peak {theirs:.0f} MB   {seconds / inside:.1f} x the merge")
    if options.larger:
        make_adapter(options.larger, adapter)
        _, (_, more) = child(MERGE, options.larger, adapter, fresh(out))
        print(f"merge of {options.larger}: peak {more:.0f} MB, {more / peak:.2f} x")
    fresh(out)


if __name__ == "__main__":
    main()
