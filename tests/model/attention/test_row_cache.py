"""Rows in chunks give what one pass over them gives, for every map, kind and document; and what is kept of them."""

from itertools import product
from pathlib import Path

import pytest
import torch

from model.attention.row_cache import LayerReach, RowCache, cached_tokens
from model.attention.sliding_window import LayerPositions
from model.parallel.context import WHOLE_SEQUENCES, ContextParallel
from model.parallel.mesh import make_mesh
from model.positions.batch import TokenLayout
from model.positions.config import PositionConfig
from tests.model.attention.kernels.test_operator import peak_growth
from tests.model.attention.test_kv_cache import KINDS, LENGTH, OWN_BASE, UNROTATED, make
from tests.model.oracle import MAPS, TRAINED
from tests.ranks import run_ranks

BOUNDARIES = [
    [0, 3, 19, 33, 40, 80],  # of two rows of 40 tokens; one document is the whole second row
    [0, 40, 41, 56, 57, 64, 80],
]
CHUNKS = [[13, 13, 13, 1], [16, 16, 8], [5] * 8]
"""Across windows of 5 and 8 tokens, and shorter than those."""


def tokens_of_rows(length=LENGTH):
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1))


def cache_for(decoder, length=LENGTH, documents=None, batch=2, context=WHOLE_SEQUENCES):
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    rows = TokenLayout(batch, length, cu_seqlens)
    return RowCache(decoder.config, decoder.position, TRAINED, rows, context)


@torch.no_grad()
def in_chunks(decoder, tokens, chunks, documents=None, context=WHOLE_SEQUENCES):
    """Logits, and the elements that each layer keeps of all chunks but the last."""
    cache = cache_for(decoder, tokens.shape[1], documents, tokens.shape[0], context)
    logits = torch.cat([decoder(part, cache=cache) for part in tokens.split(chunks, dim=1)], dim=1)
    return logits, [layer.elements() for layer in cache.layers]


@pytest.mark.parametrize("documents", [None, *BOUNDARIES], ids=["rows", "documents", "a document of a whole row"])
@pytest.mark.parametrize(
    "position, kind",
    [
        *product(MAPS, KINDS),
        *product(OWN_BASE, ["hwfa", "hwfa2"]),
        *product(["yarn-factors", "rerope-logn", "leaky"], UNROTATED),
    ],
)
def test_chunks_are_the_row(position, kind, documents):
    decoder = make((MAPS | OWN_BASE)[position], **(KINDS | UNROTATED)[kind])
    tokens, cu_seqlens = tokens_of_rows(), None if documents is None else torch.tensor(documents, dtype=torch.int32)
    with torch.no_grad():
        whole = decoder(tokens, cu_seqlens=cu_seqlens)
    for chunks in CHUNKS:
        torch.testing.assert_close(in_chunks(decoder, tokens, chunks, documents)[0], whole, rtol=0, atol=1e-12)


def shared(rank, world_size, cases):
    """Largest difference to one pass on one rank, and the elements that this rank keeps, of each case."""
    mesh, found = make_mesh(1, torch.device("cpu"), context_parallel_size=world_size), []
    context = ContextParallel(world_size, rank, mesh.context.group)
    for position, kind, documents in cases:
        decoder, tokens = make(MAPS[position], **KINDS[kind]), tokens_of_rows()
        with torch.no_grad():
            whole = decoder(tokens, cu_seqlens=None if documents is None else torch.tensor(documents, dtype=torch.int32))
        logits, elements = in_chunks(decoder, tokens, [6] * 6 + [4], documents, context)
        found.append((float((logits - whole).abs().max()), elements))
    return found


def test_context_ranks_divide_the_earlier_chunks():
    """Six of six tokens are earlier; ranks 0 and 1 of four have two of them, the others one."""
    cases = [*product(["rope", "rerope-logn"], ["gqa", "mla", "hwfa"], [None, BOUNDARIES[0]])]
    for ranks, kept in ((2, [18, 18]), (4, [12, 12, 6, 6])):
        for rank, results in enumerate(run_ranks(shared, ranks, cases)):
            for (position, kind, _), (error, elements) in zip(cases, results, strict=True):
                assert error < 1e-12
                if position == "rope":
                    width = {"gqa": 2 * 2 * 8, "mla": 12 + 4, "hwfa": 2 * 4 * 8}[kind]
                    assert elements == [2 * width * (4 if kind == "hwfa" else kept[rank]), 2 * width * kept[rank]]


@pytest.mark.parametrize("position, window", [("rope", 1), ("rerope-logn", 7)])
@pytest.mark.parametrize("kind", ["gqa", "mla", "hwfa2"])
def test_what_is_kept_is_what_is_said(position, window, kind):
    """GQA 2 * kv heads * H per token, MLA latent and shared key; of windows the last window - 1 tokens, beside the rest where a
    map has two regions."""
    decoder, chunk = make(MAPS[position], **KINDS[kind]), 7
    width = decoder.blocks[0].self_attn.cached_width(decoder.config, 1)
    assert width == {"gqa": 2 * 2 * 8, "mla": 12 + 4, "hwfa2": 2 * 4 * 8}[kind]
    _, elements = in_chunks(decoder, tokens_of_rows(), chunk)
    reaches = [LayerReach.of(LayerPositions(decoder.config, layer), decoder.position, LENGTH) for layer in range(2)]
    full = LayerReach(window - 1, True)
    assert reaches == [LayerReach(4, False) if kind == "hwfa2" else full, full]
    assert elements == [2 * width * reach.cached_tokens(LENGTH, chunk) for reach in reaches]
    assert elements[1] == 2 * width * (35 + window - 1)
    assert cached_tokens(decoder.config, decoder.position, LENGTH, chunk) == [count / 2 / width for count in elements]


def test_chunks_that_do_not_follow_are_an_error():
    decoder = make(MAPS["rope"])
    with pytest.raises(ValueError, match="a chunk of 2 rows of 41 tokens cannot follow 0 tokens of 2 rows of 40"):
        decoder(tokens_of_rows(41), cache=cache_for(decoder))
    with pytest.raises(ValueError, match="a chunk of 1 rows of 4 tokens cannot follow"):
        decoder(tokens_of_rows(4)[:1], cache=cache_for(decoder))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak memory")
@pytest.mark.parametrize("kind", ["gqa", "mla"])
@pytest.mark.parametrize(
    "position", [PositionConfig(), PositionConfig(kind="leaky-rerope", window=100, leak=4.0)], ids=["rope", "leaky"]
)
def test_memory_grows_by_the_cache_alone(position, kind):
    """Four times the row at the same chunk. In one forward its activations alone would grow by more."""
    decoder = make(position, num_hidden_layers=1, intermediate_size=2048, **KINDS[kind])
    targets = {length: tokens_of_rows(length)[:1] for length in (2048, 8192)}

    def run(length, chunk):
        with torch.no_grad():
            cache = cache_for(decoder, length, batch=1)
            for part in targets[length].split(chunk, dim=1):
                decoder(part, part, cache=cache)

    for length in targets:
        run(length, 256)  # makes the rotary caches
    short, long = (peak_growth(lambda length=length: run(length, 256)) for length in targets)
    kept = 8 * decoder.blocks[0].self_attn.cached_width(decoder.config, 1) * (8192 - 2048)
    assert long - short < 1.5 * kept + 16e6
    assert peak_growth(lambda: run(8192, 8192)) > 8192 * 2048 * 8


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [None, BOUNDARIES[0]], ids=["rows", "documents"])
@pytest.mark.parametrize("kind", ["gqa", "mla", "hwfa2"])
@pytest.mark.parametrize("position", ["rope", "rerope-logn"])
def test_on_a_gpu(position, kind, documents):
    """Heads of 8 channels are computed by flash kernels, MLA's of 10 by others."""
    decoder = make(MAPS[position], **KINDS[kind]).to("cuda", torch.bfloat16)
    tokens, cu_seqlens = tokens_of_rows().cuda(), None if documents is None else torch.tensor(documents, dtype=torch.int32)
    with torch.no_grad():
        whole = decoder(tokens, cu_seqlens=cu_seqlens).double()
    for chunks in CHUNKS:
        found = in_chunks(decoder, tokens, chunks, documents)[0].double()
        assert float((found - whole).norm() / whole.norm()) < 3e-2
