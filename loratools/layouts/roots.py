"""Where a pipeline's models lie: what their tensors' names begin with, in diffusers' folders, single files and adapters of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loratools.flatnames import split_prefix

# the same model of a pipeline by all that its names begin with; nothing is the denoiser alone
ROOTS: Mapping[str, tuple[str, ...]] = {
    "denoiser": ("unet", "transformer", "model.diffusion_model", "diffusion_model"),
    "text_encoder": (
        "text_encoder", "cond_stage_model.transformer", "cond_stage_model.model", "conditioner.embedders.0.transformer",
        "text_encoders.clip_l.transformer",
    ),
    "text_encoder_2": ("text_encoder_2", "conditioner.embedders.1.model", "text_encoders.clip_g.transformer"),
    "text_encoder_3": ("text_encoder_3", "text_encoders.t5xxl.transformer"),
}  # fmt: skip
_ROLES = {root: role for role, roots in ROOTS.items() for root in roots}
_FLAT = {"lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2", "lora_te3": "text_encoder_3"}


def split_root(name: str) -> tuple[str, str, str]:
    """(role, root, rest) of a dotted name; the root of a model alone is empty.

    >>> split_root("model.diffusion_model.out.0.weight"), split_root("conv_in.weight")
    (('denoiser', 'model.diffusion_model', 'out.0.weight'), ('denoiser', '', 'conv_in.weight'))
    """
    root = max((root for root in _ROLES if name.startswith(f"{root}.")), key=len, default="")
    return _ROLES.get(root, "denoiser"), root, name[len(root) + 1 :] if root else name


def split_word(word: str) -> tuple[str, str, str] | None:
    """(role, prefix, rest) of a flat name, or None where it begins as none does.

    >>> split_word("lora_te2_text_projection.weight")
    ('text_encoder_2', 'lora_te2', 'text_projection.weight')
    """
    found = split_prefix(word)
    return None if found is None else (_FLAT.get(found[0], "denoiser"), *found)


def by_root(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """The rests of dotted names by (role, root)."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        role, root, rest = split_root(name)
        found.setdefault((role, root), []).append(rest)
    return found


def joined(root: str, rest: str) -> str:
    return f"{root}.{rest}" if root else rest
