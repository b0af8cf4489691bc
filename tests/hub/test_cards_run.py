"""What a card says of loading is run as it stands there: on tiny models that lie, with the adapters, in the Hub on loopback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.files import peft_config, write_adapter
from tests.hub.client import Client
from tests.hub.server import Hub
from tests.interop.test_diffusion_models import unet
from tests.interop.tiny import CLIP_TEXT, TEXT


def blocks(hub: Hub, repo: str) -> dict[str, str]:
    """What the card says for each runtime, between its fences."""
    card = hub.repositories[repo].files["README.md"].decode()
    return dict(re.findall(r"### (.+)\n\n```\w+\n([\s\S]*?)\n```", card))


def pushed(client: Client, path: Path, repo: str, base: str) -> None:
    client.token = "hf_ada"
    done = client.loratools("push", path, repo, "--base-model", base)
    assert done.returncode == 0, done.stderr
    client.token = None


@pytest.fixture
def language(hub: Hub, client: Client, tmp_path: Path) -> Hub:
    """ada/base, a Llama of two layers, and ada/style, LoRA on it."""
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    model.save_pretrained(tmp_path / "base")
    hub.add("ada/base", tmp_path / "base")
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, module.in_features) / 4
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(module.out_features, 4) / 4
    config = peft_config(r=4, lora_alpha=8, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM", base_model_name_or_path="/a/b")
    pushed(client, write_adapter(tmp_path / "style", tensors, config), "ada/style", "ada/base")
    return hub


def test_peft_and_transformers_load_what_the_cards_say(language: Hub, client: Client, tmp_path: Path) -> None:
    assert client.loratools("merge", "ada/base", "ada/style", "-o", tmp_path / "merged").returncode == 0
    client.token = "hf_ada"
    done = client.loratools("push", tmp_path / "merged", "ada/merged")
    assert done.returncode == 0, done.stderr
    card = language.repositories["ada/merged"].files["README.md"].decode()
    assert "base_model:\n- ada/base\n- ada/style\nbase_model_relation: merge\nlibrary_name: transformers\n" in card
    told, merged = blocks(language, "ada/style"), blocks(language, "ada/merged")
    assert list(told) == ["PEFT", "vLLM", "SGLang", "llama.cpp"] and merged["vLLM"] == "vllm serve ada/merged"
    done = client.python(f"""
import torch
{merged["transformers"]}
tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
wanted = model(tokens).logits
{told["PEFT"]}
with model.disable_adapter():
    plain = model(tokens).logits
print([float((logits - wanted).abs().max()) for logits in (model(tokens).logits, plain)])
print(type(model).__name__, sum("lora_A" in name for name, _ in model.named_modules() if name.endswith("default")))
""")
    assert done.returncode == 0, done.stderr[-2000:]
    near, far = json.loads(done.stdout.splitlines()[0])
    assert near < 1e-5 and far > 1e-2  # float32 logits of size 1, through two layers
    assert done.stdout.splitlines()[1] == "PeftModelForCausalLM 4"


def test_the_commands_are_those_that_convert_and_serve_take(language: Hub, client: Client, tmp_path: Path) -> None:
    from gguf import GGUFReader

    told = blocks(language, "ada/style")
    assert told["vLLM"] == "vllm serve ada/base --enable-lora --max-lora-rank 8 --lora-modules style=ada/style"
    assert told["SGLang"] == "python -m sglang.launch_server --model-path ada/base --lora-paths style=ada/style"
    convert, run = told["llama.cpp"].splitlines()
    assert convert.startswith("loratools ") and run == "llama-cli -m BASE.gguf --lora style.gguf"
    done = client.loratools(*convert.split()[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    reader = GGUFReader(tmp_path / "style.gguf")
    assert {field: reader.get_field(field).contents() for field in ("general.type", "adapter.type", "general.architecture")} == {
        "general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama",
    }  # fmt: skip
    assert float(reader.get_field("adapter.lora.alpha").contents()) == 8 and len(reader.tensors) == 8


def pipeline(folder: Path) -> Path:
    """Stable Diffusion with a U-Net, a text encoder and a VAE of a few thousand parameters."""
    import diffusers
    import transformers

    (folder / "words").mkdir(parents=True)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (folder / "words/vocab.json").write_text(json.dumps(words))
    (folder / "words/merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "words")
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_TEXT)), tokenizer=tokenizer,
        unet=unet(), scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "pipe")
    return folder / "pipe"


def test_diffusers_loads_what_the_cards_say(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.add("ada/pipe", pipeline(tmp_path / "made"))
    torch.manual_seed(1)
    tensors = {}
    for name, module in unet().named_modules():
        if name.endswith(("to_q", "to_v")):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(4, module.in_features) / 4
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 4) / 4
    own, other = tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "my look.safetensors"
    save_file(tensors, own)
    done = client.loratools("convert", own, "-o", other, "--format", "kohya")
    assert done.returncode == 0, done.stderr
    code = ""
    runtimes = {own: ["diffusers"], other: ["diffusers", "ComfyUI"]}  # ComfyUI looks for a processor in diffusers' names of attention
    for file, repo in ((own, "ada/look"), (other, "ada/kohya")):
        pushed(client, file, repo, "ada/pipe")
        told = blocks(hub, repo)
        assert list(told) == runtimes[file] and f'weight_name="{file.name}"' in told["diffusers"]
        quoted = "'my look.safetensors'" if " " in file.name else file.name
        assert "ComfyUI" not in told or told["ComfyUI"] == f"hf download {repo} {quoted} --local-dir ComfyUI/models/loras"
        code += f"""
{told["diffusers"]}
print(pipe.get_active_adapters(), sum(name.endswith("lora_B.default_0") for name, _ in pipe.unet.named_modules()))
"""
    done = client.python(code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines() == [f"['default_0'] {len(tensors) // 2}"] * 2
