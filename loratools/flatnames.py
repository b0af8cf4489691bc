"""Names with their dots made underscores, as kohya's and LyCORIS' files spell modules: found again in a base, never guessed.

`to_out_0` may be `to_out.0` or `to.out_0`: flattening loses which. So the base's own names are flattened and compared. A prefix says
which part of a pipeline is meant; in a base that is one model alone, it is told apart by the base having no such parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loratools.errors import AmbiguousError

# how files spell the parts of a pipeline, by how bases do: diffusers' components, and the prefixes of single-file checkpoints
PARTS: Mapping[str, tuple[str, ...]] = {
    "unet": ("lora_unet", "lora_unet_", "lora_unet_unet", "lycoris", "oft_unet"),
    "transformer": ("lora_unet", "lora_transformer", "lycoris", "oft_unet"),
    "prior": ("lora_prior_unet", "lora_unet", "lycoris"),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
    "model.diffusion_model": ("lora_unet", "lora_unet_", "lora_unet_unet", "lora_transformer", "lycoris", "oft_unet"),
    "diffusion_model": ("lora_unet", "lora_unet_", "lora_unet_unet", "lora_transformer", "lycoris", "oft_unet"),
    "cond_stage_model.transformer": ("lora_te", "lora_te1"),
    "cond_stage_model.model": ("lora_te", "lora_te1"),
    "conditioner.embedders.0.transformer": ("lora_te1",),
    "conditioner.embedders.0.model": ("lora_te2",),
    "conditioner.embedders.1.model": ("lora_te2",),
    "text_encoders.clip_l.transformer": ("lora_te1",),
    "text_encoders.clip_g.transformer": ("lora_te2",),
    "text_encoders.t5xxl.transformer": ("lora_te3",),
}
_T5 = "text_encoder_2.encoder.block."  # Flux' second text encoder, which sd-scripts numbers as SD3's third
PREFIXES = tuple(dict.fromkeys(prefix for prefixes in PARTS.values() for prefix in prefixes))


def flatten(name: str) -> str:
    """A dotted path as one word.

    >>> flatten("mid_block.attentions.0.to_out.0")
    'mid_block_attentions_0_to_out_0'
    """
    return name.replace(".", "_")


def split_prefix(word: str) -> tuple[str, str] | None:
    """(prefix, rest) of a flat name, or None where it begins as no file of this family does; the longest prefix wins.

    >>> split_prefix("lora_te1_text_model_final_layer_norm"), split_prefix("lora_unet__blocks_0")
    (('lora_te1', 'text_model_final_layer_norm'), ('lora_unet_', 'blocks_0'))
    """
    found = [prefix for prefix in PREFIXES if word.startswith(f"{prefix}_")]
    best = max(found, key=len, default=None)
    return None if best is None else (best, word[len(best) + 1 :])


def meet(words: Iterable[str], base: Iterable[str]) -> dict[str, str]:
    """Flat tensor names (`lora_unet_mid_block_to_q.weight`) to the base's own; what the base lacks is not in it.

    Raises AmbiguousError where two of the base's tensors are spelt alike.
    """
    index: dict[str, list[str]] = {}
    for name in base:
        module, _, leaf = name.rpartition(".")
        for spelling in _spellings(module):
            index.setdefault(f"{spelling}.{leaf}", []).append(name)
    found = {}
    for word in words:
        names = index.get(word, [])
        if len(names) > 1:
            raise AmbiguousError("two of the base's tensors are spelt alike", tensor=word, found=" and ".join(names[:3]))
        if names:
            found[word] = names[0]
    return found


def _spellings(module: str) -> list[str]:
    """Every flat name of a base's module: of its part where it lies in one, else of any."""
    for part, prefixes in PARTS.items():
        if module.startswith(f"{part}."):
            return [f"{prefix}_{flatten(module[len(part) + 1 :])}" for prefix in (("lora_te3",) if module.startswith(_T5) else prefixes)]
    return [f"{prefix}_{flatten(module)}" for prefix in PREFIXES]


def spelt(module: str, parts: Iterable[str]) -> str | None:
    """The usual flat name of a module of a pipeline whose parts are known; None for one that lies in none of them.

    >>> spelt("text_encoder.text_model.fc1", ["unet", "text_encoder"]), spelt("text_encoder.fc1", ["text_encoder", "text_encoder_2"])
    ('lora_te_text_model_fc1', 'lora_te1_fc1')
    """
    several = "text_encoder_2" in set(parts)
    for part, prefixes in PARTS.items():
        if module.startswith(f"{part}."):
            prefix = "lora_te3" if module.startswith(_T5) else prefixes[1 if part == "text_encoder" and several else 0]
            return f"{prefix}_{flatten(module[len(part) + 1 :])}"
    return None
