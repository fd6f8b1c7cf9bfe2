"""ZeRO 1, 2 and 3 through DeepSpeed.

DeepSpeed owns the partitions, the reduction of gradients and the gathering of weights. The update is ours: DeepSpeed gives its
optimizer flat tensors without names, so the engine finds out once which part of which parameter each of them holds (`Fragment`,
trainer/engines/deepspeed_internals.py), and DeepSpeed's call of `step()` runs trainer/optimizers/step.py. Clipping, the
gradient norm and the decision to skip are made there too, alike for every stage, so DeepSpeed's own are off where it allows
that.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.parallel.mesh import Mesh
from trainer.checkpoint.rectangles import Shard
from trainer.config import STAGE_3, ParallelConfig, TrainConfig
from trainer.engines.base import (
    NO_HOOKS,
    MicroBatch,
    StepHooks,
    TrainingState,
    count_targets,
    held_bytes,
    make_shards,
    network_specs,
    on_device,
)
from trainer.engines.deepspeed_internals import (
    MasterSlice,
    copy_masters_to_weights,
    deepspeed,
    intra_node_group,
    master_slices,
    start_deepspeed,
    weight_bytes,
)
from trainer.engines.expert_masters import ExpertMasters, hidden_from, stacks_of
from trainer.optimizers.config import OptimizerConfig
from trainer.optimizers.expert_balance import ExpertBalance, StepLoads
from trainer.optimizers.fragments import Fragment, fragment_of
from trainer.optimizers.qk_clip import QKClip, StepLogits
from trainer.optimizers.rates import UpdateStep
from trainer.optimizers.step import Optimizer, UpdateResult, seen_rows


class _OptimizerShim(torch.optim.Optimizer):
    """The optimizer that DeepSpeed is given, the one detour of a step.

    The gradients of the masters are there only while DeepSpeed calls `step()`, which takes no argument: during `run` that makes
    the update, and otherwise nothing (DeepSpeed calls it once while it initialises its states).
    """

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__(parameters, {"lr": 0.0})
        self._update: Callable[[], UpdateResult] | None = None
        self._result: UpdateResult | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self._update is not None:
            self._result = self._update()

    def run(self, deepspeed_step: Callable[[], object], update: Callable[[], UpdateResult]) -> UpdateResult | None:
        """DeepSpeed's step with this update in it; None if DeepSpeed has left it out."""
        self._update, self._result = update, None
        try:
            deepspeed_step()
        finally:
            self._update = None
        return self._result


class _Mpu:
    """The ranks and groups that DeepSpeed asks for where tensor parallelism is not its own.

    It wants a group for one rank too, which torch's mesh has.
    """

    def __init__(self, mesh: Mesh):
        assert mesh.devices is not None, "without process groups there is no DeepSpeed"
        self.mesh, self.devices = mesh, mesh.devices

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tensor.size

    def get_model_parallel_group(self) -> Any:
        return self.devices.get_group("tensor")

    def get_data_parallel_rank(self) -> int:
        return self.mesh.partition.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.partition.size

    def get_data_parallel_group(self) -> Any:
        return self.mesh.partition.group or self.devices.get_group("data")

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


class Zero:
    """The engine over DeepSpeed.

    Args:
        model: the decoder, initialised, on its device; its parameters carry `spec`.
        rms_floor: least RMS that scales Tiger's rate of a parameter, by its name.
        hooks: `leave` is asked, since nothing but gradients has changed between micro-batches.

    Raises:
        ValueError: a ZeRO stage other than 1, 2, 3.
    """

    def __init__(
        self, model: Any, parallel: ParallelConfig, optimizer: OptimizerConfig, train: TrainConfig,
        mesh: Mesh, rms_floor: Mapping[str, float], hooks: StepHooks = NO_HOOKS,
    ):  # fmt: skip
        if parallel.zero_stage not in (1, 2, 3):
            raise ValueError(f"parallel.zero_stage = {parallel.zero_stage}; legal: 1, 2, 3")
        self.model, self.mesh, self.hooks = model, mesh, hooks
        self.stage, self.steps_done = parallel.zero_stage, 0
        hpz = parallel.zero_hpz_partition_size or 1
        copies = f", a copy of the weights on every {hpz} data ranks (hpZ)" if hpz > 1 else ""
        self.description = f"ZeRO {self.stage}{copies}"
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._seen_V: Tensor | None = None
        self._clip, self._logits = QKClip(model, optimizer.qk_clip, mesh), StepLogits()
        self._balance, self._loads = ExpertBalance(model, mesh), StepLoads()
        self._hidden = stacks_of(model) if mesh.experts.size > 1 else {}
        """What DeepSpeed is not shown: experts that other ranks do not have."""
        self._shim = _OptimizerShim([*self._by_deepspeed().values()])
        self.engine, self.zero = self._initialize(parallel, train, hpz)
        self._experts = self._make_expert_masters(parallel) if self._hidden else None
        slices = master_slices(self.zero, self.stage, mesh.partition.rank)
        named = [part for own in slices for part in own.by_tensor(self.names[id(own.parameter)])]
        self._slices = [part for _, part in named]
        self._dense = [fragment_of(tensor.name, tensor.spec, mesh, s.offset, s.of(s.flat)) for tensor, s in named]
        """Fragments of what DeepSpeed holds."""
        self._fragments = [*self._dense, *(self._experts.fragments if self._experts else [])]
        self.optimizer = Optimizer(
            optimizer, self._fragments, mesh, rms_floor, partitioned=True,
            bucket_elements=parallel.reduce_bucket_elements, network=network_specs(model, mesh),
        )  # fmt: skip

    def _by_deepspeed(self) -> dict[str, nn.Parameter]:
        """What this rank updates through DeepSpeed, by name."""
        return {name: parameter for name, parameter in self.model.owned_parameters().items() if name not in self._hidden}

    def _stages(self) -> Mapping[nn.Parameter, int]:
        """The stage of every parameter under a pipeline."""
        return {}

    def _make_expert_masters(self, parallel: ParallelConfig) -> ExpertMasters:
        stages = self._stages() if self.stage == 2 else None
        return ExpertMasters(self.model, self.mesh, stages, parallel.reduce_bucket_elements)

    def _initialize(self, parallel: ParallelConfig, train: TrainConfig, hpz: int) -> tuple[Any, Any]:
        start_deepspeed(self.mesh.device)
        timeout = timedelta(seconds=parallel.timeout_seconds)  # torch gives new groups its own default, whatever the world's is
        config = deepspeed_config(parallel, train, self.mesh)
        self.hpz_group = _hpz_group(hpz, self.mesh, timeout)
        with intra_node_group(self.hpz_group), hidden_from(self.model, self._hidden):
            engine, zero, _, _ = deepspeed.initialize(
                model=self.model, optimizer=self._shim, config=config, mpu=_Mpu(self.mesh)
            )
        return engine, zero

    def accumulate(self, batches: Sequence[MicroBatch]) -> Tensor | None:
        """Forward and backward of every micro-batch of one update; see Engine."""
        mesh = self.mesh
        count = count_targets(batches, mesh)
        total = torch.zeros((), device=mesh.device)
        self._clip.begin()
        self._balance.begin()
        self.model.set_loss_scale(mesh.replicas.size / count)
        if self._experts is not None:
            self._experts.sums.begin()
        for index, batch in enumerate(batches):
            if index and self.hooks.leave():
                return None
            inputs, targets, boundaries = on_device(batch, mesh.device)
            loss_sum, _ = self.engine(inputs, targets, cu_seqlens=boundaries)
            self.hooks.mark("forward")
            if self._experts is not None:
                self._experts.sums.begin_backward(0)
            self.engine.set_gradient_accumulation_boundary(index + 1 == len(batches))  # a ramp changes their number
            # DeepSpeed averages gradients over replicas; the loss is summed and divided once by the global count.
            self.engine.backward(loss_sum * (mesh.replicas.size / count), scale_wrt_gas=False)
            self.hooks.mark("backward")
            total += loss_sum.detach()
            if index + 1 < len(batches):
                self.engine.step()  # only counts the micro-batch
        self._see_rows(batches)
        self._logits, self._loads = self._clip.finish(), self._balance.finish()
        return mesh.replicas.sum(total) / count

    def _see_rows(self, batches: Sequence[MicroBatch]) -> None:
        if self.optimizer.needs_seen_rows:
            rows = self.model.config.vocab_size + self.model.config.vocabulary_padding
            self._seen_V = seen_rows([batch.inputs_BS for batch in batches], rows, self.mesh)

    def update(self, learning_rate: float, skip: bool = False) -> UpdateResult:
        """One optimizer step on the accumulated gradients; see Engine."""
        self.steps_done += 1
        result = self._shim.run(self.engine.step, self._leave_out if skip else partial(self._update, learning_rate))
        result = result or self._leave_out()  # DeepSpeed drops a step over a NaN or infinite norm (docs/optimizers.md)
        return self._updated(result)

    def _updated(self, result: UpdateResult) -> UpdateResult:
        """Move what is not DeepSpeed's or follows no gradient; the result with what the step has shown."""
        if self._experts is not None:
            self._experts.share()
        self._balance.update(self._loads, result.skipped)
        return result.with_logits(self._logits).with_loads(self._loads)

    def _leave_out(self) -> UpdateResult:
        """The states decay, the weights stay."""
        self.optimizer.leave_out(self.steps_done)
        nothing = torch.full((), torch.nan, device=self.mesh.device)
        return UpdateResult(grad_norm=nothing, skipped=torch.ones_like(nothing, dtype=torch.bool))

    def _update(self, learning_rate: float) -> UpdateResult:
        """Update this rank's fragments, whose gradients are complete and with DeepSpeed."""
        for fragment, part in zip(self._dense, self._slices, strict=True):
            fragment.gradient = self._gradient(part)
        if self._experts is not None:
            mean = self._experts.mean()
            for fragment, part in zip(self._experts.fragments, self._experts.slices, strict=True):
                fragment.gradient = part.of(mean)
        result = self.optimizer.update(UpdateStep(self.steps_done, learning_rate, self._seen_V, self._logits.row_factors))
        for fragment in self._fragments:
            fragment.gradient = None
        return result

    def _gradient(self, part: MasterSlice) -> Tensor:
        return part.gradient()

    def fragments(self) -> list[Fragment]:
        """What this rank of the partition owns of every parameter, as float32 masters."""
        return self._fragments

    def shards(self) -> list[Shard]:
        """Masters and optimizer state by name."""
        return make_shards(self._fragments, self.mesh, partitioned=True) + self._balance.shards()

    def training_state(self) -> TrainingState:
        """The network's weights, and the masters and states of this rank's part."""
        return TrainingState(weight_bytes(self.model), held_bytes(self.shards()), "masters and optimizer state")

    @torch.no_grad()
    def loaded(self, step: int) -> None:
        """Round the masters into the network's weights and gather them."""
        self.steps_done = step
        copy_masters_to_weights(self.zero, self.stage)
        if self._experts is not None:
            self._experts.share()

    def close(self) -> None:
        """Remove the hooks from the model."""
        self.engine.destroy()
        if self._experts is not None:
            self._experts.sums.close()


def _hpz_group(size: int, mesh: Mesh, timeout: timedelta) -> Any:
    """The ranks of the partition, `size` neighbours, that hold a second copy of the weights together; None without hpZ."""
    if size == 1:
        return None
    assert mesh.partition.size % size == 0, "launch/planner/layouts.py refuses this"
    first = mesh.partition.rank // size * size
    ranks = torch.distributed.get_process_group_ranks(mesh.partition.group)[first : first + size]
    return torch.distributed.new_group(ranks, timeout, use_local_synchronization=True)


def deepspeed_config(parallel: ParallelConfig, train: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """DeepSpeed's configuration. Micro-batches are summed in float32, whatever the network computes in."""
    micro_batches = max(train.batch_sizes) // (train.micro_batch_size * mesh.data.size)
    bf16, cuda = train.precision == "bf16", mesh.device.type == "cuda"
    wide_sum = bf16 and micro_batches > 1 and mesh.pipeline.size == 1  # under a pipeline gradient_sums.py makes the sums
    # On one rank overlapping only makes each backward wait for the device, and contiguous gradients cost a copy.
    overlaps = cuda and mesh.partition.size > 1 and mesh.pipeline.size == 1
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "reduce_bucket_size": parallel.reduce_bucket_elements,
        "allgather_bucket_size": parallel.reduce_bucket_elements + parallel.reduce_bucket_elements % 2,  # it must be even
        "overlap_comm": overlaps,
        "contiguous_gradients": overlaps,
    }
    if parallel.zero_stage == 3:
        zero["sub_group_size"] = 1 << 50  # one call of step() per update, as in the other stages
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
            "check_grad_overflow": False,  # it would wait for the device; Optimizer.update checks itself
            # without it stage 1 with float32 sums keeps .grad and zeroes it; in a CUDA graph's memory it would be overwritten
            "immediate_grad_update": train.cuda_graphs and wide_sum and parallel.zero_stage == 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"} if wide_sum else {},
        "gradient_clipping": 0.0,
        "steps_per_print": 1 << 40,
        "timers": {"throughput": {"enabled": False}},  # on by default; it waits for the device twice per micro-batch
    }
