"""Laws of every layer: the output before training, the forward against float64 algebra, merging, state dicts, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from loratools.errors import OptionError, UnsupportedError
from loratools.layers import LoRAConv2d, LoRAEmbedding, LoRALinear, Settings
from tests.files import raw
from tests.layers.cases import KINDS, LORA, changed, dense, inputs, layer, plain, plain_output

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
# an output is a sum of at most 12·3·3 + 2 products and passes a few roundings more; each costs at most one EPS of the sum's size
ROUNDINGS = 16


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert (found.double() - expected.double()).norm() <= ROUNDINGS * EPS[dtype] * expected.double().norm()


@pytest.mark.parametrize(("method", "name"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_before_training_the_output_is_the_bases(method: str, name: str, dtype: torch.dtype, device: str) -> None:
    base, x = plain(name, device, dtype), inputs(name, device, dtype)
    before = base(x)
    close(layer(method, name, base=base)(x), before, dtype)


@pytest.mark.parametrize(("method", "name"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_float64_algebra(method: str, name: str, dtype: torch.dtype, device: str) -> None:
    made, x = changed(layer(method, name, device, dtype)), inputs(name, device, dtype)
    close(made(x), plain_output(made, name, dense(made), x), dtype)


@pytest.mark.parametrize(("method", "name"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_rounds_once_and_unmerge_gives_the_same_bits(method: str, name: str, dtype: torch.dtype, device: str) -> None:
    made, x = changed(layer(method, name, device, dtype)), inputs(name, device, dtype)
    before, weight, state = made(x), raw(made.weight.cpu()), {key: raw(value.cpu()) for key, value in made.state_dict().items()}
    parameter = made.weight
    made.merge()
    assert made.merged and made.weight is parameter
    # float64 sums differ in their last place by the order of the terms, so a tie may round to its other side, no more
    expected = dense_of_original(made).to(dtype)
    assert (made.weight == expected).double().mean() > 0.99
    close(made.weight.detach(), expected, dtype)
    close(made(x).detach(), before.detach(), dtype)
    assert {key: raw(value.cpu()) for key, value in made.state_dict().items()} == state, "a state dict holds the original"
    made.merge()
    made.unmerge()
    made.unmerge()
    assert raw(made.weight.cpu()) == weight and not made.merged
    assert raw(made(x).cpu()) == raw(before.cpu())


def dense_of_original(made: nn.Module) -> torch.Tensor:
    twin = copy.deepcopy(made)
    twin.unmerge()
    return dense(twin)


@pytest.mark.parametrize(("method", "name"), KINDS)
def test_train_and_eval_merge_where_asked_for(method: str, name: str, device: str) -> None:
    made = changed(layer(method, name, device, merge_on_eval=True))
    weight = raw(made.weight.cpu())
    assert made.eval().merged and raw(made.weight.cpu()) != weight
    assert not made.train().merged and raw(made.weight.cpu()) == weight
    other = changed(layer(method, name, device))
    assert not other.eval().merged
    other.merge()
    assert not other.train().merged, "a merged layer's factors would get no gradient"


@pytest.mark.parametrize(("method", "name"), KINDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_equal_and_apart(method: str, name: str, copied: Callable[[nn.Module], nn.Module], merged: bool) -> None:
    torch.manual_seed(0)
    made, x = changed(layer(method, name)), inputs(name)
    if merged:
        made.merge()
    twin, before = copied(made), made(x)
    assert raw(twin(x)) == raw(before)
    with torch.no_grad():
        twin.unmerge()
        twin.lora_B.zero_()
    assert raw(made(x)) == raw(before)


@pytest.mark.parametrize(("method", "name"), KINDS)
@pytest.mark.parametrize("merged", [False, True])
def test_state_dicts_load_back(method: str, name: str, merged: bool, device: str) -> None:
    made, other, x = changed(layer(method, name, device)), changed(layer(method, name, device)), inputs(name, device)
    expected = made(x)
    if merged:
        made.merge()
        other.merge()
    other.load_state_dict(made.state_dict())
    assert other.merged == merged
    other.unmerge()
    assert raw(other(x).cpu()) == raw(expected.cpu())


@pytest.mark.parametrize(("method", "name"), KINDS)
def test_only_the_change_gets_a_gradient(method: str, name: str, device: str) -> None:
    made = changed(layer(method, name, device))
    made(inputs(name, device)).square().sum().backward()
    for leaf, parameter in made.named_parameters():
        assert (parameter.grad is None) == (leaf in ("weight", "bias")), leaf
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, leaf


@pytest.mark.parametrize(("method", "name"), KINDS)
def test_compiles_in_one_graph(method: str, name: str, device: str) -> None:
    torch._dynamo.reset()
    made, x = changed(layer(method, name, device)), inputs(name, device)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x), made(x)
    close(found.detach(), expected.detach(), torch.float32)
    made.zero_grad()
    found.square().sum().backward()
    gradient = made.lora_A.grad.clone()
    made.zero_grad()
    expected.square().sum().backward()
    close(gradient, made.lora_A.grad, torch.float32)


@pytest.mark.parametrize(("method", "name"), KINDS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(method: str, name: str, low: torch.dtype, device: str) -> None:
    made, x = changed(layer(method, name, device)), inputs(name, device)
    with torch.autocast(device, dtype=low):
        found = made(x)
        assert found.dtype == plain(name, device)(x).dtype, "autocast decides the dtype as it does for the plain module"
    # float32 kept for embeddings: their factors are still multiplied in the low dtype
    expected = plain_output(made, name, dense(made), x)
    assert (found.double() - expected).norm() <= ROUNDINGS * EPS[low] * expected.norm()
    found.float().square().sum().backward()
    assert made.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize(("method", "name"), KINDS)
def test_wide_factors_beside_a_narrow_base(method: str, name: str, device: str) -> None:
    """Factors in float32 on a bfloat16 base: the change keeps float32's digits, the sum is rounded once."""
    made, x = changed(layer(method, name, device, torch.bfloat16, factors=torch.float32)), inputs(name, device, torch.bfloat16)
    assert made.lora_A.dtype == torch.float32
    close(made(x), plain_output(made, name, dense(made), x), torch.bfloat16)


@pytest.mark.parametrize(("method", "name"), KINDS)
def test_moves_between_dtypes(method: str, name: str, device: str) -> None:
    made, x = changed(layer(method, name, device)), inputs(name, device)
    before = made(x).detach()
    made.merge()
    made.double()
    made.unmerge()
    assert {value.dtype for value in made.state_dict().values()} == {torch.float64}
    found = made(x.double() if x.is_floating_point() else x)
    assert found.dtype == torch.float64
    assert (found - before).norm() <= ROUNDINGS * EPS[torch.float32] * before.norm()


@pytest.mark.parametrize("name", ["linear", "conv2d", "merged"])
def test_dropout_acts_on_the_branch_alone_and_in_training_alone(name: str) -> None:
    torch.manual_seed(0)
    made, x = changed(layer("lora", name, dropout=0.5)), inputs(name)
    made.eval()
    still = made(x)
    assert raw(made(x)) == raw(still)
    made.train()
    draws = torch.stack([made(x) for _ in range(4000)]).double()
    assert not torch.equal(draws[0], draws[1])
    # the mean of 4000 draws is within 6 standard errors of the output without dropout
    assert ((draws.mean(0) - still).abs() <= 6 * draws.std(0) / 4000**0.5 + 1e-6).all()
    with torch.no_grad():
        made.lora_B.zero_()
    base = plain(name)
    base.load_state_dict({"weight": made.weight, "bias": made.bias})
    torch.testing.assert_close(made(x), base(x))  # float32 rounding


@pytest.mark.parametrize("name", LORA)
def test_gradients(name: str) -> None:
    """gradcheck in float64; DoRA's, whose norm is a constant to the gradient, are held in test_dora.py."""
    torch.manual_seed(0)
    made, x = changed(layer("lora", name, dtype=torch.float64)), inputs(name, dtype=torch.float64)
    if not x.is_floating_point():
        x[x == made.padding_idx] = 0  # whose row of A gets no gradient on purpose
    variables = [made.lora_A, made.lora_B] + ([x.requires_grad_()] if x.is_floating_point() else [])

    def output(A: torch.Tensor, B: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
        return torch.func.functional_call(made, {"lora_A": A, "lora_B": B}, (x,))

    assert torch.autograd.gradcheck(output, variables)
    assert torch.autograd.gradgradcheck(output, variables)


@pytest.mark.parametrize(("method", "name"), [kind for kind in KINDS if kind[1] in ("conv1d", "conv2d", "conv3d", "grouped")])
def test_convolutions_of_one_example_and_in_any_memory_format(method: str, name: str, device: str) -> None:
    made, x = changed(layer(method, name, device)), inputs(name, device)
    expected = made(x)
    close(torch.stack([made(one) for one in x]).detach(), expected.detach(), torch.float32)
    formats = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
    close(made(x.to(memory_format=formats[x.dim()])).detach(), expected.detach(), torch.float32)
    made.to(memory_format=formats[x.dim()])
    close(made(x).detach(), expected.detach(), torch.float32)
    made.merge()
    close(made(x).detach(), expected.detach(), torch.float32)


def test_scaling() -> None:
    assert Settings(rank=16, alpha=8).scaling == 0.5
    assert Settings(rank=16, alpha=8, rslora=True).scaling == 2
    base = nn.Linear(4, 4)
    made = changed(LoRALinear(base, rank=4, alpha=2, rslora=True))
    torch.testing.assert_close(made(torch.eye(4)) - base(torch.eye(4)), (made.lora_B @ made.lora_A).T)


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"rank": 1.5}, {"rank": True}, {"alpha": float("nan")}, {"dropout": 1.0}, {"dropout": -0.1}, {"dtype": torch.int8}],
)
def test_settings_that_are_none(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        LoRALinear(nn.Linear(2, 2), **({"rank": 1, "alpha": 1} | wrong))


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_layer_that_a_replacement_would_not_equal_is_refused() -> None:
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    for base in (Scaled(2, 2), hooked, patched, parametrized, nn.Linear(2, 2).to(torch.float8_e4m3fn), nn.Conv2d(1, 1, 1)):
        with pytest.raises(UnsupportedError):
            LoRALinear(base, rank=1, alpha=1)
    with pytest.raises(UnsupportedError, match="ConvTranspose2d"):
        LoRAConv2d(nn.ConvTranspose2d(1, 1, 1), rank=1, alpha=1)
    with pytest.raises(UnsupportedError, match="max_norm"):
        LoRAEmbedding(nn.Embedding(3, 3, max_norm=1.0), rank=1, alpha=1)


def test_the_parameters_are_the_bases_own() -> None:
    base = nn.Linear(3, 2)
    made = LoRALinear(base, rank=1, alpha=1)
    assert made.weight is base.weight and made.bias is base.bias
    assert not made.weight.requires_grad and not made.bias.requires_grad
