"""The two weights of a tied embedding on the ends of a pipeline: who owns, who copies, and what they exchange."""

import pytest
import torch

from model.parallel.mesh import Mesh, make_mesh
from tests.ranks import run_ranks
from tests.trainer.engines.stages import CPU, decoder
from trainer.engines.tied_embedding import TiedEmbedding


def exchanged(rank: int, world_size: int, pipeline: int, dtype: str) -> tuple[str, list[float], list[float]]:
    """This rank's role, some of the gradient that it has collected, and the first elements of its weight after sharing."""
    mesh = make_mesh(1, CPU, pipeline_parallel_size=pipeline)
    model = decoder("half-swap", mesh, pipeline, getattr(torch, dtype))
    tied = TiedEmbedding(model, mesh)
    role = "owner" if tied.owned is not None else "copy" if tied.copy is not None else "neither"
    gradient = None
    if tied.copy is not None:
        gradient = torch.linspace(0, 1, tied.copy.numel()).view_as(tied.copy) + mesh.data.rank
    received = tied.collect(gradient)
    if received is not None:
        assert received.dtype == torch.float32 and received.shape == model.model.embed_tokens.weight.shape
    if role != "neither":
        model.model.embed_tokens.weight.data.fill_(3.0 if role == "owner" else 5.0)
        model.model.embed_tokens.weight.data[1].fill_(mesh.data.rank)
    tied.share()
    weight = [] if role == "neither" else model.model.embed_tokens.weight.detach()[:2, 0].tolist()
    return role, [] if received is None else received.flatten()[[0, 100, -1]].tolist(), weight


@pytest.mark.parametrize(("ranks", "pipeline"), [(3, 3), pytest.param(4, 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_the_first_stage_owns_and_gets_the_gradient_of_its_own_pipeline_and_the_last_gets_the_weight(
    ranks: int, pipeline: int, dtype: str
) -> None:
    elements, data = 53 * 32, ranks // pipeline
    for rank, (role, gradient, weight) in enumerate(run_ranks(exchanged, ranks, pipeline, dtype)):
        stage, replica = divmod(rank, data)
        assert role == {0: "owner", pipeline - 1: "copy"}.get(stage, "neither")
        assert weight == ([3.0, float(replica)] if role != "neither" else [])
        want = [replica, replica + 100 / (elements - 1), replica + 1]
        assert gradient == (pytest.approx(want, rel=1e-6) if role == "owner" else [])


def of_no_pipeline_or_untied(rank: int, world_size: int) -> list[bool]:
    mesh, found = make_mesh(1, CPU, pipeline_parallel_size=world_size), []
    for tied in (TiedEmbedding(decoder("untied", mesh, world_size), mesh), TiedEmbedding(decoder("plain", Mesh(), 1), Mesh())):
        found.append(tied.owned is None and tied.copy is None and tied.collect(None) is None)
        tied.share()
    return found


def test_nothing_is_shared_without_a_tied_embedding_or_without_a_pipeline() -> None:
    assert run_ranks(of_no_pipeline_or_untied, 2) == [[True, True]] * 2
