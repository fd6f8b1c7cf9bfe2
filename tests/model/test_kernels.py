"""Every backend against the definition of attention: values, gradients, dtypes, documents, compilation, memory."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from model import dispatch, flash, flex, kernels, squares, strips
from model.heads import Heads, reference
from model.positions import Documents, pack


def heads(S, far=True, B=2, n=4, k=2, H=8, Hv=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(count, width):
        return torch.randn(B, S, count, width, dtype=dtype, generator=generator).requires_grad_()

    parts = [make(n, H), make(k, H), make(k, Hv)]
    return Heads(*parts, *((make(n, H), make(k, H)) if far else ()))


def tensors(h):
    return [x for x in (h.near_q, h.near_k, h.v, h.far_q, h.far_k) if x is not None]


def error(attend, h, window, documents=None):
    """Largest difference to the definition, of outputs and of all gradients."""
    want, _ = reference(h, 0.3, window, documents)
    got = attend(h, 0.3, window, documents)
    probe = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    pairs = [(got, want), *zip(torch.autograd.grad(got, tensors(h), probe), torch.autograd.grad(want, tensors(h), probe))]
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def packed(*bounds):
    return Documents(torch.tensor(bounds, dtype=torch.int32))


@settings(max_examples=20, deadline=None)
@given(S=st.integers(2, 150), window=st.integers(1, 149), far=st.booleans(), by_strips=st.booleans(), data=st.data())
def test_cpu_is_exact_for_every_length_window_and_packing(S, window, far, by_strips, data):
    window = min(window, S - 1)
    cuts = data.draw(st.lists(st.integers(1, 2 * S - 1), max_size=4))
    documents = packed(*sorted({0, S, 2 * S, *cuts})) if cuts else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "STRIPS_UP_TO", 512 if by_strips else 0)
        assert error(kernels.attend, heads(S, far), window, documents) < 1e-12


def test_documents_with_one_region():
    assert error(kernels.attend, heads(60, far=False), None, packed(0, 7, 8, 60, 120)) < 1e-12


def test_plain_rows_with_narrow_values():
    assert error(kernels.attend, heads(33, far=False), None) < 1e-12


def test_merging_by_autograd_would_be_wrong():
    """The trap that this design avoids: torch's kernel drops the gradient of its log-sum-exp without a word."""
    h, w = heads(64, Hv=8, n=2, k=2), 16

    def merged(h, scale, window, documents):
        rows, keys = slice(w, None), slice(0, 64 - w)
        distance = torch.arange(64)[:, None] - torch.arange(64)
        mask = torch.zeros(64, 64, dtype=h.v.dtype).masked_fill((distance < 0) | (distance >= w), float("-inf"))
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        near, lse = op(*(x.transpose(1, 2) for x in (h.near_q, h.near_k, h.v)), attn_mask=mask, scale=scale)
        far = (h.far_q[:, rows], h.far_k[:, keys], h.v[:, keys])
        more, more_lse = op(*(x.transpose(1, 2) for x in far), is_causal=True, scale=scale)
        total = torch.logaddexp(lse[:, :, w:], more_lse)
        part = near[:, :, w:] * (lse[:, :, w:] - total).exp()[..., None] + more * (more_lse - total).exp()[..., None]
        return torch.cat((near[:, :, :w], part), 2).transpose(1, 2)

    want, _ = reference(h, 0.3, w)
    torch.testing.assert_close(merged(h, 0.3, w, None), want, rtol=0, atol=1e-12)
    wrong = torch.autograd.grad(merged(h, 0.3, w, None).sin().sum(), h.near_q)[0]
    right = torch.autograd.grad(want.sin().sum(), h.near_q)[0]
    ours = torch.autograd.grad(kernels.attend(h, 0.3, w).sin().sum(), h.near_q)[0]
    assert float((wrong - right).norm() / right.norm()) > 0.02
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("S", [200, 700], ids=["strips", "squares"])
def test_bf16_error_is_at_most_twice_that_of_plain_attention(S):
    h = heads(S, B=1, H=64, Hv=64)
    low = Heads(*(x.detach().bfloat16().requires_grad_() for x in tensors(h)))
    exact = Heads(*(x.detach().double().requires_grad_() for x in tensors(low)))
    probe = torch.randn(1, S, 4, 64, dtype=torch.float64).bfloat16()

    def errors(got_heads, want_heads, window):
        got, (want, _) = kernels.attend(got_heads, 0.125, window), reference(want_heads, 0.125, window)
        gradients = torch.autograd.grad(got, tensors(got_heads), probe)
        wanted = torch.autograd.grad(want, tensors(want_heads), probe.double())
        pairs = zip(("out", "dq", "dk", "dv"), (got, *gradients), (want, *wanted))
        return {name: float((a.double() - b).detach().norm() / b.detach().norm()) for name, a, b in pairs}

    plain = errors(low.near(), exact.near(), None)
    for name, value in errors(low, exact, S // 4).items():
        assert value <= 2 * plain[name], (name, value, plain[name])


def test_float32_merge_is_as_good_as_float32():
    h = heads(700, B=1)
    single = Heads(*(x.detach().float() for x in tensors(h)))
    torch.testing.assert_close(kernels.attend(single, 0.3, 100).double(), reference(h, 0.3, 100)[0], rtol=0, atol=5e-6)


def test_compiles_to_one_graph_without_recompiling():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kernels.attend, fullgraph=True, backend=counter)
    for seed in range(3):
        h = heads(90, seed=seed)
        assert error(lambda *a: compiled(*a), h, 20) < 1e-12
    assert counter.frame_count == 1


def test_operator_is_registered_soundly():
    h = heads(70, B=1)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.tiglon.attend, (*tensors(h), None, None, None, None, 20, 0.3, False), test_utils=checks)


def peak_bytes():
    """Peak of resident memory since it was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def grown(call):
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = peak_bytes()
    call()
    return peak_bytes() - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to forget the peak memory")
def test_memory_is_linear_in_length():
    """No matrix of scores: one of 4,096 tokens would be 67 MB a head; the definition needs several."""
    h = heads(4096, B=1, n=1, k=1, H=32, Hv=32, dtype=torch.float32)
    assert grown(lambda: kernels.attend(h, 0.2, 512).sum().backward()) < 40e6
    with torch.no_grad():
        assert grown(lambda: reference(h, 0.2, 512)) > 100e6


class DenseFlash:
    """The operators of torch's GPU flash attention, by definition, so that what surrounds them runs here."""

    @staticmethod
    def _seen(length, bounds, left):
        i = torch.arange(length)
        seen = i[:, None] >= i
        if left is not None:
            seen &= i[:, None] - i <= left
        if bounds is not None:
            document = torch.searchsorted(bounds.long(), i, right=True)
            seen &= document[:, None] == document
        return seen

    @classmethod
    def _scores(cls, q, k, bounds, scale, left):
        k = k.repeat_interleave(q.shape[-2] // k.shape[-2], -2)
        seen = cls._seen(q.shape[-3], bounds, left)
        return (torch.einsum("...inh,...jnh->...nij", q, k) * scale).masked_fill(~seen, float("-inf"))

    @classmethod
    def _flash_attention_forward(cls, q, k, v, bounds, _b, _q, _k, _p, causal, _debug, *, scale, **sides):
        assert causal and q.shape[-1] == v.shape[-1] and sides.get("window_size_right") in (None, 0)
        scores = cls._scores(q, k, bounds, scale, sides.get("window_size_left"))
        v = v.repeat_interleave(q.shape[-2] // v.shape[-2], -2)
        return torch.einsum("...nij,...jnh->...inh", scores.softmax(-1), v), scores.logsumexp(-1), None, None, None

    @classmethod
    def _flash_attention_backward(cls, grad, q, k, v, out, lse, bounds, _b, _q, _k, _p, causal, _s, _u, *, scale, **sides):
        group = q.shape[-2] // k.shape[-2]
        p = (cls._scores(q, k, bounds, scale, sides.get("window_size_left")) - lse[..., None]).exp()
        wide_k, wide_v = (x.repeat_interleave(group, -2) for x in (k, v))
        dot = (grad * out).sum(-1).transpose(-1, -2)[..., None]
        d_scores = p * (torch.einsum("...inh,...jnh->...nij", grad, wide_v) - dot) * scale
        d_q = torch.einsum("...nij,...jnh->...inh", d_scores, wide_k)
        d_k = torch.einsum("...nij,...inh->...jnh", d_scores, q)
        d_v = torch.einsum("...nij,...inh->...jnh", p, grad)
        return d_q, *(x.unflatten(-2, (-1, group)).sum(-2) for x in (d_k, d_v))


@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("bounds", [None, (0, 5, 50, 90, 100)])
def test_gpu_composition_around_the_flash_operators(monkeypatch, bounds, far):
    monkeypatch.setattr(flash, "aten", DenseFlash)
    h = heads(50, far)
    documents = None
    if bounds is not None:
        documents = pack(torch.tensor(bounds, dtype=torch.int32), 13, lists=True)
    with torch.no_grad():
        out, lse = flash.forward(h, 0.3, 13, documents)
        want, want_lse = reference(h, 0.3, 13, documents)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)
        probe = torch.randn_like(out)
        got = flash.backward(probe, h, out, lse, 0.3, 13, documents)
    wanted = torch.autograd.grad(reference(h, 0.3, 13, documents)[0], tensors(h), probe)
    for a, b in zip(tensors(got), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_strips_and_squares_agree_on_the_log_sum_exp():
    h = heads(100, B=1)
    with torch.no_grad():
        _, by_strips = strips.forward(h, 0.3, 17)
        _, by_squares = squares.forward(squares.CpuSquare(), h, 0.3, 17)
    torch.testing.assert_close(by_strips, by_squares, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("bounds", [None, (0, 40, 65, 80, 130)])
@pytest.mark.parametrize("far", [True, False])
def test_flex_masks(bounds, far):
    h = Heads(*(x.detach() for x in tensors(heads(65, far, H=16, Hv=16, dtype=torch.float32))))
    documents = None if bounds is None else packed(*bounds)
    torch.testing.assert_close(flex.attend(h, 0.3, 20, documents), reference(h, 0.3, 20, documents)[0], rtol=0, atol=1e-5)


class DenseCudnn:
    """The operators of cuDNN's attention, by definition: heads before tokens, several query heads to a key head."""

    @staticmethod
    def _lay(*tensors):
        return [x.transpose(1, 2) for x in tensors]

    @classmethod
    def _scaled_dot_product_cudnn_attention(cls, q, k, v, bias, keep, dropout, causal, debug, *, scale):
        assert bias is None and keep and causal and not dropout and not debug
        out, lse, *_ = DenseFlash._flash_attention_forward(
            *cls._lay(q, k, wider(v, q)), None, None, 0, 0, 0.0, True, False, scale=scale
        )
        return out[..., : v.shape[-1]].transpose(1, 2), lse[..., None], *[None] * 7

    @classmethod
    def _scaled_dot_product_cudnn_attention_backward(
        cls, grad, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale
    ):
        assert bias is None and cum_q is None and cum_k is None and causal and max_q == max_k == q.shape[2]
        wide = cls._lay(wider(grad, q), q, k, wider(v, q), wider(out, q))
        d_q, d_k, d_v = DenseFlash._flash_attention_backward(
            *wide, lse[..., 0], None, None, 0, 0, 0.0, True, None, None, scale=scale
        )
        return tuple(cls._lay(d_q, d_k, d_v[..., : v.shape[-1]]))


def wider(x, like):
    return torch.nn.functional.pad(x, (0, like.shape[-1] - x.shape[-1]))


@pytest.mark.parametrize("far", [True, False])
def test_gpu_composition_around_the_cudnn_operators(monkeypatch, far):
    """Four query heads share two key heads, which reach the operators as they are."""
    monkeypatch.setattr(squares, "aten", DenseCudnn)
    h, window = heads(50, far), 13
    with torch.no_grad():
        out, lse = squares.forward(squares.CudnnSquare(), h, 0.3, window)
        want, want_lse = reference(h, 0.3, window)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)
        probe = torch.randn_like(out)
        got = squares.backward(squares.CudnnSquare(), probe, h, out, lse, 0.3, window)
    wanted = torch.autograd.grad(reference(h, 0.3, window)[0], tensors(h), probe)
    for a, b in zip(tensors(got), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("far", [True, False])
def test_the_parts_are_put_together_alike_when_compiled(far):
    """By Inductor, as on a GPU; gradients come from the joined output and log-sum-exp, so they show an error in either."""
    h, window = heads(50, far), 13
    q, k, v, *others = (x.transpose(1, 2).repeat_interleave(4 // x.shape[2], dim=1) for x in tensors(h))
    distance = torch.arange(50)[:, None] - torch.arange(50)
    scores = q @ k.mT
    if far:
        scores = torch.where(distance < window, scores, others[0] @ others[1].mT)
    seen = (distance >= 0) & (far | (distance < window))
    want = ((0.3 * scores).masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(1, 2)
    probe = torch.randn_like(want)
    wanted = torch.autograd.grad(want, tensors(h), probe)
    with torch.no_grad():
        out, lse = squares.forward(squares.CpuSquare(), h, 0.3, window, compiled=True)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        got = squares.backward(squares.CpuSquare(), probe, h, out, lse, 0.3, window)
    for a, b in zip(tensors(got), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def chosen(kind, device="cuda", dtype=torch.bfloat16, width=128, value_width=128, reached=4096, square=64, compiled=False):
    return dispatch.choose(device, dtype, width, value_width, kind, reached, square=square, compiled=compiled)


def test_backends_are_chosen_by_what_serves_and_then_by_the_table(monkeypatch):
    monkeypatch.setattr(dispatch, "cudnn_serves", lambda: True)
    assert chosen("two regions", "cpu") == "cpu" and chosen("two regions", "cpu", compiled=True) == "flash-cpu"
    assert chosen("packed documents", value_width=64) == "flash"
    assert chosen("two regions", width=192) == "cudnn"
    assert chosen("two regions", width=192, square=1) == "flash"
    assert chosen("two regions", dtype=torch.float32) == "flex"
    monkeypatch.setitem(dispatch.FASTEST, ("two regions", False), {0: "flex", 1024: "flash", 4096: "cudnn"})
    assert [chosen("two regions", reached=length) for length in (1023, 1024, 4095, 4096)] == ["flex", "flash", "flash", "cudnn"]
    monkeypatch.setattr(dispatch, "deterministic", lambda: True)
    assert chosen("two regions") == "flash"
    monkeypatch.setattr(dispatch, "deterministic", lambda: False)
    monkeypatch.setattr(dispatch, "cudnn_serves", lambda: False)
    assert chosen("two regions") == chosen("two regions", width=192) == "flash"
    with pytest.raises(ValueError, match="no kernel for device 'mps'"):
        chosen("two regions", "mps")


@pytest.mark.parametrize(("window", "far", "reached"), [(None, False, 64), (16, True, 64), (16, False, 16), (99, False, 64)])
def test_the_table_is_asked_with_the_tokens_that_a_row_sees(window, far, reached):
    assert kernels._reach(heads(64, far), window) == reached


@pytest.mark.parametrize(
    ("version", "capability", "serves"),
    [(91501, (9, 0), True), (91500, (9, 0), False), (91200, (9, 0), False), (None, (9, 0), False), (92000, (8, 0), False)],
)
def test_cudnn_is_asked_where_it_is_right(monkeypatch, version, capability, serves):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert dispatch.cudnn_serves.__wrapped__() == serves


@pytest.mark.parametrize(
    ("S", "window", "square"), [(64, 16, 15), (64, 2, 1), (64, 1, 0), (64, 63, 1), (64, 62, 2), (64, 64, 64), (64, None, 64)]
)
def test_the_smallest_square_is_known_before_the_backend_is_chosen(monkeypatch, S, window, square):
    """As the squares really are: a window of w tokens makes some of w - 1, and one of what is left of the row."""
    asked = []
    monkeypatch.setattr(dispatch, "choose", lambda *_, square, **_k: asked.append(square))
    kernels._backend(heads(S), None, window, False)
    assert asked == [square]
    if window is not None and window < S:
        seen = []

        class Noted(squares.CpuSquare):
            def forward(self, q, k, v, scale):
                seen.append(q.shape[1])
                return super().forward(q, k, v, scale)

        with torch.no_grad():
            squares.forward(Noted(), heads(S), 0.3, window)
        assert min(seen) == max(1, square)


def test_grouped_keys_are_repeated_where_no_kernel_takes_them(monkeypatch):
    """As on a GPU in float32, where torch would form the scores of all pairs."""
    monkeypatch.setattr(kernels, "_takes_groups", lambda v: False)
    h = heads(600, far=False, B=1)
    asked = []
    plainly = torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, v, **options):
        asked.append((q.shape[1], k.shape[1], v.shape[1], options["enable_gqa"]))
        return plainly(q, k, v, **options)

    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", noted)
    assert error(lambda h, scale, window, documents: kernels.plain(h, scale), h, None) < 1e-12
    assert asked == [(4, 4, 4, False)]


@pytest.mark.gpu
@pytest.mark.parametrize("width, value_width", [(64, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize("bounds", [None, (0, 300, 1024, 1500, 2048)])
@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize(("backend", "compiled"), [("flash", False), ("cudnn", False), ("cudnn", True), ("flex", False)])
def test_gpu_against_the_definition(monkeypatch, width, value_width, bounds, far, backend, compiled):
    for key in dispatch.FASTEST:
        monkeypatch.setitem(dispatch.FASTEST, key, {0: backend})
    h = heads(1024, far, H=width, Hv=value_width, k=4 if width == 192 else 2)
    low = Heads(*(x.detach().bfloat16().cuda().requires_grad_() for x in tensors(h)))
    exact = Heads(*(x.detach().double().requires_grad_() for x in tensors(low)))
    documents = None if bounds is None else pack(torch.tensor(bounds, dtype=torch.int32).cuda(), 256, lists=far)
    want, _ = reference(exact, width**-0.5, 256, documents)
    got = kernels.attend(low, width**-0.5, 256, documents, compiled)
    probe = torch.randn_like(got)
    wanted = (want, *torch.autograd.grad(want, tensors(exact), probe.double()))
    for a, b in zip((got, *torch.autograd.grad(got, tensors(low), probe)), wanted, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 1.5e-2


@pytest.mark.gpu
def test_float32_with_grouped_keys_forms_no_matrix_on_a_gpu():
    """The scores of four heads and 8,192 tokens would be 1.1 GB."""
    h = Heads(
        *(x.detach().cuda().requires_grad_() for x in tensors(heads(8192, far=False, B=1, H=64, Hv=64, dtype=torch.float32)))
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels.plain(h, 0.125).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 300e6
