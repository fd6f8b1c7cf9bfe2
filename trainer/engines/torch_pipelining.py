"""The schedules of torch.distributed.pipelining, and what tiglon uses of them beyond their documented interface.

torch's stage allocates what all micro-batches of an update receive before the first of them, and keeps it until the next
update; an update of 64 micro-batches would hold 64 inputs of every stage where few are in flight. Here a stage receives into
memory that is made for one micro-batch and dropped when its backward is over. Its interleaved schedule keeps what a rank has
sent until the end of an update, all of it; here no more than `SENDS_IN_FLIGHT` messages. Besides, a caller learns when a
forward and a backward begin and end, gives micro-batches of its own instead of a batch that torch cuts, and gets the error that
a stage has raised instead of torch's description of its inputs.

`PIPELINING_ATTRIBUTES` lists what is not documented; tests/trainer/engines/test_torch_pipelining.py checks it on the installed
torch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from model.parallel.pipeline import PipelineParallel
from trainer.private_api import private_attribute

_MEMORY = "receiving each micro-batch of a pipeline stage into memory of its own"
PIPELINING_ATTRIBUTES = {
    "_prepare_forward_infra": _MEMORY,
    "_setup_backward_recv_info": _MEMORY,
    "args_recv_info": _MEMORY,
    "grad_recv_info": _MEMORY,
    "has_backward": "running a pipeline's schedule on micro-batches that are cut already",
    "_step_microbatches": "running a pipeline's schedule on micro-batches that are cut already",
}
"""Private attribute -> what relies on it."""


SENDS_IN_FLIGHT = 4
"""Messages of an interleaved schedule that a rank has sent and not waited for: of about two forwards and two backwards."""


@dataclass(frozen=True)
class StageHooks:
    """What is called around the passes of stages; the first argument is the stage, the second the micro-batch."""

    before_forward: Callable[[int, int], object]
    after_forward: Callable[[int, int], object]
    before_backward: Callable[[int, int], object]
    after_backward: Callable[[int, int], object]


class _Stage(PipelineStage):
    """One stage of torch's, with memory for the micro-batches in flight.

    Args:
        module: called with the stream of the stage before, or for the first stage with an empty tensor, and the keywords of a
            micro-batch.
        stream: of a stage's input and output, on the meta device.
    """

    def __init__(
        self, module: nn.Module, stage: int, pipeline: PipelineParallel, stream: Tensor, device: torch.device, hooks: StageHooks
    ):
        inputs = torch.empty(0, device="meta") if stage == 0 else stream
        output = torch.empty((), device="meta", requires_grad=True) if stage + 1 == pipeline.stages else stream
        super().__init__(
            module, stage, pipeline.stages, device, input_args=inputs, output_args=output, group=pipeline.group
        )  # fmt: skip
        self.hooks = hooks
        pipelining_attribute(self, "has_backward")
        self.has_backward = True

    def _prepare_forward_infra(self, *arguments: Any, **keywords: Any) -> Any:
        found = super()._prepare_forward_infra(*arguments, **keywords)
        _forget(received for infos in pipelining_attribute(self, "args_recv_info").values() for received in infos)
        return found

    def _setup_backward_recv_info(self, *arguments: Any, **keywords: Any) -> Any:
        found = super()._setup_backward_recv_info(*arguments, **keywords)
        _forget(received for infos in pipelining_attribute(self, "grad_recv_info").values() for received in infos)
        return found

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        self._allocate(pipelining_attribute(self, "args_recv_info")[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        self._allocate(pipelining_attribute(self, "grad_recv_info")[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **keywords: Any) -> Any:
        self.hooks.before_forward(self.stage_index, fwd_chunk_id)
        with _own_error():
            found = super().forward_one_chunk(fwd_chunk_id, *arguments, **keywords)
        _forget(pipelining_attribute(self, "args_recv_info")[fwd_chunk_id])  # the graph of the forward still holds it
        self.hooks.after_forward(self.stage_index, fwd_chunk_id)
        return found

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **keywords: Any) -> None:
        self.hooks.before_backward(self.stage_index, bwd_chunk_id)
        with _own_error():
            super().backward_one_chunk(bwd_chunk_id, *arguments, **keywords)
        _forget(pipelining_attribute(self, "grad_recv_info")[bwd_chunk_id])
        self.hooks.after_backward(self.stage_index, bwd_chunk_id)

    def _allocate(self, infos: Sequence[Any]) -> None:
        for received in infos:
            if not received.is_root_arg:
                meta = received.tensor_meta
                received.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)


class _Sends:
    """What a rank has sent and not waited for.

    Waiting cannot stop a pipeline: torch lists a receive of one rank together with the send of the other, in an order that all
    ranks follow, so of all that is unfinished the first can always be finished.
    """

    def __init__(self) -> None:
        self._works: deque[Any] = deque()

    def start(self, messages: Iterable[Any]) -> None:
        """Send what torch's stage has made ready to be sent."""
        for each in messages:
            self._works.append(dist.isend(each.tensor, group=each.group, tag=each.tag, group_dst=each.group_peer))
        self.finish(SENDS_IN_FLIGHT)

    def finish(self, but: int = 0) -> None:
        """Wait for all but this many."""
        while len(self._works) > but:
            self._works.popleft().wait()


class _InterleavedStage(_Stage):
    """One of a rank's stages, which sends by itself what torch's schedule would send at once and keep.

    Args:
        sends: of all of the rank's stages.
        arguments: of _Stage.
    """

    def __init__(self, sends: _Sends, *arguments: Any):
        super().__init__(*arguments)
        self._sends = sends

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        self._sends.start(super().get_fwd_send_ops(fwd_chunk_id))
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        self._sends.start(super().get_bwd_send_ops(bwd_chunk_id))
        return []


class PipelineSchedule:
    """The passes of one update over the stages of one rank.

    Args:
        kind: parallel.pipeline_schedule.
        modules: this rank's stages by their numbers; the last of all returns a scalar, with which its backward begins, the
            others a stream.
        stream: on the meta device, requiring gradients.
        micro_batches: of an update.
    """

    def __init__(
        self, kind: str, modules: Mapping[int, nn.Module], pipeline: PipelineParallel, stream: Tensor, micro_batches: int,
        hooks: StageHooks, device: torch.device,
    ):  # fmt: skip
        arguments = [(each, stage, pipeline, stream, device, hooks) for stage, each in modules.items()]
        options: Any = {"loss_fn": lambda result, _: result, "scale_grads": False}
        self._sends = _Sends()
        match kind:
            case "1f1b":
                self._schedule: Any = Schedule1F1B(_Stage(*arguments[0]), micro_batches, **options)
            case "interleaved":
                stages: list[Any] = [_InterleavedStage(self._sends, *each) for each in arguments]
                self._schedule = ScheduleInterleaved1F1B(stages, micro_batches, **options)
            case _:
                raise ValueError(f"parallel.pipeline_schedule = '{kind}'; legal: 1f1b, interleaved")
        self._nothing = torch.empty(0, device=device)

    def run(self, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """Forward and backward of every micro-batch, given by the keywords of the stages' modules."""
        nothing = [self._nothing] * len(micro_batches)
        step = pipelining_attribute(self._schedule, "_step_microbatches")
        step([(each,) for each in nothing], [*map(dict, micro_batches)], nothing, None, return_outputs=False)
        self._sends.finish()


def pipelining_attribute(owner: Any, name: str) -> Any:
    """An attribute of `PIPELINING_ATTRIBUTES`; RuntimeError in one sentence where torch has it no longer."""
    return private_attribute("torch", owner, name, PIPELINING_ATTRIBUTES[name])


def _forget(infos: Iterator[Any] | Sequence[Any]) -> None:
    for received in infos:
        received.buffer = None


@contextmanager
def _own_error() -> Iterator[None]:
    """Raise what a stage raised, which torch wraps in an error with a description of the stage's inputs."""
    try:
        yield
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from error.__cause__.__cause__
