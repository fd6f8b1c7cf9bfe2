"""Private functions of torch do, on the installed torch, what their wrappers say; one that is gone is one sentence."""

import inspect
import re

import pytest
import torch

from trainer.optimizers import torch_internals
from trainer.optimizers.torch_internals import PRIVATE_FUNCTIONS, decay_unless, fused_adamw, l2_norms, scaled
from trainer.private_api import private_api_changed


def changed(name: str) -> str:
    return private_api_changed("torch", f"{PRIVATE_FUNCTIONS[name][0].__name__}.{name}", PRIVATE_FUNCTIONS[name][1])


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_norms_and_products_of_a_list_are_those_of_each() -> None:
    tensors = [draw(7), draw(0), draw(300).bfloat16()]
    for norm, tensor in zip(l2_norms(tensors), tensors, strict=True):
        assert norm.dtype == torch.float32, changed("_foreach_norm")
        torch.testing.assert_close(norm, tensor.float().square().sum().sqrt(), rtol=1e-5, atol=0, msg=changed("_foreach_norm"))
    for product, factor in zip(scaled(list(draw(3)), [1.0, 0.5, 3.0]), [1.0, 0.5, 3.0], strict=True):
        assert product in draw(3) * factor, changed("_foreach_mul")


def test_fused_adamw_takes_count_divisor_and_verdict() -> None:
    options = {"beta1": 0.9, "beta2": 0.95, "lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8}
    needed = {*options, "grad_scale", "found_inf", "fused", "amsgrad", "maximize"}
    assert needed <= set(inspect.signature(PRIVATE_FUNCTIONS["adamw"][0].adamw).parameters), changed("adamw")
    values, gradient, count = draw(9), draw(9) + 1, torch.tensor(0.0)
    state, first = (torch.zeros(9), torch.zeros(9)), values.clone()
    fused_adamw([values], [gradient], [state[0]], [state[1]], [count], grad_scale=None, found_inf=torch.tensor(1.0), **options)
    assert torch.equal(values, first) and not state[0].any() and count == 0, changed("adamw")
    fused_adamw(
        [values], [gradient * 4], [state[0]], [state[1]], [count], grad_scale=torch.tensor(4.0), found_inf=None, **options
    )
    wanted = first - 1e-2 * (gradient / (gradient.abs() + 1e-8) + 0.1 * first)  # the first step is the sign of the gradient
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-7, msg=changed("adamw"))
    torch.testing.assert_close(state, (0.1 * gradient, 0.05 * gradient**2), rtol=1e-5, atol=1e-8, msg=changed("adamw"))


@pytest.mark.parametrize("keep", [True, False])
def test_tensors_decay_unless_the_device_says_keep(keep: bool) -> None:
    tensors, before = list(draw(2, 1000)), draw(2, 1000)
    decay_unless(torch.tensor(keep), tensors, 0.9)
    if keep:
        assert torch.equal(torch.stack(tensors), before), changed("sgd")
    else:
        torch.testing.assert_close(torch.stack(tensors), 0.9 * before, rtol=3e-7, atol=0, msg=changed("sgd"))


@pytest.mark.parametrize("name", PRIVATE_FUNCTIONS)
def test_a_function_that_is_gone_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: torch without it."""
    monkeypatch.delattr(*PRIVATE_FUNCTIONS[name][:1], name)
    with pytest.raises(RuntimeError) as caught:
        torch_internals._private(name)
    text = str(caught.value)
    assert re.match(rf"torch {re.escape(torch.__version__)}: \S+\.{name}, which .+ relies on, is missing", text), text
    assert "\n" not in text and PRIVATE_FUNCTIONS[name][1] in text
