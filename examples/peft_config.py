"""r 4, alpha 16, dropout 0.05 on q_proj and v_proj: a step of training here, saved, and the same output in live PEFT."""

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import loratools
from loratools.layers import adapter_from, freeze, inject, trainable

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="it is quick as it is")
parser.parse_args()
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
base = LlamaForCausalLM(LlamaConfig(**sizes))
model = copy.deepcopy(base)

names = inject(model, ["q_proj", "v_proj"], rank=4, alpha=16, dropout=0.05)
freeze(model, bias="none")
count = sum(parameter.numel() for parameter in trainable(model).values())
print(f"{len(names)} layers, {count} of {model.num_parameters()} parameters train")

ids = torch.randint(0, 100, (4, 16))
optimiser = torch.optim.AdamW(trainable(model).values(), lr=0.01)
before = model(ids, labels=ids).loss
before.backward()
optimiser.step()
after = model(ids, labels=ids).loss
print(f"loss {before.item():.4f}, after a step {after.item():.4f}")

folder = Path((kept := tempfile.TemporaryDirectory()).name) / "adapter"
loratools.save(adapter_from(model), folder)
config = json.loads((folder / "adapter_config.json").read_text())
print({key: config[key] for key in ("r", "lora_alpha", "lora_dropout", "bias", "target_modules")})

theirs = PeftModel.from_pretrained(base, folder).eval()
with torch.no_grad():
    ours, other = model.eval()(ids).logits, theirs(ids).logits
print(f"the outputs here and in PEFT differ by {((ours - other).norm() / ours.norm()).item():.0e}")
