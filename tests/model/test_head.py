"""The first loss of a tied head (Su 2023, kexue.fm/archives/9698), where it shows: residual branches start at zero."""

import math
import warnings

import pytest
import torch

from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.mesh import Mesh, make_kit, make_mesh
from model.positions.config import PositionConfig
from tests.ranks import run_ranks

HEADS = ["plain", "half-swap", "projection", "small-init", "untied"]


def network(head: str, vocabulary: int, width: int, sigma: float) -> ModelConfig:
    """Two thin layers whose residual branches start at zero: a 2-gram model at the start."""
    return ModelConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        initializer_range=sigma, residual_init="zero", rms_norm_eps=1e-9,  # 1e-5 beside sigma^2 = 4e-4 lowers plain by 0.2
        tie_word_embeddings=head != "untied", tied_head="plain" if head == "untied" else head,  # type: ignore[arg-type]
    )  # fmt: skip


def decoder(config: ModelConfig, mesh: Mesh | None = None) -> Decoder:
    model = Decoder(config, PositionConfig(), 64, make_kit(mesh or Mesh()))
    initialise(model, 0)
    return model


def pairs(vocabulary: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and other ids to predict."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (count // 64, 64), generator=generator)
    return ids, (ids + torch.randint(1, vocabulary, ids.shape, generator=generator)) % vocabulary


@torch.no_grad()
def first_loss(head: str, vocabulary: int, width: int, sigma: float, count: int) -> float:
    loss, scored = decoder(network(head, vocabulary, width, sigma))(*pairs(vocabulary, count))
    return (loss / scored).item()


def plain_loss(vocabulary: int, width: int, sigma: float) -> float:
    return math.log(math.exp(width * sigma) + (vocabulary - 1) * math.exp(width * sigma**2 / 2))


@pytest.mark.parametrize(
    ("vocabulary", "width", "sigma", "count", "plain", "swapped", "slack"),
    [(1000, 64, 0.2, 4096, 12.810, 8.188, 0.25), (32000, 768, 0.02, 256, 15.368, 10.527, 0.15)],
)
def test_first_loss_is_the_published_one(
    vocabulary: int, width: int, sigma: float, count: int, plain: float, swapped: float, slack: float
) -> None:
    assert plain_loss(vocabulary, width, sigma) == pytest.approx(plain, abs=1e-3)
    assert math.log(vocabulary) + width * sigma**2 / 2 == pytest.approx(swapped, abs=1e-3)
    assert first_loss("plain", vocabulary, width, sigma, count) == pytest.approx(plain, abs=slack)
    assert first_loss("half-swap", vocabulary, width, sigma, count) == pytest.approx(swapped, abs=0.1)


@pytest.mark.parametrize("width", [768, 2048])
@pytest.mark.parametrize("head", HEADS)
def test_first_loss_of_a_vocabulary_of_32000(head: str, width: int) -> None:
    loss, sigma, log_v = first_loss(head, 32000, width, 0.02, 128), 0.02, math.log(32000)
    match head:
        case "plain":
            assert loss == pytest.approx(plain_loss(32000, width, sigma), abs=0.3)
            assert loss > log_v + 4
        case "small-init":
            sigma = log_v / width
            assert log_v - 0.1 < loss <= log_v + math.log(2) + width * sigma**2 / 4 + 0.2
        case _:
            assert log_v - 0.1 < loss <= log_v + width * sigma**2 / 2 + 0.3


def test_small_init_scales_the_embedding() -> None:
    model = decoder(network("small-init", 4000, 256, 0.02))
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(math.log(4000) / 256, rel=0.01)


def test_swapping_twice_changes_nothing() -> None:
    head = decoder(network("half-swap", 100, 16, 0.02)).lm_head
    h = torch.randn(5, 16)
    assert not torch.equal(head.hidden(h), h) and torch.equal(head.hidden(head.hidden(h)), h)


def test_the_projection_keeps_lengths() -> None:
    head = decoder(network("projection", 100, 16, 0.02)).lm_head
    h = torch.randn(5, 16)
    torch.testing.assert_close(head.hidden(h).norm(dim=1), h.norm(dim=1))


@pytest.mark.parametrize("head", HEADS)
def test_training_and_reading_use_one_head(head: str) -> None:
    model = decoder(network(head, 100, 16, 0.3))
    ids, targets = pairs(100, 128)
    with torch.no_grad():
        loss, _ = model(ids, targets)
        logits = model(ids)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("head", HEADS)
def test_padding_changes_neither_logits_nor_loss_nor_gradients(head: str) -> None:
    ids, targets = pairs(100, 128)
    found = []
    for multiple in (1, 96):
        model = decoder(network(head, 100, 16, 0.3).model_copy(update={"pad_vocab_to_multiple": multiple}))
        loss, _ = model(ids, targets)
        loss.backward()
        gradients = [weight.grad for weight in model.parameters()]
        assert not any(gradient[100:].any() for gradient in gradients if len(gradient) == 192)
        found.append([loss.detach(), model(ids).detach(), *(gradient[:100] for gradient in gradients)])
    for padded, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)


def on_ranks(rank: int, world_size: int) -> list[tuple[float, float]]:
    warnings.filterwarnings("ignore")
    mesh, results = make_mesh(world_size, torch.device("cpu")), []
    for head in HEADS:
        model = decoder(network(head, 96, 16, 0.3), mesh)
        loss, _ = model(*pairs(96, 128))
        loss.backward()
        gradient = model.model.embed_tokens.weight.grad
        assert gradient is not None
        results.append((loss.item(), gradient.square().sum().item()))
    return results


def test_two_tensor_parallel_ranks_see_the_head_of_one() -> None:
    first, second = run_ranks(on_ranks, 2)
    for index, head in enumerate(HEADS):
        model = decoder(network(head, 96, 16, 0.3))
        loss, _ = model(*pairs(96, 128))
        loss.backward()
        whole = model.model.embed_tokens.weight.grad.square().sum().item()
        assert first[index][0] == pytest.approx(loss.item(), rel=1e-5) == pytest.approx(second[index][0], rel=1e-5)
        assert first[index][1] + second[index][1] == pytest.approx(whole, rel=1e-4)
