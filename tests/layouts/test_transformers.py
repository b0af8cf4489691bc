"""The table is the installed transformers' own: every renaming and every fusion of experts, class by class, in both directions."""

from __future__ import annotations

import json
from collections import Counter
from importlib.metadata import version
from typing import Any

import pytest
from torch import nn
from transformers import conversion_mapping, core_model_loading

from loratools.families import Families, Family
from loratools.layouts.rules import Fusion, Group, Layout, Layouts, Other, Place, Rename
from loratools.layouts.transformers import VERSION, Part, every_layout, layout_of, layouts_of, rules_of, table
from tests.interop import moe, tiny
from tests.layouts import make_table

LINES = make_table.OUT.read_text(encoding="utf-8").splitlines()
INSTALLED = pytest.mark.skipif(not version("transformers").startswith(f"{VERSION}."), reason="the table is of another version")
# transformers' operations beside renaming and stacking: what they convert is refused by name
OTHERS = {
    "Chunk", "Concatenate", "Transpose", "Interleave", "Split", "PermuteForRope", "Chunk+PermuteForRope", "Interleave+Chunk",
    "ErnieFuseAndSplitTextVisionExperts",
}  # fmt: skip


@INSTALLED
def test_the_rules_are_transformers_own() -> None:
    header = make_table.HEADER.format(version=version("transformers")).splitlines()
    assert LINES[: len(header)] == header
    rows = [line for line in LINES[len(header) :] if "\tmodel\t" not in line]
    assert rows == make_table.rules()
    assert set(table().rules) == set(make_table.all_rules())


@INSTALLED
def test_every_renaming_and_every_stack_is_done_and_the_rest_refused_by_name() -> None:
    done, other = Counter[str](), Counter[str]()
    for key, transforms in make_table.all_rules().items():
        rules = rules_of("", (Part(key, None),))
        assert len(rules) == len(transforms), key
        for rule, transform in zip(rules, transforms, strict=True):
            if isinstance(transform, core_model_loading.WeightRenaming):
                assert isinstance(rule, Rename | Group), (key, transform)
            elif any(isinstance(step, core_model_loading.MergeModulelist) for step in transform.operations):
                assert isinstance(rule, Fusion) and len(rule.patterns) == len(transform.source_patterns), (key, transform)
            else:
                assert isinstance(rule, Other), (key, transform)
                other[rule.operation] += 1
            done[type(rule).__name__] += 1
    assert set(other) == OTHERS
    assert done == {"Rename": 1217, "Group": 2, "Fusion": 106, "Other": 65}


SAMPLE = [
    "LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration", "Qwen2VLForConditionalGeneration", "ViTForImageClassification",
    "BeitBackbone", "CLIPModel", "SiglipForImageClassification", "PaliGemmaModel", "SegformerForSemanticSegmentation", "VideoLlavaModel",
    "Qwen2AudioForConditionalGeneration", "DepthAnythingForDepthEstimation", "LlamaForCausalLM", "MixtralForCausalLM", "BertModel",
]  # fmt: skip


@INSTALLED
@pytest.mark.parametrize("name", SAMPLE)
def test_the_parts_of_a_model_are_where_it_has_them(name: str) -> None:
    import transformers

    found = make_table.line(make_table.built(getattr(transformers, name)))
    assert [line for line in LINES if line.startswith(f"{name}\tmodel\t")] == ([found] if found else [])


# -- both directions, by transformers' own renaming


MODELS = [*tiny.RENAMED, *moe.MODELS]


def made(kind: str) -> nn.Module:
    return tiny.new(kind) if kind in tiny.MODELS else moe.MODELS[kind].new()


def file_names(model: nn.Module) -> dict[str, str]:
    """Names in a file by transformers' own saving, each with the name in memory that it goes into."""
    transforms = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    reverse = [transform.reverse_transform() for transform in transforms[::-1]]
    renamings = [item for item in reverse if isinstance(item, core_model_loading.WeightRenaming)]
    converters = [item for item in reverse if isinstance(item, core_model_loading.WeightConverter)]
    found = {}
    for name, tensor in model.state_dict().items():
        inner, source = core_model_loading.apply_converters(name, converters)
        if source is None:
            found[core_model_loading.apply_renamings(name, renamings)] = name
            continue
        converter = next(item for item in converters if source in item.source_patterns)
        converter.add_tensor(inner, name, source, tensor)  # type: ignore[arg-type]
        for other in converter.convert(inner, model=model, config=model.config):  # type: ignore[arg-type]
            found[core_model_loading.apply_renamings(other, renamings)] = name
    return found


@INSTALLED
@pytest.mark.parametrize("kind", MODELS)
def test_names_of_files_lead_back_to_memory(kind: str) -> None:
    model = made(kind)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}  # type: ignore[union-attr,operator]
    names = file_names(model)
    layout = layout_of(json.loads(json.dumps(config, default=str))) or Layout("none", ())
    places = layout.places(list(names))
    assert {name: place.name for name, place in places.items() if isinstance(place, Place)} == names
    stacks = {name for name, tensor in model.state_dict().items() if tensor.ndim == 3 and names.get(name) != name}
    stacks = {name for name in stacks if name in names.values()}
    assert {place.name for place in places.values() if isinstance(place, Place) and place.expert is not None} == (
        stacks if kind in moe.MODELS else set()
    )
    memory = layout.places(list(model.state_dict()))  # a file saved by a newer transformers has these, and they stay
    assert {name: place for name, place in memory.items() if place != Place(name)} == {}


@INSTALLED
@pytest.mark.parametrize("kind", MODELS)
def test_each_name_is_what_transformers_makes_of_it(kind: str) -> None:
    model = made(kind)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}  # type: ignore[union-attr,operator]
    names = [*file_names(model), *model.state_dict(), "model.other.layers.0.attention.query.weight", "vision_model.encoder.layer.3.x"]
    transforms = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    renamings = [item for item in transforms if isinstance(item, core_model_loading.WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, core_model_loading.WeightConverter)]
    layout = layout_of(json.loads(json.dumps(config, default=str))) or Layout("none", ())
    for name, place in layout.places(names).items():
        expected, _ = core_model_loading.rename_source_key(name, renamings, converters)
        assert (place.name if isinstance(place, Place) else place.names[0]) == expected


# -- which rules a config means


def test_a_class_goes_before_a_type_and_parts_have_theirs() -> None:
    llava = layout_of({"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"})
    only_type = layout_of({"model_type": "llava"})
    assert llava is not None and only_type is not None and llava.title == only_type.title == "llava"
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert llava.places([name])[name] == Place("model.vision_tower.encoder.layers.0.mlp.fc1.weight")
    assert only_type.places([name])[name] == Place("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight")


def test_the_types_of_parts_are_known_too() -> None:
    text = {"text_config": {"model_type": "qwen3_moe"}}
    found = layout_of({"architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", **text})
    assert found is not None
    name = "language_model.model.layers.0.mlp.experts.5.up_proj.weight"
    assert found.places([name])[name] == Place("model.language_model.layers.0.mlp.experts.gate_up_proj", 5, 1, 2)


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, {"model_type": None, "architectures": None}]
)
def test_a_model_with_the_same_names_everywhere_has_no_layout(config: dict[str, Any]) -> None:
    assert layout_of(config) is None and layouts_of(Family(config)) is None


def test_a_pipelines_models_have_a_layout_each() -> None:
    members = {
        "text_encoder.": Family({"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}),
        "unet.": Family({"_class_name": "UNet2DConditionModel"}),
    }
    found = layouts_of(Families({}, members=members))
    assert found is not None and found.title == f"transformers {VERSION}, clip_text_model"
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight"
    assert found.places([name, "unet.text_model.x"]) == {
        name: Place("text_encoder.encoder.layers.0.mlp.fc1.weight"),
        "unet.text_model.x": Place("unet.text_model.x"),
    }


def test_every_layout_is_there_once() -> None:
    found = list(every_layout())
    assert all(isinstance(layout, Layouts) for layout in found) and len(found) == len({layout.parts[0].rules for layout in found}) > 200
    assert not any(layout.parts[0].title == "legacy" for layout in found)


def test_rows_read_in_torchless_places() -> None:
    """The table is text; reading it takes no part of torch or transformers."""
    import subprocess
    import sys

    code = "import sys; from loratools.layouts.transformers import table; table(); print(*{'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
