"""What tiglon uses of DeepSpeed beyond its documented interface, each use behind a function of its own.

DeepSpeed's optimizers hold flat float32 masters without names; where each parameter lies in them, and how masters are copied
into the network's weights, has to be read from private attributes. `PRIVATE_ATTRIBUTES` lists these with what relies on them;
tests/trainer/engines/test_deepspeed_internals.py checks all of them on the installed DeepSpeed (written against 0.19.8).
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# DeepSpeed prints when imported, and keeps the stream it found for later; the screen is for the run's own messages.
with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.utils import groups as deepspeed_groups

from model.parameters import NamedTensor, tensors_of
from trainer.private_api import private_api_changed, private_attribute

_LOCATE_1 = "locating each parameter in the float32 masters of ZeRO 1 and 2"
_LOCATE_BF16 = "locating each parameter in the float32 masters of ZeRO 1 in bf16 with float32 accumulation"
_LOCATE_3 = "locating each parameter in the float32 masters of ZeRO 3"
_REFRESH = "copying the masters into the weights after a checkpoint was loaded"
PRIVATE_ATTRIBUTES = {
    "round_robin_bit16_groups": _LOCATE_1,
    "round_robin_bit16_offsets": _LOCATE_1,
    "single_partition_of_fp32_groups": _LOCATE_1,
    "bf16_groups": _LOCATE_BF16,
    "fp32_groups_flat_partition": _LOCATE_BF16,
    "fp16_groups": _LOCATE_3,
    "fp32_partitioned_groups_flat": _LOCATE_3,
    "ds_tensor": _LOCATE_3,
    "ds_numel": _LOCATE_3,
    "_grad_acc_hooks": "summing gradients in float32 under a pipeline",
    "grad": "reading the gradient of a flat master in the optimizer's step",
    "update_lp_params": f"{_REFRESH} under ZeRO 1 and 2",
    "_partition_all_parameters": f"{_REFRESH} under ZeRO 3",
    "_reassign_or_swap_out_partitioned_parameters": f"{_REFRESH} under ZeRO 3",
    "invalidate_secondary_tensor": f"{_REFRESH} under ZeRO 3 with hpZ",
    "persistent_parameters": f"{_REFRESH} under ZeRO 3",
    "all_gather": f"{_REFRESH} under ZeRO 3",
    "_ZERO_PARAM_INTRA_PARALLEL_GROUP": "the ranks of ZeRO 3 that share a second copy of the weights (hpZ)",
}
"""Private attribute -> what relies on it."""


def private(owner: Any, name: str) -> Any:
    """An attribute of `PRIVATE_ATTRIBUTES`; RuntimeError in one sentence where DeepSpeed has it no longer."""
    return private_attribute("deepspeed", owner, name, PRIVATE_ATTRIBUTES[name])


@dataclass(frozen=True)
class MasterSlice:
    """A contiguous part of one parameter in a flat master tensor; a rank may hold nothing of a parameter."""

    parameter: nn.Parameter
    offset: int
    """In the flattened tensor-parallel slice, elements."""
    flat: Tensor
    position: int
    """In the flat tensor, elements."""
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """This part of a tensor that is laid out as the master."""
        return flat.detach().narrow(0, self.position, self.length)

    def by_tensor(self, name: str) -> "list[tuple[NamedTensor, MasterSlice]]":
        """The same by what the parameter of this name holds: offsets are in these tensors."""
        tensors, parts = tensors_of(name, self.parameter), list[tuple[NamedTensor, MasterSlice]]()
        if len(tensors) == 1:
            return [(tensors[0], self)]
        ends = [*(tensor.start for tensor in tensors[1:]), None]
        for tensor, end in zip(tensors, ends, strict=True):
            first = max(self.offset, tensor.start)
            last = self.offset + self.length if end is None else min(self.offset + self.length, end)
            length = max(0, last - first)
            offset, position = (first - tensor.start, self.position + first - self.offset) if length else (0, 0)
            parts.append((tensor, MasterSlice(self.parameter, offset, self.flat, position, length)))
        return parts

    def gradient(self) -> Tensor:
        """Of the master, inside the optimizer's step.

        Raises:
            RuntimeError: DeepSpeed has put none there.
        """
        gradient = private(self.flat, "grad")
        if gradient is None:
            raise RuntimeError(private_api_changed("deepspeed", "master.grad", PRIVATE_ATTRIBUTES["grad"]))
        return self.of(gradient)


def master_slices(optimizer: Any, stage: int, rank: int) -> list[MasterSlice]:
    """What data-parallel rank `rank` holds of every parameter, in the order of the optimizer's groups.

    Args:
        optimizer: the second value of deepspeed.initialize, of one of three classes.
    """
    if stage == 3:
        groups = zip(private(optimizer, "fp16_groups"), private(optimizer, "fp32_partitioned_groups_flat"), strict=True)
        return [part for group, flat in groups for part in _stage3_slices(group, flat, rank)]
    if type(optimizer).__name__ == "BF16_Optimizer":  # stage 1, bf16, float32 accumulation
        groups = zip(private(optimizer, "bf16_groups"), private(optimizer, "fp32_groups_flat_partition"), strict=True)
        return [part for group, flat in groups for part in flat_slices(group, _offsets(group), flat, rank)]
    names = ("round_robin_bit16_groups", "round_robin_bit16_offsets", "single_partition_of_fp32_groups")
    groups = zip(*(private(optimizer, name) for name in names), strict=True)
    return [part for group, offsets, flat in groups for part in flat_slices(group, offsets, flat, rank)]


def flat_positions(optimizer: Any) -> tuple[dict[nn.Parameter, int], int]:
    """First element of every parameter in the flat weights of ZeRO 1 and 2, and the elements of a rank's part of these."""
    names = ("round_robin_bit16_groups", "round_robin_bit16_offsets", "single_partition_of_fp32_groups")
    ((group,), (offsets,), (flat,)) = (private(optimizer, name) for name in names)
    return dict(zip(group, offsets, strict=True)), flat.numel()


def leave_gradients_alone(optimizer: Any) -> None:
    """Remove the hooks by which ZeRO 1 and 2 take the gradients of each backward."""
    for hook in private(optimizer, "_grad_acc_hooks"):
        hook.remove()


def _offsets(group: list[nn.Parameter]) -> list[int]:
    lengths = [parameter.numel() for parameter in group]
    return [sum(lengths[:index]) for index in range(len(lengths))]


def flat_slices(group: list[nn.Parameter], offsets: list[int], flat: Tensor, rank: int) -> list[MasterSlice]:
    """Stages 1 and 2: the parameters are concatenated, then cut into equal parts for the ranks."""
    begin, parts = rank * flat.numel(), []
    for parameter, offset in zip(group, offsets, strict=True):
        start = min(max(offset, begin), begin + flat.numel())
        stop = max(start, min(offset + parameter.numel(), begin + flat.numel()))
        position = start - begin if stop > start else 0
        parts.append(MasterSlice(parameter, start - offset if stop > start else 0, flat, position, stop - start))
    return parts


def _stage3_slices(group: list[Any], flat: Tensor, rank: int) -> list[MasterSlice]:
    """Stage 3: every parameter is cut into equal parts by itself; a rank's parts are concatenated."""
    position, parts = 0, []
    for parameter in group:
        share, size = private(private(parameter, "ds_tensor"), "ds_numel"), private(parameter, "ds_numel")
        length = max(0, min(share, size - rank * share))
        parts.append(MasterSlice(parameter, rank * share if length else 0, flat, position if length else 0, length))
        position += share
    return parts


def copy_masters_to_weights(optimizer: Any, stage: int) -> None:
    """Round the masters into the network's weights and gather these where DeepSpeed keeps them whole. All ranks call it."""
    if stage < 3:
        private(optimizer, "update_lp_params")()
        return
    private(optimizer, "_partition_all_parameters")()
    for group in range(len(private(optimizer, "fp16_groups"))):
        private(optimizer, "_reassign_or_swap_out_partitioned_parameters")(group)
    private(optimizer, "invalidate_secondary_tensor")()  # hpZ: the copies inside nodes are of the old weights
    persistent = private(optimizer, "persistent_parameters")
    if persistent:
        private(persistent[0], "all_gather")(persistent)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the network's weights on this rank.

    Under ZeRO 3 these are its partitions (ds_tensor), with hpZ those of the node's copy too (ds_secondary_tensor), and whole
    parameters that are gathered now.
    """
    held = 0
    for parameter in model.parameters():
        parts = (getattr(parameter, name, None) for name in ("ds_tensor", "ds_secondary_tensor"))
        held += sum(tensor.numel() * tensor.element_size() for tensor in (parameter, *parts) if tensor is not None)
    return held


def start_deepspeed(device: torch.device) -> None:
    """Join the process group that torch has, without DeepSpeed's own logging and without compiling anything."""
    if device.type == "cpu":
        set_accelerator(CPU_Accelerator())
    for handler in list((log := logging.getLogger("DeepSpeed")).handlers):
        log.removeHandler(handler)  # it writes to the screen; the root's handler writes to the rank log
    # DeepSpeed compiles its shared-memory collectives if this says it can; gloo does here, and finding out runs compilers.
    with _replaced(deepspeed.ops, "__compatible_ops__", {}):
        deepspeed.init_distributed(dist_backend=None, verbose=False)


@contextmanager
def intra_node_group(group: Any) -> Iterator[None]:
    """Engines made inside keep the second copy of their weights (hpZ) over `group`; None: without hpZ.

    DeepSpeed would make these groups itself, of neighbours in the world, which is wrong with tensor parallelism.
    """
    private(deepspeed_groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP")
    with _replaced(deepspeed_groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", group):
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """A global of a module, replaced inside the block and put back after it."""
    attributes = vars(module)  # not getattr: DeepSpeed makes some of them when they are read
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(before)
