"""Cases of the methods in `formats/peft_multiplicative.py`, `peft_rotations.py` and `peft_projections.py`."""

from __future__ import annotations

import torch
from peft import (
    BOFTConfig,
    DeftConfig,
    GloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    RoadConfig,
)

from tests.interop.methods import CONV1D, LINEAR, Case, near_one


def scaled_near_one(name: str, tensor: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """Factors of rows about 1, all else about 0."""
    return near_one(name, tensor, noise) if "boft_s" in name else 0.3 * torch.randn(tensor.shape, generator=noise)


def beside(name: str, tensor: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """What stands in the place of singular vectors and values, off them."""
    return tensor * (1 + 0.1 * torch.randn(tensor.shape, generator=noise)) + 0.1 * torch.randn(tensor.shape, generator=noise)


ONES = ("point2", "table")  # what OFT turns besides linear layers: kernels of size 1, and embeddings
SQUARES = ("point2", "even2")  # convolutions whose kernel, stride and padding are alike in both directions, as BOFT and HRA want them
OFT = {"oft_block_size": 4}
BOFT = {"boft_block_size": 2}

CASES = {
    "ia3": Case(IA3Config, (*LINEAR, "conv2", "point2", "conv3"), {"feedforward_modules": []}, near_one),
    "ia3, before the layer": Case(
        IA3Config, (*LINEAR, "conv2", "conv3"), {"feedforward_modules": ["square", "conv2", "conv3"]}, near_one,
        refused={"feedforward_modules": ["linear"]},
    ),
    "ia3, transposed": Case(IA3Config, CONV1D, {"feedforward_modules": ["gpt"], "fan_in_fan_out": True}, near_one),
    "oft": Case(
        OFTConfig, (*LINEAR, *ONES), OFT, flips={"use_cayley_neumann": False, "num_cayley_neumann_terms": 4, "coft": True},
        refused={"oft_block_size": 2, "r": 1, "block_share": True, "num_cayley_neumann_terms": None, "use_cayley_neumann": None},
    ),
    "oft, exactly": Case(OFTConfig, (*LINEAR, *ONES), {**OFT, "use_cayley_neumann": False}, flips={"use_cayley_neumann": True}),
    "oft, by the number of blocks": Case(OFTConfig, ("linear", "table"), {"r": 3, "oft_block_size": 0}, refused={"r": 2}),
    "oft, blocks of another size": Case(OFTConfig, (*LINEAR, *ONES), {"oft_block_size": 7}),
    "oft, one block for all": Case(
        OFTConfig, (*LINEAR, "table"), {**OFT, "block_share": True}, refused={"block_share": False},
    ),
    "oft, bounded": Case(OFTConfig, LINEAR, {**OFT, "coft": True, "eps": 0.9}, flips={"eps": 0.5, "coft": False}),
    "oft, two terms": Case(OFTConfig, LINEAR, {**OFT, "num_cayley_neumann_terms": 2}, flips={"num_cayley_neumann_terms": 3}),
    "boft": Case(
        BOFTConfig, (*LINEAR, *SQUARES), BOFT, scaled_near_one,
        refused={"boft_block_size": 4, "boft_block_num": 3, "boft_n_butterfly_factor": 0},
    ),
    "boft, by the number of blocks": Case(
        BOFTConfig, LINEAR, {"boft_block_size": 0, "boft_block_num": 4}, scaled_near_one, refused={"boft_block_num": 2},
    ),
    "hra": Case(HRAConfig, (*LINEAR, *SQUARES), {"r": 4}, flips={"apply_GS": True}, refused={"r": 3}),
    "hra, one plane": Case(HRAConfig, LINEAR, {"r": 1}),
    "hra, orthogonal": Case(HRAConfig, (*LINEAR, *SQUARES), {"r": 4, "apply_GS": True}, flips={"apply_GS": False}),
    "road": Case(
        RoadConfig, LINEAR, {"group_size": 4}, near_one, flips={"group_size": 2}, refused={"variant": "road_2", "group_size": 3},
    ),
    "road, a number for each row": Case(RoadConfig, LINEAR, {"variant": "road_2", "group_size": 10}, near_one, flips={"group_size": 2}),
    "road, two for each row": Case(RoadConfig, LINEAR, {"variant": "road_4", "group_size": 4}, near_one, refused={"variant": "road_1"}),
    "hira": Case(
        HiraConfig, (*LINEAR, *CONV1D, "conv1", "conv2", "point2", "conv3", "table"), {"r": 4, "fan_in_fan_out": True}, refused={"r": 3},
    ),
    "hira, patterns": Case(HiraConfig, LINEAR, {"r": 4, "rank_pattern": {"square": 2}}, refused={"r": 2}),  # which peft does not heed
    "glora": Case(
        GloraConfig, LINEAR, {"r": 3}, refused={"r": 2, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    ),
    "glora, vectors": Case(
        GloraConfig, LINEAR, {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}, refused={"config_A_B": "constant"},
    ),
    "glora, constants": Case(
        GloraConfig, LINEAR, {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
        refused={"config_A_B": "none", "config_C": None},
    ),
    "glora, biases alone": Case(GloraConfig, LINEAR, {"r": 3, "config_A_B": "none", "config_D_E": "constant"}),
    "deft": Case(
        DeftConfig, (*LINEAR, *CONV1D), {"r": 4, "fan_in_fan_out": True}, flips={"decomposition_method": "qr", "alpha": 7},
        refused={"r": 3, "para": True},
    ),
    "deft, orthogonal": Case(
        DeftConfig, (*LINEAR, *CONV1D), {"r": 4, "alpha": 6, "decomposition_method": "qr", "fan_in_fan_out": True},
        flips={"decomposition_method": "relu", "alpha": 0},
    ),
    "deft, more than the outputs": Case(DeftConfig, ("square",), {"r": 30, "decomposition_method": "qr"}),
    "para": Case(DeftConfig, LINEAR, {"r": 4, "para": True, "decomposition_method": "qr"}, flips={"decomposition_method": "relu"}),
    "peanut": Case(
        PeanutConfig, LINEAR, {"r": 4, "depth": 2, "scaling": 1.5}, flips={"act_fn": "gelu", "scaling": 2.0},
        refused={"r": 3, "depth": 1, "act_fn": "prelu"},
    ),
    "peanut, shallow": Case(PeanutConfig, LINEAR, {"r": 4, "act_fn": "tanh"}, flips={"act_fn": "linear"}, refused={"depth": 1}),
    "osf": Case(OSFConfig, LINEAR, {"effective_rank": 8}, beside, refused={"effective_rank": 7, "rank_pattern": {"sq": 2}}),
    "osf, shares": Case(
        OSFConfig, LINEAR, {"effective_rank": 0.7, "rank_pattern": {"qua": 0.3}}, beside, refused={"rank_pattern": {"x": 1}},
    ),
    "osf, half": Case(OSFConfig, LINEAR, {}, beside, refused={"effective_rank": "8"}),
}  # fmt: skip
