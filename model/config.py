"""Configuration of the network, named as Hugging Face names it: the kinds of its layers, and the keys of all of them."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from model.attention.base import Attention
from model.attention.gqa import GroupedQueryAttention, GroupedQueryConfig
from model.attention.heads import HeadSizes
from model.attention.mla import LatentAttention, LatentConfig
from model.feed_forward.base import FeedForward
from model.feed_forward.geglu import GeGLU
from model.feed_forward.moe import MixtureConfig, MixtureOfExperts
from model.feed_forward.swiglu import SwiGLU
from model.sublayer import MAY_CHANGE, Sublayer

ATTENTION: dict[str, type[Attention]] = {"gqa": GroupedQueryAttention, "mla": LatentAttention}
"""Kinds of attention, by the value of model.attention."""
FEED_FORWARD: dict[str, type[FeedForward]] = {"swiglu": SwiGLU, "geglu": GeGLU, "moe": MixtureOfExperts}
"""Kinds of feed-forward layers, by the value of model.feed_forward."""

if TYPE_CHECKING:
    AttentionName = str
    FeedForwardName = str
else:
    AttentionName, FeedForwardName = Literal[tuple(ATTENTION)], Literal[tuple(FEED_FORWARD)]


class ModelConfig(MixtureConfig, LatentConfig, GroupedQueryConfig, frozen=True):
    """A decoder-only transformer: RMSNorm, rotary attention, a feed-forward layer, tied or untied head."""

    vocab_size: int = Field(default=4096, gt=0, description="Tokens of the tokenizer; rows of the embedding.")
    pad_vocab_to_multiple: Annotated[int, MAY_CHANGE] = Field(
        default=1,
        gt=0,
        description="Rows of embedding and head are rounded up to a multiple of it, for products of a shape that suits the "
        "device or that ranks divide. The rows added are zeros without a token: loss, gradients and checkpoints are those "
        "without them.",
    )
    tie_word_embeddings: bool = Field(default=True, description="Share the embedding with the output head.")
    tied_head: Literal["half-swap", "plain", "projection", "small-init"] = Field(
        default="half-swap",
        description="How a tied head keeps the first loss at log V (Su 2023, kexue.fm/archives/9698); unused when untied.",
    )
    scale_embedding: bool = Field(
        default=False,
        description="Multiply token vectors by sqrt(hidden_size), rounded to the network's precision (Gemma); a tied head uses "
        "them as they are.",
    )
    norm_placement: Literal["pre", "post", "sandwich"] = Field(
        default="pre",
        description="Norms of a block: of the inputs of attention and mlp (pre), of their outputs (post, OLMo 2) or of both "
        "(sandwich, Gemma 3).",
    )
    attention: AttentionName = Field(default="gqa", description="Grouped-query or multi-head latent attention.")
    feed_forward: FeedForwardName = Field(default="swiglu", description="The feed-forward layer of a block.")

    @property
    def kinds(self) -> tuple[type[Attention], type[FeedForward]]:
        """The two sublayers of a block.

        Raises:
            ValueError: a kind that is in no table.
        """
        for key, value, table in (("attention", self.attention, ATTENTION), ("feed_forward", self.feed_forward, FEED_FORWARD)):
            if value not in table:
                raise ValueError(f"model.{key} = '{value}' is unknown; legal: {', '.join(table)}")
        return ATTENTION[self.attention], FEED_FORWARD[self.feed_forward]

    @property
    def layers_with_experts(self) -> tuple[int, ...]:
        """Their numbers."""
        if self.feed_forward != "moe":
            return ()
        return tuple(range(self.first_k_dense_replace, self.num_hidden_layers))

    @property
    def vocabulary_padding(self) -> int:
        """Rows added to the embedding and the head by `pad_vocab_to_multiple`."""
        return -self.vocab_size % self.pad_vocab_to_multiple

    @property
    def head_sizes(self) -> HeadSizes:
        """Sizes of heads, by the kind of attention."""
        return ATTENTION[self.attention].head_sizes(self)

    def effective(self) -> dict[str, Any]:
        """Plain values of the keys that act: what is left unset filled in, keys that only other kinds read left out."""
        acting: list[type[Sublayer]] = [*self.kinds]
        values = self.model_dump(mode="json")
        read = {key for kind in acting for key in kind.section.model_fields}
        for kind in (*ATTENTION.values(), *FEED_FORWARD.values()):
            for key in kind.section.model_fields.keys() - read:
                values.pop(key, None)
        for kind in acting:
            values |= kind.effective(self)
        return values if self.tie_word_embeddings else {**values, "tied_head": None}

    def remarks(self) -> list[str]:
        """Warnings, one sentence each, about keys that work but are probably not meant."""
        return [remark for kind in self.kinds for remark in kind.remarks(self)]

    @classmethod
    def structure(cls) -> list[str]:
        """Keys of which another value makes another network: all that are not marked as free to change."""
        return [name for name, field in cls.model_fields.items() if MAY_CHANGE not in field.metadata]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for kind in self.kinds:
            kind.check(self)
        if self.tie_word_embeddings and self.tied_head == "half-swap" and self.hidden_size % 2:
            raise ValueError(f"tied_head = 'half-swap' needs an even hidden_size, got {self.hidden_size}")
        self.check_layers()
        return self
