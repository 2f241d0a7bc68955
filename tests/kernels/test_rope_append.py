"""RoPE and append in one: vLLM's and Hugging Face's formula, then the bytes that append writes of roped keys."""

import pytest
import torch
from pages import Pages
from stores import DEVICE
from test_paged_append import NEARLY_ALL

from kvarn.errors import ShapeError
from kvarn.paged import append_paged_cpu
from kvarn.rope_ops import rope, rope_append_paged_cpu, rope_append_paged_cuda

ULPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-6}
"""Of a sum of two products: fused or not, the last bit may differ."""
HEADS = 6


def table(rotary, dtype, length=400):
    """cos and sin of every position and pair, as vLLM keeps them."""
    angles = torch.arange(length)[:, None] / 100 ** (torch.arange(0, rotary, 2) / rotary)
    return torch.cat([angles.cos(), angles.sin()], -1).to(dtype)


def complex_rope(x, positions, angles, neox):
    """The embedding as its paper has it: a pair of channels is a complex number, multiplied by one of length 1."""
    rotary = angles.shape[1]
    turn = torch.complex(*angles[positions].double().chunk(2, -1))[:, None]
    pairs = x[..., :rotary].double().unflatten(-1, (2, -1) if neox else (-1, 2))
    a, b = pairs.unbind(-2 if neox else -1)
    turned = torch.view_as_real(torch.complex(a, b) * turn)
    turned = turned.transpose(-1, -2).flatten(-2) if neox else turned.flatten(-2)
    return torch.cat([turned, x[..., rotary:].double()], -1)


def close(x, reference, dtype):
    return bool(((x.cpu().double() - reference).abs() <= ULPS[dtype] * (1 + reference.abs())).all())


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary", [64, 32, 12])
def test_the_formula(rotary, neox):
    x, positions, angles = torch.randn(9, 2, 64), torch.randint(400, (9,)), table(rotary, torch.float32)
    found = rope(x, positions, angles, neox)
    assert found.is_contiguous()
    assert close(found, complex_rope(x, positions, angles, neox), torch.float32)
    assert found[..., rotary:].equal(x[..., rotary:])
    assert not close(found, complex_rope(x, positions, angles, not neox), torch.float32)


def test_hugging_faces_llama():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, positions = torch.randn(9, 3, 64), torch.randn(9, 1, 64), torch.randint(400, (9,))
    angles = table(64, torch.float32)
    cos, sin = (torch.cat([x, x], -1) for x in angles[positions].chunk(2, -1))
    for x, expected in zip((q, k), modeling.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1), strict=True):
        assert rope(x, positions, angles, True).equal(expected)


class Roped(Pages):
    """Twin paged stores, one written by the CPU's ops, one by the fused kernels."""

    def step(self, counts, rotary, neox, padding=0, max_count=None):
        """Append a step to both; check the roped q and k. q, k, v are slices of one matrix."""
        k, v = self.new(counts)
        n, heads, dim = k.shape
        qkv = torch.randn(n + padding, HEADS + 2 * heads, dim, generator=torch.Generator().manual_seed(self.seed))
        qkv = qkv.to(self.dtype)
        qkv[:n, HEADS : HEADS + heads], qkv[:n, HEADS + heads :] = k, v
        positions = torch.randint(400, (n + padding,), generator=torch.Generator().manual_seed(self.seed))
        where, angles = (*self.where(counts), self.balance), table(rotary, self.dtype)
        most = max(counts) if max_count is None else max_count
        before = qkv.clone()
        own = qkv.to(DEVICE)
        found = rope_append_paged_cuda(
            *own.split((HEADS, heads, heads), 1), positions.to(DEVICE), angles.to(DEVICE), neox, self.gpu,
            *(x.to(DEVICE) for x in where), most, self.spec.key)
        assert own.cpu().equal(before)
        for x, plain in zip(found, qkv.split((HEADS, heads, heads), 1), strict=False):
            assert close(x, complex_rope(plain, positions, angles, neox), self.dtype)
        append_paged_cpu(found[1].cpu()[:n], v, self.cpu, *where, self.spec.key)

    def differ(self):
        return float((self.gpu.cpu() != self.cpu).double().mean())


CASES = [(64, True), (32, True), (24, False)]
STEPS = {"decodes over an edge": [(126, 61, 60), (1, 1, 1), (1, 1, 1), (1, 0, 1)],
         "a few tokens over an edge": [(120, 125, 50), (5, 4, 6), (5, 0, 9), (20, 90, 17)],
         "a prompt beside decodes": [(100, 20, 127), (1, 300, 1)]}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("rotary, neox", CASES)
def test_the_bytes_of_an_append_of_roped_keys(name, rotary, neox):
    pages = Roped("k4v2_g128", 64, torch.float16, padded=256)
    before = pages.cpu.clone()
    for counts in STEPS[name]:
        pages.step(counts, rotary, neox, padding=3)
        assert pages.differ() < NEARLY_ALL
        untouched = (pages.cpu == before).flatten(1).all(1)
        assert untouched.any() and pages.gpu.cpu()[untouched].equal(before[untouched])


def test_one_launch_and_two_write_the_same():
    one, two = (Roped("k4v2_g128", 64, torch.float16) for _ in range(2))
    for counts in ((120, 127, 3), (30, 1, 100)):
        one.step(counts, 64, True, max_count=127)
        two.step(counts, 64, True, max_count=128)
    assert (one.gpu != two.gpu).double().mean() < NEARLY_ALL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lossless_keeps_every_bit(dtype):
    pages = Roped("k16v16", 48, dtype, padded=64)
    for counts in ((127, 1, 3), (1, 128, 3), (1, 1, 130)):
        pages.step(counts, 32, True, padding=2)
        assert pages.gpu.cpu().equal(pages.cpu)


def test_a_row_without_tokens_may_have_any_length():
    pages = Roped("k4v2_g128", 64, torch.float16)
    pages.step((127, 0, 0), 64, True)
    pages.where = lambda counts: (lambda t, s, e: (t, s, torch.where(s.diff() > 0, e, 2**31 - 1)))(
        *Pages.where(pages, counts))
    pages.step((1, 0, 0), 64, True, padding=40)
    assert pages.differ() < NEARLY_ALL


def test_the_cpu_op_is_rope_then_append():
    pages = Pages("k4v2_g128", 64, torch.float16)
    k, v = pages.new((130, 1, 0))
    q, positions, angles = torch.randn(131, 4, 64).half(), torch.arange(131), table(64, torch.float16)
    where = (*pages.where((130, 1, 0)), pages.balance)
    twin = pages.cpu.clone()
    found = torch.ops.kvarn.rope_append_paged(q, k, v, positions, angles, True, pages.cpu, *where, 130, pages.spec.key)
    expected = [rope(x, positions, angles, True) for x in (q, k)]
    append_paged_cpu(expected[1], v, twin, *where, pages.spec.key)
    assert all(x.equal(y) for x, y in zip(found, expected, strict=True)) and pages.cpu.equal(twin)
    torch.library.opcheck(
        torch.ops.kvarn.rope_append_paged, (q, k, v, positions, angles, True, pages.cpu, *where, 130, pages.spec.key),
        test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", [rope_append_paged_cpu, rope_append_paged_cuda])
def test_refusals_name_what_is_valid(op):
    pages = Pages("k4v2_g128", 64, torch.float16, rows=1)
    k, v = (x.to(DEVICE) for x in pages.new((3,)))
    where = [x.to(DEVICE) for x in (*pages.where((3,)), pages.balance)]
    angles, positions = table(64, torch.float16).to(DEVICE), torch.arange(3, device=DEVICE)
    cache = pages.gpu
    with pytest.raises(ShapeError, match="positions"):
        op(k, k, v, positions[:2], angles, True, cache, *where, 3, pages.spec.key)
    with pytest.raises(ShapeError, match="angles"):
        op(k, k, v, positions, torch.cat([angles, angles], 1), True, cache, *where, 3, pages.spec.key)
    with pytest.raises(ShapeError, match="valid"):
        op(k, k[:, :1], v[:, :1], positions, angles, True, cache, *where, 3, pages.spec.key)
