"""Imported once by the fork server, so that each test rank starts with the slow imports done.

What a run imports only when it gets there is named too: DeepSpeed's optimizers ask for torch's compiler, whose import takes
three times as long as a small run.
"""

import gc
import importlib
import os
import warnings

# Else the compiler starts processes when it is imported, and each rank imports torch four times to try what the CPU has.
for variable in ("TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_VEC_ISA_OK"):
    os.environ.setdefault(variable, "1")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in (
        "launch.train",
        "model.parallel.tensor",
        "torch.utils.tensorboard",
        "torch._inductor.compile_fx",
        "deepspeed.runtime.zero.muon.muon_optimizer",
    ):
        importlib.import_module(name)

gc.freeze()  # DeepSpeed collects garbage now and then: a rank is to look at its own objects only
