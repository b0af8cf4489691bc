"""What the keys of each format's tensors look like, one by one: to tell which formats an unknown file comes near to, never to claim one.

`detect` of a format asks more than a look: a whole pair, a prefix, a config beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LOOKS = {
    "peft": r".*\.lora_([ABE]|magnitude_vector)(\.[^.]+)?\.(weight|bias)|.*\.lora_(embedding_[AB]|magnitude_vector)|base_model\.model\..*",
    "loralib": r"(.*\.)?lora_[AB]",
    "kohya": r"(lora_[a-z0-9]+|lycoris)_[^.]*\.(lora_(down|up|mid)\.weight|alpha|dora_scale|hada_.*|lokr_.*|oft_.*|diff(_b)?)",
    "diffusers": r"(unet|transformer|transformer_2|text_encoder|text_encoder_2|prior|controlnet)\..*lora.*",
    "comfyui": r"(diffusion_model|text_encoders)\..*",
    "mlx": r".*\.(lora_[ab]|m)",
    "scratch": r"(.*\.)?lora\.[AB]|(.*\.)?linear\.(weight|bias)|(.*\.)?m",
    "cloneofsimo": r"\w+:\d+:(up|down)|<.+>",
    "samlora": r"w_[ab]_\d+|fc_\d+in_\d+out",
    "xlabs": r"(.*\.)?(double|single)_blocks\.\d+\.processor\..*",
    "torchtune": r".*\.(lora_[ab]\.weight|magnitude)",
    "litgpt": r"transformer\.h\.\d+\.(attn|mlp)\..*\.lora_[AB]|lm_head\.lora_[AB]",
    "nemo": r".*\.adapter(_layer)?\.(.*\.)?(linear_(in|out)\.weight|weight_magnitude)",
    "gguf": r".*\.weight\.lora_[ab]",
    "trtllm": r"(model\.)?lora_(weights|config)",
}
# what a file needs beside such keys before it is one of the format's
NEEDS = {
    "peft": "an adapter_config.json beside it that names its peft_type",
    "loralib": "lora_A and lora_B of a module",
    "kohya": "a prefix such as lora_unet_ or lora_te_",
    "mlx": "MLX's adapter_config.json beside it",
    "torchtune": "lora_a.weight of a module",
    "litgpt": "lora_A of a module that litgpt's network has",
    "gguf": "a .gguf file, whose fields tell the architecture",
    "trtllm": "the adapter that it was made of: it has neither names nor shapes",
    "scratch": "lora.A and lora.B of a module",
}


# tensors of textual inversions: tokens in angle brackets, AUTOMATIC1111's, and SDXL's for its two encoders
_INVERSION = re.compile(r"<[^<>]+>|emb_params|clip_[lg]|string_to_param\..*")


def inversions(keys: Iterable[str]) -> list[str]:
    """The tokens of a file that holds nothing but textual inversions, none of any other.

    >>> inversions(["<s1>", "<s2>"]), inversions(["<s1>", "q.lora_A"])
    (['<s1>', '<s2>'], [])
    """
    listed = list(keys)
    return listed if all(_INVERSION.fullmatch(key) for key in listed) else []


def near(keys: Iterable[str], names: Iterable[str]) -> list[tuple[str, int]]:
    """The formats, of those named, whose keys some of the file's look like, and how many do; the most first.

    >>> near(["q.lora_A", "q.lora_B", "head.weight"], ["loralib", "samlora"])
    [('loralib', 2)]
    """
    listed = list(keys)
    counts = [(name, sum(re.fullmatch(LOOKS[name], key) is not None for key in listed)) for name in names if name in LOOKS]
    return sorted((found for found in counts if found[1]), key=lambda found: -found[1])


def shown(found: Iterable[tuple[str, int]], total: int) -> str:
    """Formats as a message lists them.

    >>> shown([("loralib", 2)], 3)
    'loralib (2 of 3 keys)'
    """
    return ", ".join(f"{name} ({count} of {total} keys)" for name, count in found)
