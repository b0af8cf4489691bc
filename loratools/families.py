"""What a model's type says of its tensors: which are embeddings, which are stored transposed, which head is tied to which.

A 2-D tensor does not say what layer it belongs to. Transposed weights, stored (in, out), are those of transformers'
`pytorch_utils.Conv1D`; the modules that use it were read from transformers 5.23. Patterns are shell globs over tensor names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

EMBEDDINGS = (
    "*embed_tokens.weight", "*embed_positions.weight", "*wte.weight", "*wpe.weight", "*word_embeddings.weight",
    "*position_embeddings.weight", "*position_embedding.weight", "*token_type_embeddings.weight", "*token_embedding.weight",
    "*tokens_embed.weight", "*positions_embed.weight", "*embed_in.weight", "*relative_attention_bias.weight", "shared.weight",
    "*.shared.weight", "*tok_embeddings.weight", "*embeddings.tok_embeddings.weight", "*class_embedding.weight",
)  # fmt: skip
_CONV1D = (
    "*.c_attn.weight",
    "*.c_proj.weight",
    "*.c_fc.weight",
    "*.q_attn.weight",
    "c_attn.weight",
    "c_proj.weight",
    "c_fc.weight",
    "q_attn.weight",
)
TRANSPOSED = {
    "gpt2": _CONV1D,
    "openai-gpt": _CONV1D,
    "imagegpt": _CONV1D,
    "decision_transformer": _CONV1D,
    "clvp_decoder": ("*.c_attn.weight", "*.mlp.c_proj.weight", "*.mlp.c_fc.weight"),
    "clvp": ("*.c_attn.weight", "*.mlp.c_proj.weight", "*.mlp.c_fc.weight"),
}
# output head by the ending of the input embedding it may be tied to (transformers' _tied_weights_keys); an ending of one
# component is the whole name, as a base model saved without its head spells it
HEADS = (
    ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("model.shared.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("transformer.word_embeddings.weight", "lm_head.weight"),
    ("gpt_neox.embed_in.weight", "embed_out.weight"),
    ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    ("shared.weight", "lm_head.weight"),
    ("embed_tokens.weight", "lm_head.weight"),
    ("wte.weight", "lm_head.weight"),
)
_WITH_HEAD = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining", "DoubleHeadsModel")


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a tensor name fits one of the globs, given with or without `.weight`.

    >>> matches("h.0.c_proj.weight", ["*.c_proj"])
    True
    """
    return any(fnmatchcase(name, glob) or fnmatchcase(name, glob + ".weight") for glob in globs)


@dataclass(frozen=True)
class Family:
    """What a base's `config.json` says, with the user's globs on top."""

    config: Mapping[str, Any]
    more_embeddings: tuple[str, ...] = ()
    more_transposed: tuple[str, ...] = ()

    @property
    def _globs(self) -> tuple[str, ...]:
        types = [self.config, *(value for value in self.config.values() if isinstance(value, Mapping))]
        return tuple(glob for config in types for glob in TRANSPOSED.get(str(config.get("model_type")), ()))

    @property
    def tells_transposed(self) -> bool:
        """Whether the type of model, or the user, says which weights are stored transposed."""
        return bool(self.more_transposed or self._globs)

    def embedding(self, name: str) -> bool:
        return matches(name, self.more_embeddings) or matches(name, EMBEDDINGS)

    def transposed(self, name: str) -> bool:
        return matches(name, self.more_transposed) or matches(name, self._globs)

    def stacked(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a 3-D weight is a stack of experts' matrices rather than a 1-D convolution: by its name, or the config's count."""
        types = [self.config, *(value for value in self.config.values() if isinstance(value, Mapping))]
        counts = {value for config in types for key, value in config.items() if key.endswith("experts") and type(value) is int and value > 1}
        return len(shape) == 3 and ("expert" in name or shape[0] in counts)

    def tied(self, names: Iterable[str]) -> tuple[str, str] | None:
        """(embedding, head) that share one tensor in the model, named as this checkpoint would name them, or None."""
        present = set(names)
        text = self.config.get("text_config")
        flags = [part.get("tie_word_embeddings") for part in (self.config, text) if isinstance(part, Mapping)]
        stated = next((flag for flag in flags if flag is not None), None)
        architectures = self.config.get("architectures") or []
        if stated is False or (stated is None and not any(word in name for name in architectures for word in _WITH_HEAD)):
            return None
        for ending, head in HEADS:
            for name in sorted(present):
                if name == ending or (ending.count(".") > 1 and name.endswith("." + ending)):
                    prefix = name[: -len(ending)]
                    if stated is None and prefix + head in present:
                        return None
                    return name, prefix + head
        return None
