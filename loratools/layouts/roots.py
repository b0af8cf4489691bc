"""Where a pipeline's models lie: what their tensors' names begin with, in diffusers' folders, single files and adapters of both."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from loratools.errors import AmbiguousError
from loratools.flatnames import split_prefix

# the same model of a pipeline by all that its names begin with; nothing is the denoiser alone
ROOTS: Mapping[str, tuple[str, ...]] = {
    "denoiser": ("unet", "transformer", "model.diffusion_model", "diffusion_model"),
    "text_encoder": (
        "text_encoder", "cond_stage_model.transformer", "cond_stage_model.model", "conditioner.embedders.0.transformer",
        "text_encoders.clip_l.transformer",
    ),
    # the refiner of SDXL has the second one alone
    "text_encoder_2": (
        "text_encoder_2", "conditioner.embedders.1.model", "conditioner.embedders.0.model", "text_encoders.clip_g.transformer",
    ),
    "text_encoder_3": ("text_encoder_3", "text_encoders.t5xxl.transformer"),
}  # fmt: skip
DIFFUSERS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")  # folders of a pipeline
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


@dataclass(frozen=True)
class Roots:
    """What an adapter's names begin with on a side: roots that are this side's stay, and a model that stands alone has none.

    `networks` are those of its parts by (role, root or prefix).
    """

    side: str
    networks: Mapping[tuple[str, str], str]
    alone: bool

    def of(self, role: str, mine: str) -> str:
        roles = {role for role, _ in self.networks}
        denoiser = next((network for (other, _), network in self.networks.items() if other == "denoiser"), None)
        network = self.networks[role, mine]
        if self.alone:
            return ""
        if self.side == "diffusers":
            if mine in DIFFUSERS:
                return mine
            if role == "denoiser":
                return "unet" if network == "unet" else "transformer"
            if role == "text_encoder_3" and "text_encoder_2" not in roles:
                return self._t5(denoiser)
            return role
        return mine if "." in mine or mine == "diffusion_model" else self._original(role, mine, network, denoiser, roles)

    def _t5(self, denoiser: str | None) -> str:
        if denoiser is None:
            fact = "a T5 alone is the second text encoder of Flux, or the third of SD3"
            raise AmbiguousError(fact, remedy="give the base with --base")
        return "text_encoder_2" if denoiser == "flux" else "text_encoder_3"

    def _original(self, role: str, mine: str, network: str, denoiser: str | None, roles: Collection[str]) -> str:
        """ComfyUI's roots, and of SD 1's only text encoder its checkpoints' own."""
        if role == "denoiser":
            return "diffusion_model"
        if network == "t5":
            return "text_encoders.t5xxl.transformer"
        if role == "text_encoder_2":
            return "text_encoders.clip_g.transformer"
        first = denoiser in (None, "unet") and "text_encoder_2" not in roles and mine != "lora_te1"
        return "cond_stage_model.transformer" if first else "text_encoders.clip_l.transformer"
