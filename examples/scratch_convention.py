"""A state dict as the from-scratch tutorials write it: loaded, merged, taken to PEFT and back; what no weight edit can say."""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear

import loratools
from loratools.formats.base import ReadOptions

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="it is quick as it is")
parser.parse_args()
torch.manual_seed(123)
room, ALPHA, RANK = Path((kept := tempfile.TemporaryDirectory()).name), 8, 4
base = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))})
save_file(base.state_dict(), room / "base.safetensors")

# what the tutorial's LinearWithLoRA and LinearWithDoRAMerged save once trained; alpha is not in it
lora, dora = {}, {}
for name in ("layers.0", "layers.2"):
    out, into = base.get_submodule(name).weight.shape
    factors = {f"{name}.lora.A": torch.randn(into, RANK) / RANK**0.5, f"{name}.lora.B": torch.randn(RANK, out)}
    lora |= factors
    dora |= factors | {f"{name}.m": base.get_submodule(name).weight.detach().norm(p=2, dim=0, keepdim=True) * 1.1}


def forward(state, name, x):
    layer = base.get_submodule(name)
    W = layer.weight + ALPHA * (state[f"{name}.lora.A"] @ state[f"{name}.lora.B"]).T
    return linear(x, state[f"{name}.m"] * W / W.norm(p=2, dim=0, keepdim=True) if f"{name}.m" in state else W, layer.bias)


x = torch.randn(100, 64)
for kind, state in (("lora", lora), ("dora", dora)):
    torch.save(state, room / f"{kind}.pth")
    adapter = loratools.load(room / f"{kind}.pth", options=ReadOptions(alpha=ALPHA))
    print(f"{kind}: {adapter.format}, {len(adapter)} weights, {adapter.parameters} parameters; {'; '.join(adapter.notes)}")
    loratools.merge(room / "base.safetensors", adapter, room / f"{kind}-merged.safetensors")
    merged = copy.deepcopy(base)
    merged.load_state_dict(load_file(room / f"{kind}-merged.safetensors"))
    expected = forward(state, "layers.2", forward(state, "layers.0", x).relu())
    print(f"{kind}: merged and the tutorial's own forward differ by {(merged['layers'](x) - expected).norm() / expected.norm():.0e}")

loratools.save(loratools.load(room / "lora.pth", options=ReadOptions(alpha=ALPHA)), room / "peft")
loratools.save(loratools.load(room / "peft"), room / "back.safetensors", format="scratch")
back = load_file(room / "back.safetensors")
print("lora: to PEFT and back, the same bytes:", all(torch.equal(back[name], tensor) for name, tensor in lora.items()))
square = {"lora.A": torch.randn(64, RANK), "lora.B": torch.randn(RANK, 64), "m": torch.ones(1, 64)}
for name, state in (("another-class", lora | {"layers.0.m": torch.ones(1, 128)}), ("square", square), ("dora", dora)):
    save_file(state, room / f"{name}.safetensors")
    try:
        loratools.save(loratools.load(room / f"{name}.safetensors", options=ReadOptions(alpha=ALPHA)), room / f"peft-{name}")
    except loratools.LoratoolsError as error:
        print(f"refused: {str(error).replace(str(room), '')}")
