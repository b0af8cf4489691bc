"""The LoRA that loralib's authors published for RoBERTa on MNLI: inspected, converted to PEFT, and back."""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

import loratools
from loratools.formats.base import ReadOptions

HERE = Path(__file__).parent.parent / "tests/data/loralib/roberta_base_lora_mnli.bin"
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("path", nargs="?", type=Path, default=HERE, help="a loralib state dict")
parser.add_argument("--alpha-in", type=float, default=16, help="alpha, which the file does not hold; 16 for this one")
parser.add_argument("--quick", action="store_true", help="it is quick as it is")
options = parser.parse_args()
room = Path((kept := tempfile.TemporaryDirectory()).name)

adapter = loratools.load(options.path, options=ReadOptions(alpha=options.alpha_in))
print(f"{options.path.name}: {adapter.format}, {adapter.parameters} parameters in {len(adapter)} tensors")
for kind, count in Counter(delta.kind for delta in adapter.values()).items():
    print(f"  {count} {kind}")
low = next(delta for delta in adapter.values() if delta.kind == "lora")
print(f"  rank {low.rank}, alpha {low.alpha:g}, scaling {low.scaling:g}, factors {low.A.spec} and {low.B.spec}")

loratools.save(adapter, room / "peft")
there = loratools.load(room / "peft")
print(f"as PEFT: {len(there)} tensors; {', '.join(sorted(path.name for path in (room / 'peft').iterdir()))}")

loratools.save(there, room / "back.safetensors", format="loralib")
original, back = torch.load(options.path, map_location="cpu", weights_only=True), load_file(room / "back.safetensors")
same = sum(torch.equal(back[name], tensor) for name, tensor in original.items())
print(f"and back: {same} of {len(original)} tensors have the same bytes")
