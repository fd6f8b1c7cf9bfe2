"""What torch's compiler would run on a GPU that is not there: its code is generated from fake tensors, and counted.

Needs a CUDA build of torch (2.11 or later), Triton and a C compiler. `pretend` starts this Python once more with a library
in front of the CUDA runtime that answers the few questions of tracing and compiling: how many devices, which one. Nothing
is ever launched: the compiler is stopped where it would load its code.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._functorch.config as functorch
from torch._inductor import config as inductor
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

ANSWERS = """
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = 0; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamQuery(void *stream) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = 0; return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventQuery(void *event) { return 0; }
int cudaEventDestroy(void *event) { return 0; }
int cuInit(unsigned flags) { return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
"""
PRETENDING = "TIGLON_PRETENDS_A_GPU"
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, total_memory=141 * 10**9, multi_processor_count=132, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20, gcnArchName="",
    is_integrated=False,
)  # fmt: skip


@dataclass
class Graph:
    """One graph as compiled."""

    triton: int
    """Launches of generated kernels."""
    extern: list[str]
    """Calls of kernels that are not generated: products, attention."""
    triton_bytes: int
    """Read and written by the generated ones; a tensor that a kernel reads twice counts once."""
    extern_bytes: int
    source: str = field(repr=False)


def missing() -> str:
    """Why this Python cannot do it; empty if it can."""
    if not torch.backends.cuda.is_built():
        return "torch here is a build without CUDA; install one with it (no GPU is needed)"
    try:
        import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "Triton is not installed"
    return ""


def pretend() -> None:
    """Be a process that finds one H200; starts this Python once more on first call."""
    if PRETENDING not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="tiglon-cuda-"))
        (folder / "answers.c").write_text(ANSWERS)
        library = folder / "libcuda.so.1"
        compiler = os.environ.get("CC", "cc")
        command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(folder / "answers.c")]
        subprocess.run(command, check=True)
        paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        environment = os.environ | {PRETENDING: str(folder), "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": ":".join(paths)}
        os.execve(sys.executable, sys.orig_argv, environment)
    _answer_in_python()


def _answer_in_python() -> None:
    """What torch asks of a device in Python."""
    import triton  # pyright: ignore[reportMissingImports]
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H200,
        "get_device_capability": lambda device=None: (H200.major, H200.minor),
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "is_initialized": lambda: True,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
        if hasattr(CudaInterface, name):
            setattr(CudaInterface, name, staticmethod(answer))
    CudaInterface.get_compute_capability = staticmethod(lambda device=None: 90)  # type: ignore[assignment]
    CudaInterface.Worker.get_device_properties = staticmethod(answers["get_device_properties"])  # type: ignore[assignment]
    CudaInterface.Worker.current_device = staticmethod(answers["current_device"])  # type: ignore[assignment]
    torch.accelerator.is_available = lambda: False
    fake_tensor.init_gpu_context = lambda device: None
    triton.runtime.driver._active = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )  # fmt: skip
    triton_helpers.set_driver_to_gpu = lambda: None
    # Patterns that torch looks for are made from tensors of the device, and constants are computed on it.
    joint_graph.lazy_init = post_grad.lazy_init = lambda device=None: None
    inductor.joint_graph_constant_folding = False
    inductor.fx_graph_cache = False
    inductor.compile_threads = 1
    functorch.enable_autograd_cache = False
    functorch.force_non_lazy_backward_lowering = True


@contextmanager
def on_it(mode: FakeTensorMode) -> Iterator[None]:
    """What is made in here is fake, and on the GPU; numbers that are given (`torch.tensor`) are made on the CPU and sent."""
    real = torch.tensor

    def sent(data: Any, *arguments: Any, device: Any = None, **options: Any) -> torch.Tensor:
        with torch.device("cpu"):
            made = real(data, *arguments, **options)
        return made.to("cuda")

    torch.tensor = sent  # type: ignore[assignment]
    try:
        with mode, torch.device("cuda"):
            yield
    finally:
        torch.tensor = real


class _Compiled(Exception):
    """Everything is compiled; running it would need the GPU."""


def graphs(function: Callable[..., Any], *inputs: Any, mode: FakeTensorMode, compiled: bool = False) -> list[Graph]:
    """What the compiler makes of a call: one graph, or forward and backward where inputs want gradients.

    Args:
        mode: the one that made the inputs, on the "cuda" device.
        compiled: the function calls torch.compile itself.

    Raises:
        torch._dynamo.exc.Unsupported: the function is not one graph.
    """
    found: list[Graph] = []

    def stop(*_: Any) -> None:
        raise _Compiled

    def note(lowered: GraphLowering) -> Any:
        found.append(_count(lowered))
        return SimpleNamespace(call=stop, runner=None, __file__="", _benchmark=None)

    torch._dynamo.reset()
    called = function if compiled else torch.compile(function, fullgraph=True)
    load, GraphLowering.compile_to_module = GraphLowering.compile_to_module, note
    try:
        with mode:
            called(*inputs)
    except _Compiled:
        return found
    finally:
        GraphLowering.compile_to_module = load
    raise RuntimeError("nothing was compiled")


def _accesses(node: BaseSchedulerNode) -> dict[str, int]:
    """Bytes by buffer. A generated kernel only overwrites what it names as a whole; torch counts that as read too."""
    found = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    read = {one.name for one in node.read_writes.reads if node.is_extern() or isinstance(one, MemoryDep)}
    return {name: size for name, size in found.items() if name in read or name in node.get_buffer_names()}


def _count(lowered: GraphLowering) -> Graph:
    source = lowered.codegen()[0].value
    moved = {True: 0, False: 0}
    for node in lowered.scheduler.nodes:
        moved[node.is_extern()] += sum(_accesses(node).values())
    body = source[source.rindex("def call(") :]
    extern = re.findall(r"(?:extern_kernels\.(\w+)|torch\.ops\.([\w.]+?)(?:\.default)?)\(", body)
    launches = len(re.findall(r"^\s+triton_\w+\.run\(", body, re.MULTILINE))
    return Graph(launches, ["".join(names) for names in extern], moved[False], moved[True], source)
