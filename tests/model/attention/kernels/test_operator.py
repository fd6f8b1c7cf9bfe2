"""The operators against the definition of attention: dtypes, compilation, registration, memory, and every backend of a GPU."""

import ctypes
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from model.attention.kernels import dispatch, operator
from model.attention.kernels.reference import reference_attention
from model.positions.packing import documents_before, pack_documents
from tests.model.attention.kernels.cases import CHUNKS, chunk, error, random_inputs


@pytest.mark.parametrize("S", [200, 700], ids=["tiles", "three calls"])
def test_bf16_error_is_at_most_twice_that_of_plain_attention(S):
    low = random_inputs(S, B=1, H=64, Hv=64).map(lambda x: x.detach().bfloat16().requires_grad_())
    exact = low.map(lambda x: x.detach().double().requires_grad_())
    probe = torch.randn(1, S, 4, 64, dtype=torch.float64).bfloat16()

    def errors(low_inputs, exact_inputs, window):
        got, (want, _) = operator.attend(low_inputs, 0.125, window), reference_attention(exact_inputs, 0.125, window)
        gradients = torch.autograd.grad(got, low_inputs.tensors(), probe)
        wanted = torch.autograd.grad(want, exact_inputs.tensors(), probe.double())
        pairs = zip(("out", "dq", "dk", "dv"), (got, *gradients), (want, *wanted))
        return {name: float((a.double() - b).detach().norm() / b.detach().norm()) for name, a, b in pairs}

    plain = errors(low.near(), exact.near(), None)
    for name, value in errors(low, exact, S // 4).items():
        assert value <= 2 * plain[name], (name, value, plain[name])


def test_float32_merge_is_as_good_as_float32():
    inputs = random_inputs(700, B=1)
    single = operator.attend(inputs.map(lambda x: x.detach().float()), 0.3, 100)
    torch.testing.assert_close(single.double(), reference_attention(inputs, 0.3, 100)[0], rtol=0, atol=5e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("far", "window"), [(False, None), (True, 20), (False, 20)])
@pytest.mark.parametrize("S", [40, 300, 700])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_with_its_log_sum_exp_attention_has_the_same_bits_on_a_cpu(dtype, S, far, window, compiled):
    inputs = random_inputs(S, far, H=16, Hv=16, dtype=dtype)
    plain = operator.attend(inputs, 0.3, window, None, compiled)
    out, lse = operator.attend_with_lse(inputs, 0.3, window, None, compiled)
    gradients = (torch.autograd.grad(result.sin().sum(), inputs.tensors()) for result in (plain, out))
    assert torch.equal(out, plain) and all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    _, want = reference_attention(inputs.map(lambda x: x.detach().double()), 0.3, window)
    assert not lse.requires_grad and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    atol = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-4}[dtype]  # torch's kernel rounds bf16 scores
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=atol)


@pytest.mark.parametrize("boundaries", [None, (0, 50, 90, 180)])
def test_compiles_to_one_graph_without_recompiling(boundaries):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operator.attend, fullgraph=True, backend=counter)
    documents = None
    if boundaries is not None:
        documents = pack_documents(torch.tensor(boundaries, dtype=torch.int32), 20, lists=True)
    for seed in range(3):
        assert error(compiled, random_inputs(90, seed=seed), 20, documents) < 1e-12
    assert counter.frame_count == 1


@pytest.mark.parametrize("S", [90, 600])
def test_with_its_log_sum_exp_it_compiles_to_one_graph(S):
    torch._dynamo.reset()
    inputs = random_inputs(S, far=False)
    out, lse = torch.compile(operator.attend_with_lse, fullgraph=True, backend="aot_eager")(inputs, 0.3)
    for got, want in zip((out, lse), reference_attention(inputs, 0.3), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("boundaries", [None, (0, 30, 70)], ids=["rows", "documents"])
@pytest.mark.parametrize("queries", [70, 25])
def test_operator_is_registered_soundly(far, boundaries, queries):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs, documents = chunk(70, queries, far, 20, boundaries, B=1)
    arguments = (inputs.tensors(), [] if documents is None else documents.tensors(), 20, 0.3, False)
    torch.library.opcheck(torch.ops.tiglon.causal_attention, arguments, test_utils=checks)


def test_a_row_within_the_window_has_zero_gradients_of_its_far_parts():
    inputs = random_inputs(10)
    gradients = torch.autograd.grad(operator.attend(inputs, 0.3, 10).sum(), inputs.tensors())
    assert [bool(gradient.any()) for gradient in gradients] == [True, True, True, False, False]


@pytest.mark.parametrize("case", CHUNKS)
def test_chunks_with_the_keys_before_them_are_the_row(case):
    """Two chunks of a row, each with the keys up to its end, give its outputs and, summed, its gradients."""
    far, window, boundaries = CHUNKS[case]
    whole, documents = chunk(700, 700, far, window, boundaries)
    want, outs = operator.attend(whole, 0.3, window, documents), []
    for start, end in ((0, 330), (330, 700)):
        inputs = whole.part(slice(None), slice(start, end), slice(0, end))
        if boundaries is not None:
            cut = documents_before(torch.tensor(boundaries), 700, end)
            documents = pack_documents(cut, window, lists=True, keys=end, queries=end - start)
        outs.append(operator.attend(inputs, 0.3, window, documents))
    got, probe = torch.cat(outs, dim=1), torch.randn(want.shape, dtype=want.dtype)
    gradients, wanted = (torch.autograd.grad(out, whole.tensors(), probe) for out in (got, want))
    for one, other in zip((got, *gradients), (want, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CHUNKS)
def test_a_key_that_no_query_sees_has_no_gradient_at_all(case):
    """Exactly zero, and no more keys than those: of the last 5 of 700 tokens."""
    far, window, boundaries = CHUNKS[case]
    inputs, documents = chunk(700, 5, far, window, boundaries)
    attentions = operator.attend(inputs, 0.3, window, documents), reference_attention(inputs, 0.3, window, documents)[0]
    got, want = (torch.autograd.grad(out.sin().sum(), inputs.tensors()) for out in attentions)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.abs().amax(dim=(2, 3)) > 0, other.abs().amax(dim=(2, 3)) > 0)


def test_the_last_tokens_of_rows_compile_to_one_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operator.attend, fullgraph=True, backend=counter)
    for boundaries in ((0, 50, 90, 180), (0, 10, 90, 140, 160, 180)):
        inputs, documents = chunk(90, 30, True, 20, boundaries)
        documents.mark_dynamic()
        assert error(compiled, inputs, 20, documents) < 1e-12
    assert counter.frame_count == 1


def test_more_queries_than_keys_are_an_error():
    inputs = random_inputs(9)
    with pytest.raises(ValueError, match="9 queries and 5 keys in a row"):
        operator.attend(inputs.part(slice(None), slice(None), slice(0, 5)), 0.3, 2)


def peak_bytes():
    """Peak of resident memory since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peak_growth(call):
    """Bytes by which the peak of resident memory grows in a call."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else what earlier tests have freed is resident already, and a call may take it
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_bytes()
    call()
    return peak_bytes() - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak memory")
def test_memory_is_linear_in_length():
    """No matrix of scores: one of 4,096 tokens would be 67 MB per head; the definition needs several."""
    inputs = random_inputs(4096, B=1, n=1, k=1, H=32, Hv=32, dtype=torch.float32)
    assert peak_growth(lambda: operator.attend(inputs, 0.2, 512).sum().backward()) < 40e6
    with torch.no_grad():
        assert peak_growth(lambda: reference_attention(inputs, 0.2, 512)) > 100e6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak memory")
def test_memory_of_the_last_tokens_is_that_of_a_tile():
    """The scores of 64 queries and 8,192 keys are 2 MB, and those of all 1,024 queries 34 MB."""
    inputs = random_inputs(8192, B=1, n=1, k=1, H=32, Hv=32, dtype=torch.float32, queries=1024)
    assert peak_growth(lambda: operator.attend(inputs, 0.2, 512).sum().backward()) < 30e6
    with torch.no_grad():
        assert peak_growth(lambda: reference_attention(inputs, 0.2, 512)) > 60e6


@pytest.mark.gpu
@pytest.mark.parametrize("width, value_width", [(64, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize("boundaries", [None, (0, 300, 1024, 1500, 2048)])
@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize(("backend", "compiled"), [("flash", False), ("cudnn", False), ("cudnn", True), ("flex", False)])
def test_gpu_against_the_definition(monkeypatch, width, value_width, boundaries, far, backend, compiled):
    for key in dispatch.FASTEST:
        monkeypatch.setitem(dispatch.FASTEST, key, {0: backend})
    inputs = random_inputs(1024, far, H=width, Hv=value_width, k=4 if width == 192 else 2)
    low = inputs.map(lambda x: x.detach().bfloat16().cuda().requires_grad_())
    exact = low.map(lambda x: x.detach().double().requires_grad_())
    documents = None
    if boundaries is not None:
        documents = pack_documents(torch.tensor(boundaries, dtype=torch.int32).cuda(), 256, lists=far)
    want, _ = reference_attention(exact, width**-0.5, 256, documents)
    got = operator.attend(low, width**-0.5, 256, documents, compiled)
    probe = torch.randn_like(got)
    wanted = (want, *torch.autograd.grad(want, exact.tensors(), probe.double()))
    for a, b in zip((got, *torch.autograd.grad(got, low.tensors(), probe)), wanted, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 1.5e-2


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 5, 100])
@pytest.mark.parametrize("case", CHUNKS)
@pytest.mark.parametrize("backend", ["flash", "flex"])
def test_gpu_of_the_last_tokens_against_the_definition(monkeypatch, case, queries, backend):
    for key in dispatch.FASTEST:
        monkeypatch.setitem(dispatch.FASTEST, key, {0: backend})
    far, window, boundaries = CHUNKS[case]
    inputs, documents = chunk(700, queries, far, window, boundaries, H=64, Hv=64)
    low = inputs.map(lambda x: x.detach().bfloat16().cuda().requires_grad_())
    exact = low.map(lambda x: x.detach().double().requires_grad_())
    documents = None if documents is None else documents.to(torch.device("cuda"))
    want, want_lse = reference_attention(exact, 0.125, window, documents)
    got, lse = operator.attend_with_lse(low, 0.125, window, documents)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-2)
    probe = torch.randn_like(got)
    wanted = (want, *torch.autograd.grad(want, exact.tensors(), probe.double()))
    gradients = torch.autograd.grad(got, low.tensors(), probe, allow_unused=True, materialize_grads=True)
    for a, b in zip((got, *gradients), wanted, strict=True):
        assert float((a.double() - b).norm()) <= 1.5e-2 * float(b.norm())
