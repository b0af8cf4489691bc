"""What a model's type says of its tensors: which are embeddings, which are stored transposed, which head is tied to which.

A 2-D tensor does not say what layer it belongs to. Transposed weights, stored (in, out), are those of transformers'
`pytorch_utils.Conv1D`; the modules that use it were read from transformers 5.23. Patterns are shell globs over tensor names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

T = TypeVar("T")

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
# models whose experts' matrices are stored (in, out), which transformers says by `is_transposed` of their class
TURNED_EXPERTS = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
# output head by the ending of the input embedding it may be tied to (transformers' _tied_weights_keys); an ending of one
# component is the whole name, as a base model saved without its head spells it, and `*` is one component of any name
HEADS = (
    ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    ("model.decoder.embed_tokens.weight", "proj_out.weight"),
    ("model.decoder.embed_tokens.weight", "output_projection.weight"),
    ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ("model.text_model.embed_tokens.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("model.language_model.shared.weight", "lm_head.weight"),
    ("model.shared.weight", "lm_head.weight"),
    ("led.shared.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("transformer.word_embeddings.weight", "lm_head.weight"),
    ("transformer.tokens_embed.weight", "lm_head.weight"),
    ("transformer.w.weight", "lm_head.weight"),
    ("backbone.embeddings.weight", "lm_head.weight"),
    ("rwkv.embeddings.weight", "head.weight"),
    ("biogpt.embed_tokens.weight", "output_projection.weight"),
    ("gpt_neox.embed_in.weight", "embed_out.weight"),
    ("gpt_neox.embed_in.weight", "lm_head.weight"),
    ("gpt_neox_japanese.embed_in.weight", "embed_out.weight"),
    ("shared.weight", "lm_head.weight"),
    ("embed_tokens.weight", "lm_head.weight"),
    ("wte.weight", "lm_head.weight"),
    ("tokens_embed.weight", "lm_head.weight"),
    ("word_embeddings.weight", "lm_head.weight"),
)
# heads with a bias or layers of their own: there only where those are in the checkpoint
BIASED_HEADS = (
    ("*.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("*.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    ("*.embeddings.word_embeddings.weight", "generator_lm_head.weight"),
    ("*.embeddings.word_embeddings.weight", "vocab_projector.weight"),
    ("*.embeddings.word_embeddings.weight", "predictions.decoder.weight"),
    ("*.embeddings.word_embeddings.weight", "lm_head.weight"),
    ("model.embeddings.tok_embeddings.weight", "decoder.weight"),
    ("transformer.word_embedding.weight", "lm_loss.weight"),
    ("transformer.embeddings.weight", "pred_layer.proj.weight"),
)
_EMBEDDED = {ending.split(".")[-2] for ending, _ in (*HEADS, *BIASED_HEADS)}
_HEADED = {head for _, head in (*HEADS, *BIASED_HEADS)} - {"head.weight", "decoder.weight"}  # which may be anything's
_WITH_HEAD = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining", "DoubleHeadsModel")
_OTHER_HEAD = ("Classification", "ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction")


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a tensor name fits one of the globs, given with or without `.weight`.

    >>> matches("h.0.c_proj.weight", ["*.c_proj"])
    True
    """
    return any(fnmatchcase(name, glob) or fnmatchcase(name, glob + ".weight") for glob in globs)


def of_head(name: str) -> bool:
    """Whether a tensor is the weight of an output head that models tie to their input embedding.

    >>> of_head("language_model.lm_head.weight")
    True
    """
    return any(f".{name}".endswith(f".{head}") for head in _HEADED)


def of_vocabulary(name: str) -> bool:
    """Whether a tensor is an input embedding's weight, or the weight or bias of an output head."""
    module, _, leaf = name.rpartition(".")
    return of_head(f"{module}.weight") if leaf == "bias" else leaf == "weight" and (module.rpartition(".")[2] in _EMBEDDED or of_head(name))


def _before(ending: str, name: str) -> str | None:
    """What stands before an ending in a name: a prefix of whole components, or None where it does not end so."""
    wanted, parts = ending.split("."), name.split(".")
    cut = len(parts) - len(wanted)
    fits = cut >= 0 and all(want in ("*", part) for want, part in zip(wanted, parts[cut:], strict=True))
    return "".join(part + "." for part in parts[:cut]) if fits and (cut == 0 or len(wanted) > 2) else None


@dataclass(frozen=True)
class Family:
    """What a base's `config.json` says, with the user's globs on top."""

    config: Mapping[str, Any]
    more_embeddings: tuple[str, ...] = ()
    more_transposed: tuple[str, ...] = ()

    @property
    def types(self) -> tuple[str, ...]:
        """The model's type and those of its parts, as far as the config names them."""
        parts = [self.config, *(value for value in self.config.values() if isinstance(value, Mapping))]
        return tuple(str(part["model_type"]) for part in parts if part.get("model_type"))

    @property
    def _globs(self) -> tuple[str, ...]:
        return tuple(glob for kind in self.types for glob in TRANSPOSED.get(kind, ()))

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
        stated = [value for config in types for key, value in config.items() if key.endswith("experts") and type(value) is int]
        counts = {value for value in stated if value > 1}
        return len(shape) == 3 and ("expert" in name or shape[0] in counts)

    def tied(self, names: Iterable[str]) -> tuple[str, str] | None:
        """(embedding, head) that share one tensor in the model, named as this checkpoint would name them, or None."""
        present = set(names)
        text = self.config.get("text_config")
        flags = [part.get("tie_word_embeddings") for part in (self.config, text) if isinstance(part, Mapping)]
        stated = next((flag for flag in flags if flag is not None), None)
        found = _pairs(present)
        held = [pair for pair in found if pair[1] in present]
        made = [name for name in self.config.get("architectures") or [] if isinstance(name, str)]
        if stated is False or (stated is None and (held or not any(word in name for name in made for word in _WITH_HEAD))):
            return None
        if not held and any(word in name for name in made for word in _OTHER_HEAD):
            return None
        return next(iter(held or found), None)


    def ties(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Every such pair: of one model, at most one."""
        pair = self.tied(names)
        return [pair] if pair else []

    def concerned(self, base: Mapping[str, T], changed: Iterable[str]) -> Mapping[str, T]:
        """The tensors of the models in which something is changed: of one model, all but layers that transformers does not load.

        Those come after the ones that the config counts, and predict tokens further ahead (`num_nextn_predict_layers`).
        """
        count = self.config.get("num_hidden_layers")
        if not self.config.get("num_nextn_predict_layers") or type(count) is not int:
            return base
        layers = {name: re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in base}
        return {name: base[name] for name, found in layers.items() if found is None or int(found[1]) < count}


@dataclass(frozen=True)
class Families(Family):
    """What the configs of a pipeline's models say, each of the tensors whose names begin with its key in `members`."""

    members: Mapping[str, Family] = field(default_factory=dict)

    def _asked(self, name: str) -> tuple[Family, str]:
        prefix = next((prefix for prefix in self.members if name.startswith(prefix)), None)
        return (Family({}), name) if prefix is None else (self.members[prefix], name.removeprefix(prefix))

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(kind for member in self.members.values() for kind in member.types)

    @property
    def tells_transposed(self) -> bool:
        return bool(self.more_transposed) or any(member.tells_transposed for member in self.members.values())

    def embedding(self, name: str) -> bool:
        member, own = self._asked(name)
        return matches(name, self.more_embeddings) or member.embedding(own)

    def transposed(self, name: str) -> bool:
        member, own = self._asked(name)
        return matches(name, self.more_transposed) or member.transposed(own)

    def stacked(self, name: str, shape: tuple[int, ...]) -> bool:
        member, own = self._asked(name)
        return member.stacked(own, shape)

    def ties(self, names: Iterable[str]) -> list[tuple[str, str]]:
        known, pairs = list(names), []
        for prefix, member in self.members.items():
            pair = member.tied(name.removeprefix(prefix) for name in known if name.startswith(prefix))
            pairs += [(prefix + pair[0], prefix + pair[1])] if pair else []
        return pairs

    def tied(self, names: Iterable[str]) -> tuple[str, str] | None:
        return next(iter(self.ties(names)), None)

    def concerned(self, base: Mapping[str, T], changed: Iterable[str]) -> Mapping[str, T]:
        names = list(changed)
        prefixes = tuple(prefix for prefix in self.members if any(name.startswith(prefix) for name in names))
        return {name: value for name, value in base.items() if name.startswith(prefixes)}


def _pairs(present: set[str]) -> list[tuple[str, str]]:
    """Every (embedding, head) that the names allow, the head being in the checkpoint or not."""
    pairs = []
    for ending, head in (*BIASED_HEADS, *HEADS):
        for name in sorted(present):
            prefix = _before(ending, name)
            if prefix is None:
                continue
            parent = prefix + (head.removesuffix("decoder.weight") if ".decoder." in head else head.removesuffix("weight"))
            if (ending, head) in HEADS or any(other.startswith(parent) for other in present):
                pairs.append((name, prefix + head))
    return pairs
