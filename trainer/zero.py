"""ZeRO 1, 2 and 3 through DeepSpeed, whose only door this is.

DeepSpeed owns the partitions, the reduction of gradients and the gathering of weights. The update is ours: DeepSpeed
hands its optimizer flat slices without names, so the engine works out once which part of which parameter each slice
holds (`Fragment`) and DeepSpeed's call of `step()` lands in trainer/optimizer.py. Clipping, the gradient norm and the
decision to skip are made there too, alike for every stage, so DeepSpeed's own are off where it allows that.
"""

import io
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

# DeepSpeed greets the screen when imported and keeps the stream it found; a rank's screen is for people.
with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.utils import groups as deepspeed_groups

from model.parallel import Topology
from trainer.checkpoint import Shard
from trainer.clock import Clock
from trainer.config import STAGE_3, OptimizerConfig, ParallelConfig, TrainConfig
from trainer.engine import Batch, count_targets, on_device, shards_of
from trainer.fragments import Fragment, fragment_of
from trainer.optimizer import Update, allocate, decay_momentum, row_mask, update


class _Handover(torch.optim.Optimizer):
    """The optimizer DeepSpeed believes in: its step is the engine's."""

    def __init__(self, parameters: list[nn.Parameter], engine: "Zero"):
        super().__init__(parameters, {"lr": 0.0})
        self.engine = engine

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.engine._step()


class _Mpu:
    """What DeepSpeed wants to know of tensor parallelism."""

    def __init__(self, topology: Topology, alone: Any):
        self.topology, self.alone = topology, alone

    def get_model_parallel_rank(self) -> int:
        return self.topology.tensor_parallel_rank

    def get_model_parallel_world_size(self) -> int:
        return self.topology.tensor_parallel_size

    def get_model_parallel_group(self) -> Any:
        return self.topology.tensor_group or self.alone

    def get_data_parallel_rank(self) -> int:
        return self.topology.data_parallel_rank

    def get_data_parallel_world_size(self) -> int:
        return self.topology.data_parallel_size

    def get_data_parallel_group(self) -> Any:
        return self.topology.data_group or self.alone

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


class Zero:
    """The engine over DeepSpeed.

    Args:
        model: the decoder, initialised, on its device; its parameters carry `logical`.
        micro_batches: micro-batches an update on this rank.
        rms_floor: least RMS that scales Tiger's rate of a parameter, by its name.

    Raises:
        ValueError: a ZeRO stage other than 1, 2, 3.
    """

    def __init__(
        self, model: Any, parallel: ParallelConfig, optimizer: OptimizerConfig, train: TrainConfig,
        topology: Topology, micro_batches: int, rms_floor: Mapping[str, float],
    ):  # fmt: skip
        if parallel.zero_stage not in (1, 2, 3):
            raise ValueError(f"parallel.zero_stage = {parallel.zero_stage}; legal: 1, 2, 3")
        self.model, self.topology, self.settings = model, topology, optimizer
        self.clock = Clock(topology.device)
        self.stage, self.rms_floor, self.steps_done = parallel.zero_stage, rms_floor, 0
        self.hpz = parallel.zero_hpz_partition_size or 1
        """Data-parallel ranks that hold one more copy of the weights together."""
        self.lazy = optimizer.embedding == "lazy" and optimizer.name != "adamw"
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.leave: Callable[[], bool] = lambda: False
        """Asked between micro-batches, on all ranks alike, whether to drop the rest of the step."""
        self._learning_rate, self._skip, self._seen_V = 0.0, False, None
        self._result: Update | None = None
        self.engine, self.zero = self._initialize(parallel, train, micro_batches)
        self._parts = self._find_parts()
        self._fragments = [part.fragment(self.names, topology) for part in self._parts]
        allocate(self._fragments, optimizer)

    def _initialize(self, parallel: ParallelConfig, train: TrainConfig, micro_batches: int) -> tuple[Any, Any]:
        if self.topology.device.type == "cpu":
            set_accelerator(CPU_Accelerator())
            # What it may compile: nothing, for it would compile shared memory where plain gloo does. It asks on CPUs alone; its
            # own answer would be a probe of everything it could compile.
            deepspeed.ops.__dict__["__compatible_ops__"] = {}
        for handler in list((chatter := logging.getLogger("DeepSpeed")).handlers):
            chatter.removeHandler(handler)  # its own goes to the screen; the root's goes to the rank log
        deepspeed.init_distributed(dist_backend=None, verbose=False)
        patience = timedelta(seconds=parallel.timeout_seconds)  # torch would give new groups its own, whatever the world's is
        alone = torch.distributed.new_group([self.topology.rank], patience, use_local_synchronization=True)
        deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = _neighbours(self.hpz, self.topology, patience)
        parameters = list(self.model.parameters())
        config = _settings(parallel, train, micro_batches, self.topology)
        engine, zero, _, _ = deepspeed.initialize(
            model=self.model, optimizer=_Handover(parameters, self), config=config, mpu=_Mpu(self.topology, alone)
        )
        return engine, zero

    def accumulate(self, batches: Sequence[Batch]) -> Tensor | None:
        """Forward and backward of every micro-batch of one update; see Engine."""
        topology = self.topology
        count = count_targets(batches, topology)
        total = torch.zeros((), device=topology.device)
        for index, batch in enumerate(batches):
            if index and self.leave():
                return None
            inputs, targets, boundaries = on_device(batch, topology.device)
            loss_sum, _ = self.engine(inputs, targets, cu_seqlens=boundaries)
            self.clock.mark("forward")
            # DeepSpeed averages gradients over data ranks; the loss is summed and divided once by the global count.
            self.engine.backward(loss_sum * (topology.data_parallel_size / count), scale_wrt_gas=False)
            self.clock.mark("backward")
            total += loss_sum.detach()
            if index + 1 < len(batches):
                self.engine.step()  # only counts the micro-batch
        if self.lazy:
            self._seen_V = row_mask([batch.inputs_BS for batch in batches], self.model.config.vocab_size, topology)
        return topology.sum(total, topology.data_group) / count

    def update(self, learning_rate: float, skip: bool = False) -> Update:
        """One optimizer step on the accumulated gradients; see Engine."""
        self._learning_rate, self._skip, self._result = learning_rate, skip, None
        self.steps_done += 1
        self.engine.step()
        if self._result is None:  # asked to skip, or dropped by DeepSpeed itself over a norm that is not finite
            decay_momentum(self._fragments, self.settings)
            nothing = torch.full((), torch.nan, device=self.topology.device)
            self._result = Update(grad_norm=nothing, skipped=torch.ones_like(nothing, dtype=torch.bool))
        return self._result

    def fragments(self) -> list[Fragment]:
        """What this data-parallel rank owns of every parameter, as float32 masters."""
        return self._fragments

    def shards(self) -> list[Shard]:
        """Masters and optimizer state by name."""
        replicated = (self.topology.tensor_parallel_rank, self.topology.tensor_parallel_size)
        return shards_of(self._fragments, split=(0, 1), replicated=replicated, steady_state=True)

    @torch.no_grad()
    def loaded(self, step: int) -> None:
        """Round the masters into the network's weights and gather them."""
        self.steps_done = step
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero.invalidate_secondary_tensor()  # hpZ: the copies inside nodes are of the old weights
        persistent = self.zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self.engine.destroy()

    def _step(self) -> None:
        """DeepSpeed's call of its optimizer: the gradients of this rank's slices are in place."""
        if self.steps_done == 0:
            return  # a rehearsal of DeepSpeed's while it sets itself up
        for fragment, part in zip(self._fragments, self._parts, strict=True):
            assert part.flat.grad is not None
            fragment.gradient = part.of(part.flat.grad)
        if self._skip:
            return
        self._result = update(
            self._fragments, self.settings, self._learning_rate, self.topology,
            step=self.steps_done, rms_floor=self.rms_floor, seen_V=self._seen_V, partitioned=True,
        )  # fmt: skip
        for fragment in self._fragments:
            fragment.gradient = None

    def _find_parts(self) -> list["_Part"]:
        """Where DeepSpeed put each parameter in this data-parallel rank's flat masters, in all of its three forms."""
        rank, zero = self.topology.data_parallel_rank, self.zero
        if self.stage == 3:
            groups = zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
            return [part for group, flat in groups for part in _stage3_parts(group, flat, rank)]
        if hasattr(zero, "fp32_groups_flat_partition"):  # BF16_Optimizer: stage 1, bf16, float32 accumulation
            groups = zip(zero.bf16_groups, zero.fp32_groups_flat_partition, strict=True)
            return [part for group, flat in groups for part in _flat_parts(group, _running(group), flat, rank)]
        groups = zip(
            zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, zero.single_partition_of_fp32_groups, strict=True
        )
        return [part for group, offsets, flat in groups for part in _flat_parts(group, offsets, flat, rank)]


@dataclass(frozen=True)
class _Part:
    """A run of numbers of one parameter in a flat master tensor."""

    parameter: nn.Parameter
    offset: int
    """In the flattened tensor-parallel slice."""
    flat: Tensor
    position: int
    """In the flat tensor."""
    length: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.detach().narrow(0, self.position, self.length)

    def fragment(self, names: dict[int, str], topology: Topology) -> Fragment:
        logical = self.parameter.logical  # type: ignore[attr-defined]
        return fragment_of(names[id(self.parameter)], logical, topology, self.offset, self.of(self.flat))


def _running(group: list[nn.Parameter]) -> list[int]:
    lengths = [parameter.numel() for parameter in group]
    return [sum(lengths[:index]) for index in range(len(lengths))]


def _flat_parts(group: list[nn.Parameter], offsets: list[int], flat: Tensor, rank: int) -> list[_Part]:
    """Stages 1 and 2: the parameters one behind another, cut into equal parts for the ranks."""
    begin, parts = rank * flat.numel(), []
    for parameter, offset in zip(group, offsets, strict=True):
        start = min(max(offset, begin), begin + flat.numel())
        stop = max(start, min(offset + parameter.numel(), begin + flat.numel()))
        position = start - begin if stop > start else 0
        parts.append(_Part(parameter, start - offset if stop > start else 0, flat, position, stop - start))
    return parts


def _stage3_parts(group: list[Any], flat: Tensor, rank: int) -> list[_Part]:
    """Stage 3: every parameter cut into equal parts by itself, a rank's parts one behind another."""
    position, parts = 0, []
    for parameter in group:
        share = parameter.ds_tensor.ds_numel
        length = max(0, min(share, parameter.ds_numel - rank * share))
        parts.append(_Part(parameter, rank * share if length else 0, flat, position if length else 0, length))
        position += share
    return parts


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the network's weights on this rank.

    Under ZeRO 3 these are its partitions, with hpZ those of the node's copy too, and whole parameters that are gathered now.
    """
    held = 0
    for parameter in model.parameters():
        parts = (getattr(parameter, name, None) for name in ("ds_tensor", "ds_secondary_tensor"))
        held += sum(tensor.numel() * tensor.element_size() for tensor in (parameter, *parts) if tensor is not None)
    return held


def _neighbours(size: int, topology: Topology, timeout: timedelta) -> Any:
    """hpZ: the data-parallel ranks that hold a second copy of the weights together; None without hpZ.

    DeepSpeed would make these groups itself, but out of neighbours in the world, which tensor parallelism makes wrong.
    """
    if size == 1:
        return None
    assert topology.data_parallel_size % size == 0, "launch/plan.py refuses this"
    first = topology.data_parallel_rank // size * size
    ranks = torch.distributed.get_process_group_ranks(topology.data_group)[first : first + size]
    return torch.distributed.new_group(ranks, timeout, use_local_synchronization=True)


def _settings(parallel: ParallelConfig, train: TrainConfig, micro_batches: int, topology: Topology) -> dict[str, Any]:
    """DeepSpeed's configuration. Micro-batches are summed in float32, whatever the network computes in."""
    bf16, cuda = train.precision == "bf16", topology.device.type == "cuda"
    wide_sum = bf16 and micro_batches > 1
    # With nobody to talk to, overlapping adds but a wait for the device to each backward, and contiguous gradients a copy.
    talks = cuda and topology.data_parallel_size > 1
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "reduce_bucket_size": parallel.reduce_bucket_numbers,
        "allgather_bucket_size": parallel.reduce_bucket_numbers + parallel.reduce_bucket_numbers % 2,  # it asks for an even one
        "overlap_comm": talks,
        "contiguous_gradients": talks,
    }
    if parallel.zero_stage == 3:
        zero["sub_group_size"] = 1 << 50  # one call of step() an update, as in the other stages
        zero |= STAGE_3
        zero["zero_hpz_partition_size"] = parallel.zero_hpz_partition_size or 1
    elif parallel.offload == "none" and not (wide_sum and parallel.zero_stage == 1):
        zero["compute_grad_norm"] = False
    if parallel.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {
            "enabled": bf16,
            "check_grad_overflow": False,  # it would wait for the device; update() looks itself
            # where stage 1 sums in float32, .grad is else kept and zeroed; in a CUDA graph's memory it would be overwritten
            "immediate_grad_update": train.cuda_graphs and wide_sum and parallel.zero_stage == 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"} if wide_sum else {},
        "gradient_clipping": 0.0,
        "steps_per_print": 1 << 40,
        "timers": {"throughput": {"enabled": False}},  # on by default; it waits for the device twice a micro-batch
    }
