"""Which backend computes an attention: what each one serves, where it is computed, and which one is taken.

`BACKENDS` lists all of them and `choose_backend` is the only choice; `describe` says it of a configuration in words.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from model.attention.heads import AttentionConfig
from model.attention.kernels.inputs import AttentionInputs
from model.positions.config import PositionConfig
from model.positions.packing import PackedDocuments

AttentionBackend = Literal["cpu_flash", "cpu_dense", "cpu_tiled", "cpu_sdpa", "sdpa", "flash", "cudnn", "flex"]
MaskKind = Literal["causal", "two regions", "sliding window", "packed documents"]


@dataclass(frozen=True)
class AttentionProblem:
    """Everything that the choice of a backend depends on."""

    device: str
    """Type of the device: "cpu" or "cuda"."""
    dtype: torch.dtype
    """Of queries, keys and values."""
    head_dim: int
    """Of a query or key head, as the scores see it."""
    value_head_dim: int
    tokens: int
    """Of a row."""
    window: int | None = None
    """Tokens, as `model.attention.kernels.operator.attend` takes it."""
    two_regions: bool = False
    packed: bool = False
    """Attention stays inside the documents of a row."""
    compiled: bool = False
    """Whether blocks are compiled."""
    wants_lse: bool = False
    """The log-sum-exp is needed beside the output: optimizer.qk_clip."""
    fewer_queries: bool = False
    """Only the last tokens of a row are queries."""

    @classmethod
    def of(
        cls, inputs: AttentionInputs, window: int | None, documents: PackedDocuments | None, compiled: bool
    ) -> "AttentionProblem":
        """The problem of one call; torch's meta device is served as a CPU.

        Raises:
            ValueError: more queries than keys.
        """
        v, device, queries = inputs.v, inputs.v.device.type, inputs.queries
        if queries > inputs.tokens:
            raise ValueError(
                f"attention got {queries} queries and {inputs.tokens} keys in a row, and wanted at least as many keys as "
                "queries: the queries are the last tokens of the row; pass the keys of every token up to the last query"
            )
        return cls(
            "cpu" if device == "meta" else device, v.dtype, inputs.near_q.shape[-1], v.shape[-1], inputs.tokens,
            window, inputs.far_q is not None, documents is not None, compiled, fewer_queries=queries < inputs.tokens,
        )  # fmt: skip

    @property
    def mask(self) -> MaskKind:
        """What a query sees. "causal" is every earlier token of its row, all in one region."""
        if self.packed:
            return "packed documents"
        if self.window is None:
            return "causal"
        return "two regions" if self.two_regions else "sliding window"

    @property
    def visible_tokens(self) -> int:
        """Tokens that the last query of a row sees."""
        return self.tokens if self.window is None or self.two_regions else min(self.window, self.tokens)

    @property
    def shortest_call(self) -> int:
        """Tokens of the shortest of the calls that model/attention/kernels/three_calls.py makes."""
        if self.window is None or self.window >= self.tokens:
            return self.tokens
        return min(self.window - 1, self.tokens - self.window)


@dataclass(frozen=True)
class Coverage:
    """What a backend serves, and where it is computed."""

    device: Literal["cpu", "cuda", "any"]
    masks: tuple[MaskKind, ...]
    file: str
    """In model/attention/kernels."""
    dtypes: tuple[torch.dtype, ...] | None = None
    """None = every dtype."""
    head_dim_multiple: int = 1
    max_head_dim: int | None = None
    value_head_dim_multiple: int = 1
    max_tokens: int | None = None
    """Of a row, or of a document, all of them queries."""
    compiled_only: bool = False
    """Serves compiled blocks only."""
    fewer_queries: bool = False
    """Serves fewer queries than keys, and then every mask and rows of every length."""

    def serves(self, problem: AttentionProblem) -> bool:
        """Whether the backend can compute this attention."""
        if problem.fewer_queries:
            return self.fewer_queries and self._serves_tensors(problem)
        is_short = self.max_tokens is None or problem.tokens <= self.max_tokens
        return is_short and problem.mask in self.masks and self._serves_tensors(problem)

    def _serves_tensors(self, problem: AttentionProblem) -> bool:
        """Whether device, dtype and head dims are the backend's."""
        return (
            self.device in (problem.device, "any")
            and (self.dtypes is None or problem.dtype in self.dtypes)
            and problem.head_dim % self.head_dim_multiple == 0
            and (self.max_head_dim is None or problem.head_dim <= self.max_head_dim)
            and problem.value_head_dim % self.value_head_dim_multiple == 0
            and (problem.compiled or not self.compiled_only)
        )


CAUSAL: tuple[MaskKind, ...] = ("causal",)
UNPACKED: tuple[MaskKind, ...] = ("two regions", "sliding window")
NOT_CAUSAL: tuple[MaskKind, ...] = (*UNPACKED, "packed documents")
HALF = (torch.bfloat16, torch.float16)

BACKENDS: dict[AttentionBackend, Coverage] = {
    "cpu_flash": Coverage(
        "cpu", (*CAUSAL, *NOT_CAUSAL), "cpu_flash.cpp", (torch.bfloat16,), 16, None, 16, compiled_only=True, fewer_queries=True
    ),
    "cpu_dense": Coverage("cpu", CAUSAL, "cpu_dense.py", max_tokens=512),
    "sdpa": Coverage("any", CAUSAL, "sdpa.py"),
    "cpu_tiled": Coverage("cpu", NOT_CAUSAL, "cpu_tiled.py", max_tokens=512, fewer_queries=True),
    "cpu_sdpa": Coverage("cpu", NOT_CAUSAL, "three_calls.py"),
    "flash": Coverage("cuda", NOT_CAUSAL, "flash.py", HALF, 8, 256, fewer_queries=True),
    "cudnn": Coverage("cuda", UNPACKED, "three_calls.py", HALF, 8, 256),
    "flex": Coverage("cuda", NOT_CAUSAL, "flex.py", fewer_queries=True),
}
"""The first backend that serves a problem is taken; among those of a GPU, what `FASTEST` says comes before that order.

Of packed documents on a CPU, every document is a problem of its own (model/attention/kernels/cpu_eager.py). The limits
of 512 tokens are justified in the files they belong to.
"""

FASTEST: dict[tuple[MaskKind, bool], dict[int, AttentionBackend]] = {
    ("two regions", False): {0: "flash", 8192: "cudnn"},
    ("two regions", True): {0: "cudnn"},
    ("sliding window", False): {0: "flash", 2048: "cudnn"},
    ("sliding window", True): {0: "cudnn"},
    ("packed documents", False): {0: "flash"},
    ("packed documents", True): {0: "flash"},
}
"""On a GPU, by mask and whether value heads are narrower than keys (MLA): the backend to take from so many visible tokens on.

These are estimates for Hopper, until somebody measures: torch's flash kernel reaches half the rate of cuDNN's there, and
cuDNN's three calls move more memory. `python -m benchmarks.attention --device cuda --backends` times every backend that
serves and prints this table as measured.
"""


def preferred_backend(problem: AttentionProblem) -> AttentionBackend:
    """The backend that `BACKENDS` and `FASTEST` name. It reads nothing but the problem, so torch.compile can trace it.

    Raises:
        ValueError: no backend serves the device.
    """
    if problem.device == "cuda" and problem.mask != "causal":
        by_tokens = FASTEST[problem.mask, problem.value_head_dim < problem.head_dim]
        fastest = by_tokens[max(start for start in by_tokens if start <= problem.visible_tokens)]
        if BACKENDS[fastest].serves(problem):
            return fastest
    for backend, coverage in BACKENDS.items():
        if coverage.serves(problem):
            if backend == "sdpa" and problem.wants_lse:  # torch's function returns none: what serves windows takes a whole row
                return preferred_backend(replace(problem, window=problem.tokens))
            return backend
    raise ValueError(f"attention has no kernel for device '{problem.device}'; use cpu or cuda")


def choose_backend(problem: AttentionProblem) -> AttentionBackend:
    """The backend that computes an attention: the preferred one, or flash where this machine's cuDNN does not serve.

    Raises:
        ValueError: no backend serves the device.
    """
    backend = preferred_backend(problem)
    if backend == "cudnn" and not (problem.shortest_call > 1 and cudnn_serves() and not deterministic()):
        return "flash"
    return backend


def cpu_eager_backend(queries: int, tokens: int) -> AttentionBackend:
    """The one of cpu_tiled and cpu_sdpa that computes a row or a document of so many tokens, its last `queries` as queries."""
    limit = BACKENDS["cpu_tiled"].max_tokens
    return "cpu_tiled" if queries < tokens or limit is None or tokens <= limit else "cpu_sdpa"


@lru_cache(maxsize=1)
def cudnn_serves() -> bool:
    """Whether cuDNN is right on this GPU: Hopper and later, after cuDNN 9.15.0.

    Versions 9.11 and 9.12 err in Hopper's backward where values are narrower than keys, and torch itself asks for more
    than 9.15.0 where lengths are no multiple of 128, as those of the three calls are beside a window.
    """
    return torch.cuda.get_device_capability() >= (9, 0) and (torch.backends.cudnn.version() or 0) > 91500


def deterministic() -> bool:
    """Whether every kernel has to give the same bits each time (run.deterministic): cuDNN's backward does not."""
    return torch.are_deterministic_algorithms_enabled()


def describe(model: AttentionConfig, position: PositionConfig, problem: AttentionProblem) -> list[str]:
    """Which backend trains each kind of layer: a line for every kind, the kind of the first layer first.

    Args:
        model: sizes and the pattern of windowed layers.
        position: the map of training.
        problem: of a full layer in one region; the windows are filled in here.
    """
    return [
        f"{name}{f' in {count} of {model.num_hidden_layers} layers' if count < model.num_hidden_layers else ''} "
        f"on {problem.device}: {_backend_in_words(layer_problem)}"
        for (name, layer_problem), count in Counter(
            _layer_problem(model, position, problem, layer) for layer in range(model.num_hidden_layers)
        ).items()
    ]


def _layer_problem(
    model: AttentionConfig, position: PositionConfig, problem: AttentionProblem, layer: int
) -> tuple[str, AttentionProblem]:
    """A layer's mask in words, and its problem."""
    packed = "packed documents, " if problem.packed else ""
    full, window = model.full_layer(layer), model.sliding_window
    if not full and window is not None and window < problem.tokens:
        return f"{packed}sliding window of {window}", replace(problem, window=window)
    far = position.map.far_region() if full and model.rotated_layer(layer) else None
    if far is not None and far.window < problem.tokens:
        return f"{packed}two regions ({position.map.title})", replace(problem, window=far.window, two_regions=True)
    return f"{packed}causal", problem


def _backend_in_words(problem: AttentionProblem) -> str:
    backend = choose_backend(problem)
    if backend == "cpu_sdpa" and problem.packed:
        return f"cpu_tiled, documents above {BACKENDS['cpu_tiled'].max_tokens} tokens cpu_sdpa"
    if backend == "cudnn":
        return f"cudnn {torch.backends.cudnn.version()}"
    return backend
