"""A perceptron that reads handwritten digits, adapted by LoRA and DoRA from scratch: accuracies, and which forms are equal."""

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, linear

from loratools.layers import DoRALinear, LoRALayer, freeze, inject, trainable

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="one epoch instead of two")
epochs = 1 if parser.parse_args().quick else 2
torch.manual_seed(123)
images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = images.float() / 16  # 1797 images of 8 × 8, flat
order = torch.randperm(len(images))
learn, test = order[:1437], order[1437:]


def train(model):
    optimiser = torch.optim.Adam(trainable(model).values(), lr=0.005)
    for _ in range(epochs):
        for batch in learn[torch.randperm(len(learn))].split(64):
            optimiser.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimiser.step()


def accuracy(model):
    with torch.no_grad():
        return (model(images[test]).argmax(1) == labels[test]).float().mean().item()


original = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))
train(original)
table, models = {"original": accuracy(original)}, {}
for method in ("LoRA", "DoRA"):
    model = models[method] = copy.deepcopy(original)
    # the tutorial multiplies by alpha = 8, where the paper has alpha / rank; its magnitudes are those of W's columns
    inject(model, ["0", "2", "4"], rank=4, alpha=8 * 4, dora=method == "DoRA", axis="in")
    for layer in filter(lambda module: isinstance(module, LoRALayer), model):
        nn.init.normal_(layer.lora_A, std=4**-0.5)
    freeze(model)
    print(f"{method} before training: accuracy {accuracy(model):.4f}, as {table['original']:.4f}; trains {', '.join(trainable(model))}")
    train(model)
    table[method] = accuracy(model)
print("\n".join(f"{name:10} test accuracy {value:.4f}" for name, value in table.items()))

for method, model in models.items():  # the tutorial's merged forms, written out
    layer, x = model[2], torch.randn(100, 128)
    V = layer.weight + layer.scaling * (layer.lora_A.T @ layer.lora_B.T).T
    W = V if not isinstance(layer, DoRALinear) else layer.magnitude * V / V.norm(p=2, dim=0, keepdim=True)
    difference = (layer(x) - linear(x, W, layer.bias)).abs().max() / layer(x).abs().max()
    print(f"{method}: the layer and its merged form differ by {difference:.0e} of the largest output")
change = layer.scaling * linear(linear(x, layer.lora_A), layer.lora_B)
other = linear(x, layer.weight, layer.bias) + change / (change.norm(p=2, dim=1, keepdim=True) + 1e-9)  # m = 1
print(f"DoRA: the tutorial's LinearWithDoRA differs by {(layer(x) - other).abs().max() / layer(x).abs().max():.0e}: another function")
