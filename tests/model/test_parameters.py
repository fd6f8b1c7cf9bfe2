"""What parameters say of themselves: slices, initial distributions, and Megatron's flag of a split one."""

from importlib import import_module

import pytest
import torch

from model.parallel.layers import serial_kit
from model.parameters import Constant, Normal, Orthogonal, ParameterSpec, local_slice, set_spec
from tests.model.libraries import relied_on


@pytest.mark.parametrize("initial", [Normal(0.3), Orthogonal(64), Constant(1.0, 1.0)])
def test_the_reference_rms_is_that_of_what_is_drawn(initial):
    drawn = initial.draw((64, 64), torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32 and drawn.square().mean().sqrt().item() == pytest.approx(
        initial.reference_rms, rel=0.03
    )


def test_zeros_are_expected_to_reach_what_is_said():
    zeros = Constant(0.0, 0.1)
    assert zeros.reference_rms == 0.1 and not zeros.draw((3, 2), torch.Generator()).any()


def test_local_slices_tile_the_tensor():
    assert local_slice(serial_kit().column(6, 8, Normal(1.0), "mlp").weight.spec, 2, 1) == ((8, 6), (0, 0)), (
        "one device splits nothing"
    )
    rows, columns = ParameterSpec("matrix", (8, 6), 0), ParameterSpec("matrix", (8, 6), 1)
    assert [local_slice(rows, 4, rank) for rank in range(4)] == [((2, 6), (2 * rank, 0)) for rank in range(4)]
    assert local_slice(columns, 2, 1) == ((8, 3), (0, 3))


def megatron_flag_reaches_deepspeed() -> None:
    use = "model.parameters marks split parameters so that norms count them on every tensor-parallel rank"
    with relied_on("deepspeed", "the flag tensor_model_parallel of a parameter", use):
        utils = import_module("deepspeed.runtime.utils")
        whole, split = serial_kit().norm(4, 1e-5, False).weight, serial_kit().norm(4, 1e-5, False).weight
        set_spec(split, ParameterSpec("gain", (8,), 0))
        assert utils.is_model_parallel_parameter(split) and not utils.is_model_parallel_parameter(whole)


def test_megatrons_flag_reaches_deepspeed():
    megatron_flag_reaches_deepspeed()


def test_a_deepspeed_without_megatrons_flag_is_seen(monkeypatch: pytest.MonkeyPatch):
    utils = import_module("deepspeed.runtime.utils")
    monkeypatch.setattr(utils, "is_model_parallel_parameter", lambda parameter: getattr(parameter, "renamed", False))
    with pytest.raises(pytest.fail.Exception, match=r"^deepspeed [\w.+]+: the flag tensor_model_parallel .*every tensor.*$"):
        megatron_flag_reaches_deepspeed()
