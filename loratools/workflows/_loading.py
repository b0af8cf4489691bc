"""How an adapter is loaded by the runtimes that take all of it, with the names that each of them wants."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from loratools.workflows._checking import Finding
from loratools.workflows._markdown import fenced

CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification", "QUESTION_ANS": "AutoModelForQuestionAnswering", "FEATURE_EXTRACTION": "AutoModel",
}  # fmt: skip
DIFFUSION = ("diffusers", "kohya", "comfyui")
# runtimes of language models and of diffusion models that read, or are written for from, a format
OF_TEXT, OF_IMAGES = ("peft", "vllm", "sglang", "llama.cpp"), ("diffusers", "comfyui")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes (vllm/config/lora.py)
_LAYER = re.compile(r"(?:^|\.)(?:model\.layers|transformer\.h|gpt_neox\.layers|model\.decoder\.layers|blk|layers)\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What of an adapter decides how it is loaded: `file` its weights in the repository, `findings` by runtime what is lost there."""

    repo: str
    base: str
    format: str | None
    file: str
    task: str | None = None
    rank: int | None = None
    text: bool = False
    findings: Mapping[str, Sequence[Finding]] = field(default_factory=dict)


def is_text(names: Sequence[str], task: str | None) -> bool:
    """Whether the tensors are a language model's: its config says so, or all of them lie in a decoder's layers or at its ends."""
    ends = re.compile(r"(?:^|\.)(?:embed_tokens|lm_head|wte|norm|ln_f)\.")
    return task == "CAUSAL_LM" or (any(map(_LAYER.search, names)) and all(_LAYER.search(name) or ends.search(name) for name in names))


def runtimes(format: str | None, text: bool) -> tuple[str, ...]:
    """The runtimes whose rules are asked about an adapter."""
    if format == "peft":
        return OF_TEXT if text else ("peft",)
    if format in DIFFUSION:
        return OF_IMAGES
    return {"gguf": ("llama.cpp",), "mlx": ("mlx",)}.get(format or "", ())


def losses(found: Sequence[Finding]) -> list[Finding]:
    """What is lost of it there, but that it is in another format, which converting mends."""
    return [one for one in found if one.fit != "write" or one.rule != "format"]


def told(of: Loaded) -> list[str]:
    """The lines of a card on how it is loaded, one heading a runtime that takes all of it."""
    clean = [name for name, found in of.findings.items() if not losses(found)]
    lines: list[str] = []
    for name in clean:
        title, body = _WAYS[name](of)
        if body:
            lines += [*([""] if lines else []), f"### {title}", "", *body]
    return lines


def _peft(of: Loaded) -> tuple[str, list[str]]:
    kind = CLASSES.get(of.task or "", "AutoModelForCausalLM" if of.text else "AutoModel")
    hint = "" if of.task in CLASSES or of.text else "  # or the class that the base is for"
    return "PEFT", fenced("python", [
        "from peft import PeftModel", f"from transformers import {kind}", "",
        f"base = {kind}.from_pretrained({_quoted(of.base)}){hint}", f"model = PeftModel.from_pretrained(base, {_quoted(of.repo)})",
    ])  # fmt: skip


def _vllm(of: Loaded) -> tuple[str, list[str]]:
    room = next((rank for rank in VLLM_RANKS if rank >= (of.rank or 1)), VLLM_RANKS[-1])
    served = f"--enable-lora --max-lora-rank {room} --lora-modules {_name(of.repo)}={of.repo}"
    return "vLLM", fenced("sh", [f"vllm serve {of.base} {served}"]) if of.text else []


def _sglang(of: Loaded) -> tuple[str, list[str]]:
    served = f"--lora-paths {_name(of.repo)}={of.repo}"
    return "SGLang", fenced("sh", [f"python -m sglang.launch_server --model-path {of.base} {served}"]) if of.text else []


def _llama_cpp(of: Loaded) -> tuple[str, list[str]]:
    if of.format == "gguf":
        fetched, file = [f"hf download {of.repo} {shlex.quote(of.file)} --local-dir ."], of.file
    else:
        file = f"{_name(of.repo)}.gguf"
        fetched = [f"loratools convert {of.repo} -o {file} --format gguf --base {of.base}"]
    return "llama.cpp", fenced("sh", [*fetched, f"llama-cli -m BASE.gguf --lora {shlex.quote(file)}"])


def _diffusers(of: Loaded) -> tuple[str, list[str]]:
    return "diffusers", fenced("python", [
        "from diffusers import DiffusionPipeline", "", f"pipe = DiffusionPipeline.from_pretrained({_quoted(of.base)})",
        f"pipe.load_lora_weights({_quoted(of.repo)}, weight_name={_quoted(of.file)})",
    ])  # fmt: skip


def _comfyui(of: Loaded) -> tuple[str, list[str]]:
    return "ComfyUI", [*fenced("sh", [f"hf download {of.repo} {shlex.quote(of.file)} --local-dir ComfyUI/models/loras"])]


def _mlx(of: Loaded) -> tuple[str, list[str]]:
    fetched = f"hf download {of.repo} --local-dir {_name(of.repo)}"
    return "MLX-LM", fenced("sh", [fetched, f"mlx_lm.generate --model {of.base} --adapter-path {_name(of.repo)} --prompt 'Hello'"])


_WAYS: Mapping[str, Any] = {
    "peft": _peft, "vllm": _vllm, "sglang": _sglang, "llama.cpp": _llama_cpp, "diffusers": _diffusers, "comfyui": _comfyui, "mlx": _mlx,
}  # fmt: skip


def merged(repo: str, config: Mapping[str, Any] | None, *, pipeline: bool) -> list[str]:
    """The lines of a card on how a merged model is loaded: by the class that its config names."""
    if pipeline:
        lines = ["from diffusers import DiffusionPipeline", "", f"pipe = DiffusionPipeline.from_pretrained({_quoted(repo)})"]
        return ["### diffusers", "", *fenced("python", lines)]
    named = (config or {}).get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        return []
    lines = [f"from transformers import {name}", "", f"model = {name}.from_pretrained({_quoted(repo)})"]
    served = ["", "### vLLM", "", *fenced("sh", [f"vllm serve {repo}"])] if name.endswith("ForCausalLM") else []
    return ["### transformers", "", *fenced("python", lines), *served]


def _name(repo: str) -> str:
    return PurePosixPath(repo).name


def _quoted(text: str) -> str:
    """A string of Python's and JavaScript's, without a sign that could end a block or begin a comment of HTML."""
    return json.dumps(text).replace("<", "\\u003c")
