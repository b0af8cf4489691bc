"""What a LoRA layer costs beside the plain one, for inference and in training: time, memory, parameters, multiply-adds."""

import argparse
import copy
import statistics
import time
from functools import partial

import torch
from torch import nn

from loratools.layers import layer_for, trainable

synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
CASES = {
    "Conv1d(16, 33, 3)": (lambda: nn.Conv1d(16, 33, 3), (20, 16, 50), 4),
    "Conv2d(16, 64, 3)": (lambda: nn.Conv2d(16, 64, 3), (20, 16, 50, 100), 4),
    "Linear(200, 500)": (lambda: nn.Linear(200, 500), (100, 200), 16),
}
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="5 repetitions instead of 200")
rounds = 5 if parser.parse_args().quick else 200


def milliseconds(run, *arguments):
    begin = time.perf_counter()
    run(*arguments)
    synchronize()
    return (time.perf_counter() - begin) * 1e3


def kept_kilobytes(layer, x):
    kept = {}  # what autograd keeps between forward and backward, the parameters and the input aside
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        layer(x).sum()
    return sum(size for place, size in kept.items() if place not in [p.data_ptr() for p in (*layer.parameters(), x)]) // 1024


head = f"{'made ms':>9}{'inference ms':>14}{'training ms':>13}{'weights':>9}{'train':>8}{'state KB':>10}{'kept KB':>9}{'multiply-adds':>15}"
for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
    print(f"{device:25}{head}")
    for name, (make, shape, rank) in CASES.items():
        x, plain = torch.randn(shape, device=device), make().to(device)
        layers = {"plain": plain, "LoRA": layer_for(copy.deepcopy(plain), rank=rank, alpha=rank)}
        builds = {"plain": make, "LoRA": partial(layer_for, make(), rank=rank, alpha=rank)}
        times = {kind: [] for kind in layers}
        for kind in [*layers] * rounds:  # in turn, so that both meet the same moments
            with torch.no_grad():
                inference = milliseconds(layers[kind], x)
            training = milliseconds(lambda layer, x: layer(x).sum().backward(), layers[kind], x)
            times[kind].append((milliseconds(builds[kind]), inference, training))
        for kind, layer in layers.items():
            spent = "{:9.3f}{:14.3f}{:13.3f}".format(*map(statistics.median, zip(*times[kind], strict=True)))
            weights, trained = (sum(p.numel() for p in some) for some in (layer.parameters(), trainable(layer).values()))
            state, kept = 3 * 4 * trained // 1024, kept_kilobytes(layer, x)  # a gradient and Adam's two moments, each of 4 bytes
            used = weights - sum(p.numel() for key, p in layer.named_parameters() if key == "bias")
            products = used * layer(x).numel() // len(layer.weight)  # each weight is used once for every position of the output
            print(f"{name:19}{kind:6}{spent}{weights:9}{trained:8}{state:10}{kept:9}{products:15}")
print("Not merged, a LoRA layer makes the plain product and its own: it costs more. What shrinks is the state that training holds.")
