"""The tables of model types, held against transformers: what it ties and transposes is known here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from transformers.pytorch_utils import Conv1D

from loratools.families import BIASED_HEADS, HEADS, TRANSPOSED, Families, Family, matches, of_head, of_vocabulary

MODELS = Path(transformers.__file__).parent / "models"
# ties that are no embedding and head of one vocabulary, or of models whose heads are spread over several modules
ODD = {
    "blt", "bridgetower", "csm", "diffusion_gemma", "florence2", "git", "idefics", "kyutai_speech_to_text", "luke", "modernvbert", "neomme",
    "prophetnet", "qwen3_omni_moe", "speecht5", "t5gemma", "t5gemma2", "udop", "vilt", "xlnet", "fsmt", "ultrabert", "blip", "kosmos2",
    "granite_speech5",
}  # fmt: skip


def ties() -> list[tuple[str, str, str]]:
    """(model, embedding, head) of every class in transformers that ties a head to an embedding."""
    found = []
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        for table in re.findall(r"_tied_weights_keys = (\{.*?\})", path.read_text(), re.S):
            for head, embedding in re.findall(r'"([^"]+)"\s*:\s*"([^"]+)"', table):
                if head.endswith("weight") and embedding.endswith(
                    ("embed_tokens.weight", "wte.weight", "embeddings.weight", "embed_in.weight")
                ):
                    found.append((path.parent.name, embedding, head))
    return found


def test_every_tie_of_transformers_is_known() -> None:
    pairs = [(model, embedding, head) for model, embedding, head in ties() if model not in ODD and "embed_tokens" not in head]
    assert len(pairs) > 200
    lacking = []
    for model, embedding, head in pairs:
        names = {embedding, head.removesuffix("weight") + "bias"}
        family = Family({"tie_word_embeddings": True, "architectures": ["XForMaskedLM"]})
        if family.tied(names) != (embedding, head):
            lacking.append((model, embedding, head, family.tied(names)))
    # `proj_out` and `output_projection` stand beside `lm_head` for the same embedding: the checkpoint's own tensors decide
    assert [item for item in lacking if item[2] not in ("proj_out.weight", "output_projection.weight", "lm_head.weight")] == []
    assert {item[0] for item in lacking} <= {
        "canary",
        "cohere_asr",
        "moonshine",
        "moonshine_streaming",
        "trocr",
        "whisper",
        "gpt_neox",
        "bert_generation",
        "funnel",
        "pix2struct",
    }


def test_every_model_with_conv1d_is_in_the_table() -> None:
    using = {
        path.parent.name for path in MODELS.glob("*/modeling_*.py") if re.search(r"(?<!Separable)(?<!nn\.)\bConv1D\(", path.read_text())
    }
    assert using == {"gpt2", "openai", "imagegpt", "decision_transformer", "clvp"}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("GPT2LMHeadModel", transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=5, add_cross_attention=True)),
        ("OpenAIGPTLMHeadModel", transformers.OpenAIGPTConfig(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=5)),
        ("ImageGPTModel", transformers.ImageGPTConfig(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=5)),
        ("DecisionTransformerModel", transformers.DecisionTransformerConfig(hidden_size=8, n_layer=1, n_head=2, state_dim=3, act_dim=2)),
    ],
)
def test_transposed_weights_are_exactly_those_of_conv1d(name: str, config: transformers.PretrainedConfig) -> None:
    model = getattr(transformers, name)(config)
    family = Family({"model_type": config.model_type})
    assert config.model_type in TRANSPOSED and family.tells_transposed
    stored = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)}
    assert stored and {key for key, value in model.state_dict().items() if value.ndim == 2 and family.transposed(key)} == stored


def test_a_nested_type_and_the_users_globs() -> None:
    nested = Family({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}})
    assert nested.transposed("decoder.transformer.h.0.attn.c_proj.weight") and nested.tells_transposed
    plain = Family({"model_type": "llama"})
    assert not plain.tells_transposed and not plain.transposed("h.0.c_proj.weight")
    told = Family({}, more_transposed=("*.odd",))
    assert told.tells_transposed and told.transposed("a.odd.weight") and not told.transposed("a.even.weight")


LLAMA = {"model.embed_tokens.weight", "model.norm.weight"}


@pytest.mark.parametrize(
    ("config", "names", "expected"),
    [
        ({"tie_word_embeddings": True}, LLAMA, True),
        ({"tie_word_embeddings": True}, LLAMA | {"lm_head.weight"}, True),
        ({"tie_word_embeddings": False}, LLAMA, False),
        ({"tie_word_embeddings": False}, LLAMA | {"lm_head.weight"}, False),
        ({"architectures": ["LlamaForCausalLM"]}, LLAMA, True),  # transformers' default, and no head is stored
        ({"architectures": ["LlamaForCausalLM"]}, LLAMA | {"lm_head.weight"}, False),
        ({"architectures": ["LlamaModel"]}, LLAMA, False),
        ({}, LLAMA, False),
        ({"tie_word_embeddings": True, "architectures": ["LlamaForSequenceClassification"]}, LLAMA | {"score.weight"}, False),
        ({"text_config": {"tie_word_embeddings": True}}, LLAMA, True),
        ({"text_config": {"tie_word_embeddings": False}}, LLAMA, False),
    ],
)
def test_tied_or_not(config: dict[str, object], names: set[str], expected: bool) -> None:
    assert Family(config).tied(names) == (("model.embed_tokens.weight", "lm_head.weight") if expected else None)


def test_where_the_head_is_depends_on_what_is_there() -> None:
    words, tied = "bert.embeddings.word_embeddings.weight", Family({"tie_word_embeddings": True})
    assert tied.tied({words, "cls.predictions.bias"}) == (words, "cls.predictions.decoder.weight")
    assert tied.tied({words, "lm_head.dense.weight", "lm_head.bias"}) == (words, "lm_head.decoder.weight")
    assert tied.tied({words, "bert.pooler.dense.weight"}) is None
    prefixed = "language_model.model.embed_tokens.weight"
    assert tied.tied({prefixed}) == (prefixed, "language_model.lm_head.weight")
    assert tied.tied({"my_shared.weight"}) is None


def test_of_head_and_of_vocabulary() -> None:
    assert of_head("lm_head.weight") and of_head("a.b.lm_head.weight") and not of_head("my_lm_head.weight") and not of_head("lm_head.bias")
    yes = ["model.embed_tokens.weight", "wte.weight", "lm_head.weight", "lm_head.bias", "cls.predictions.decoder.bias", "x.shared.weight"]
    no = ["model.norm.weight", "model.embed_tokens.bias", "q_proj.weight", "embed_tokens.scale", "wpe.weight"]
    assert all(map(of_vocabulary, yes)) and not any(map(of_vocabulary, no))
    assert all(of_head(head) or head in ("head.weight", "decoder.weight") for _, head in (*HEADS, *BIASED_HEADS))
    assert all(of_vocabulary(embedding.replace("*", "x")) for embedding, head in (*HEADS, *BIASED_HEADS))


def test_globs_with_and_without_weight() -> None:
    assert (
        matches("h.0.c_proj.weight", ["*.c_proj"])
        and matches("h.0.c_proj.weight", ["*.weight"])
        and not matches("h.0.c_proj.weight", ["c_proj"])
    )


def test_layers_that_only_predict_further_ahead_concern_no_adapter() -> None:
    base = {f"model.layers.{index}.q.weight": index for index in range(4)} | {"lm_head.weight": 9}
    counted = {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
    assert set(base) - set(Family(counted).concerned(base, [])) == {"model.layers.3.q.weight"}
    for config in ({}, {"num_hidden_layers": 3}, {**counted, "num_nextn_predict_layers": 0}, {**counted, "num_hidden_layers": "3"}):
        assert Family(config).concerned(base, []) == base


def test_the_types_of_a_model_and_its_parts() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "mixtral"}, "vision_config": {"x": 1}, "other": 3}
    assert Family(config).types == ("llava", "mixtral") and Family({}).types == ()
    pipeline = Families({}, members={"a.": Family(config), "b.": Family({"model_type": "clip"}), "c.": Family({})})
    assert pipeline.types == ("llava", "mixtral", "clip")
