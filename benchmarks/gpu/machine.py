"""What this machine is, and what a process of tiglon finds on it."""

import os
import platform
import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.figures import Part
from benchmarks.peers.tiglon import started


def measure(part: Part) -> None:
    """Versions, sizes, the time of the imports, and the few calls that nothing else makes alone."""
    part.attempt("machine", lambda: machine(part))
    part.attempt("imports", imports)
    part.attempt("process", lambda: process(part))


def machine(part: Part) -> dict[str, Any]:
    """Name, memory and versions."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    if part.device.type != "cuda":
        return found | {"name": f"{os.cpu_count()} CPU cores"}
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "name": torch.cuda.get_device_name(), "bytes": properties.total_memory, "free_bytes": torch.cuda.mem_get_info()[0],
        "capability": list(torch.cuda.get_device_capability()), "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()), "cuda": torch.version.cuda,
    }  # fmt: skip


def imports() -> dict[str, Any]:
    """Seconds until a rank has everything in place."""
    code = "import time; a = time.time(); import torch; b = time.time(); import launch.train; print(b - a, time.time() - b)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = (round(float(word), 2) for word in done.stdout.split()[-2:])
    return {"torch_seconds": first, "launch_train_seconds": second}


def process(part: Part) -> dict[str, Any]:
    """A rank alone: its allocator is asked for after torch was imported, its group has one member."""
    device = started(part.device.type)
    x = torch.ones(1 << 20, device=device)
    dist.all_reduce(x)
    found: dict[str, Any] = {"backend": dist.get_backend(), "sum": float(x.sum())}
    if found["sum"] != x.numel():
        found["error"] = f"{x.numel()} ones come to {found['sum']}"
    if device.type == "cuda":
        settings = torch.cuda.memory._snapshot()["allocator_settings"]
        found["expandable_segments"] = settings.get("expandable_segments")
    dist.destroy_process_group()
    return found
