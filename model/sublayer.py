"""What attention and feed-forward layers have in common: the keys that all of them read, and the costs that each states."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from torch import nn

from model.parallel.layers import Kit
from model.parameters import Constant, Initial, Normal, spec_of

MAY_CHANGE = "may change"
"""Marks a key that a resumed run may set anew; another value of any other key makes another network."""


class StreamConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The residual stream and the initial weights of what is added to it."""

    hidden_size: int = Field(default=256, gt=0, description="Width D of the residual stream.")
    num_hidden_layers: int = Field(default=6, gt=0, description="Transformer blocks.")
    rms_norm_eps: Annotated[float, MAY_CHANGE] = Field(
        default=1e-5, gt=0, description="Added to the mean square inside every RMSNorm."
    )
    zero_centered_gains: bool = Field(
        default=False, description="Every RMSNorm multiplies by 1 + w, in float32, and w starts at 0 (Gemma)."
    )
    initializer_range: Annotated[float, MAY_CHANGE] = Field(
        default=0.02, gt=0, description="Standard deviation sigma of the initial matrices."
    )
    residual_init: Annotated[Literal["scaled", "plain", "zero"], MAY_CHANGE] = Field(
        default="scaled",
        description="Initial o_proj and down_proj: sigma / sqrt(2 * layers), sigma, or zero.",
    )

    @property
    def initial(self) -> Initial:
        """How a matrix starts."""
        return Normal(self.initializer_range)

    @property
    def residual_initial(self) -> Initial:
        """How the last matrix of a sublayer starts. Scaled, the variance of the sum of all sublayers does not grow with depth
        (GPT-2)."""
        scaled = self.initializer_range / math.sqrt(2 * self.num_hidden_layers)
        return {"scaled": Normal(scaled), "plain": self.initial, "zero": Constant(0.0, scaled)}[self.residual_init]


@dataclass(frozen=True)
class Execution:
    """How a rank runs the network, as far as its activations depend on it."""

    element_bytes: int
    """Of an activation: 2 for bf16, 4 for fp32."""
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    """"full" keeps each block's input; "selective" keeps the results of matrix products and attention and recomputes norms,
    rotations and the mlp's pointwise part; "experts" recomputes routed experts from what the router sends them."""
    device: str = "cuda"
    """"cuda" or "cpu", which has another kernel for short sequences and smaller chunks of logits."""
    compiled: bool = False
    """Whether blocks are compiled, which then recompute what needs no pass over memory of its own, and the loss, of which a
    GPU then takes larger chunks."""
    regions: int = 1
    """Regions of attention: 2 where distances beyond a window are rotated by another rule."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of a sequence; tokens of a rank are its own."""
    context_exchange: str = "gather"
    """"gather" or "heads", as model/parallel/context.py says."""
    expert_load: float = 1.0
    """Copies of tokens that a rank's experts compute, over those that it would have if all ranks' were even."""

    def stream(self, width: int) -> float:
        """Elements per token of a residual stream of `width` that one rank holds."""
        return width / (self.tensor_parallel_size if self.sequence_parallel else 1)

    @property
    def gathers_keys(self) -> bool:
        """Whether a rank has the keys and values of other ranks' tokens too."""
        return self.context_parallel_size > 1 and self.context_exchange == "gather"

    @property
    def exchanges_heads(self) -> bool:
        """Whether a rank attends over whole sequences of its share of the heads."""
        return self.context_parallel_size > 1 and self.context_exchange == "heads"


def norm_bytes(width: float, execution: Execution, zero_centered: bool = False) -> float:
    """Bytes that an RMSNorm of `width` elements saves: its input in float32 and the values that it multiplies with the gain, in
    float32 for a gain of 1 + w; compiled, the input as it is and one float32. Its output is saved by what takes it."""
    element = execution.element_bytes
    return width * element + 4 if execution.compiled else width * (4 + (4 if zero_centered else element))


@dataclass(frozen=True)
class Kept:
    """Bytes per token that a sublayer of one rank holds for its backward, from what it projects its input to."""

    products: float
    """Results of its matrix products and of attention: what selective recomputation keeps."""
    everything: float
    inside_experts: float = 0.0
    """Of `everything`, what routed experts make of the tokens that they get."""


class Sublayer(nn.Module):
    """Half of a block: its forward gives what is added to the residual stream. Costs are counted by hand, beside it."""

    section: type[StreamConfig] = StreamConfig
    """The keys of [model] that the kind of layer reads."""

    def __init__(self, config: StreamConfig, kit: Kit):
        super().__init__()
        self.hidden_size, self.kit = config.hidden_size, kit

    @staticmethod
    def check(config: Any) -> None:
        """Refuse keys that this kind of layer cannot have together. Raises ValueError, one sentence."""

    @staticmethod
    def remarks(config: Any) -> list[str]:
        """Warnings, one sentence each, about keys that work together but are probably not meant."""
        return []

    @staticmethod
    def effective(config: Any) -> dict[str, Any]:
        """Keys that are left unset and what they then are."""
        return {}

    def matrix_flops(self) -> float:
        """Forward FLOPs per token in matrix products, over all ranks: 2 per weight."""
        return 2.0 * sum(spec.elements for spec in map(spec_of, self.parameters()) if spec.kind == "matrix")

    def whole_inputs(self) -> list[int]:
        """Elements per token of each input that every tensor-parallel rank has whole, one per `Kit.column_input` of forward."""
        return [self.hidden_size]

    def summed_scalars(self) -> int:
        """Float32 elements per token that the forward sums over tensor-parallel ranks, each in a message of its own."""
        return 0

    def pointwise_elements(self) -> float:
        """Elements per token that a rank's fused pointwise kernels read and write in the forward, norms left out."""
        raise NotImplementedError

    def kept(self, execution: Execution, sequence_length: int) -> Kept:
        """What a rank holds for the backward."""
        raise NotImplementedError
