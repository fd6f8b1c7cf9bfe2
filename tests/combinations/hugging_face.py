"""Hugging Face's networks in float64, with the weights of a configuration."""

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from launch.config import RunConfig
from tests.combinations.cases import LATENT, SIZES
from tests.combinations.network import Batch


class Turn(nn.Module):
    """Hugging Face's rotary table without its detour through float32."""

    def __init__(self, size: int, base: float):
        super().__init__()
        self.theta = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [rows, S, size]."""
        angle = position_ids[..., None].double() * self.theta
        return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()


def hugging_face(config: RunConfig, weights: dict[str, Tensor]) -> Any:
    """The same network by transformers in float64: torch's RMSNorm, which unlike its own does not go through float32."""
    m = config.model
    shared: dict[str, Any] = {
        **m.model_dump(include={*SIZES, "rms_norm_eps", "tie_word_embeddings"}),
        "num_key_value_heads": m.kv_heads,
        "attn_implementation": "sdpa",
    }
    if m.attention == "gqa":
        theirs: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared, head_dim=m.head_size))
    else:
        own = m.model_dump(include={*LATENT, "q_lora_rank"} - {"attention"})
        dense = {"first_k_dense_replace": m.num_hidden_layers, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1}
        theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**shared, **own, **dense, topk_group=1))
    theirs = theirs.double().eval()
    for path, module in list(theirs.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            plain = nn.RMSNorm(module.weight.numel(), eps=m.rms_norm_eps, dtype=torch.float64)
            theirs.set_submodule(path, plain)
    theirs.model.rotary_emb = Turn(m.rotary_size, config.position.rope_theta)
    missing, unexpected = theirs.load_state_dict({name: weight.double() for name, weight in weights.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs


def mean_loss(theirs: Any, batches: list[Batch]) -> Tensor:
    """Of Hugging Face's network over all scored targets of the batches."""
    inputs, targets = (torch.cat(column) for column in list(zip(*batches, strict=True))[:2])
    return F.cross_entropy(theirs(inputs, use_cache=False).logits.flatten(0, 1), targets.flatten())
