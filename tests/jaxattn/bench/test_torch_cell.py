"""The bench's PyTorch cells: same attention, same mask, an oracle that agrees with ours."""

import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import eager
from jaxattn.bench.shapes import Shape

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None,
        reason="needs PyTorch: pip install -e '.[torch]'",
    ),
]
SHAPES = {
    "causal": Shape(batch=2, length=70, heads=4, kv_heads=2, head_dim=16),
    "window": Shape(batch=1, length=70, heads=2, kv_heads=2, head_dim=16, window=9),
    "packed": Shape(batch=2, length=70, heads=6, kv_heads=1, head_dim=16, documents=(20.0, 1.0)),
}


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Import PyTorch here: every process that collects this file would need seconds for it."""
    global torch, torch_cell
    import torch

    from jaxattn.bench import torch_cell


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_oracle_is_attention(shape, monkeypatch):
    """o, dq, dk, dv of the fp32 oracle are those of the eager path, for every kind of mask."""
    monkeypatch.setattr(torch_cell, "ORACLE_ROWS", 32)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal((shape.batch, shape.length, n, shape.head_dim), np.float32)
        for n in heads
    ]
    tensors = [torch.as_tensor(x).transpose(1, 2) for x in arrays]
    found = torch_cell.oracle(*tensors, torch_cell.mask_mod(shape, "cpu"))

    def attend(q, k, v):
        return eager.attention(q, k, v, shape.mask(), scale=shape.head_dim**-0.5)

    @jax.jit
    def both(q, k, v, do):
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(do)

    wanted = both(*map(jnp.asarray, arrays))
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got.transpose(1, 2).numpy(), want, atol=2e-5)


def test_sdpa_is_causal_attention_of_groups():
    """The SDPA cell computes causal attention of grouped heads, as the oracle does."""
    shape = SHAPES["causal"]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn((shape.batch, n, shape.length, shape.head_dim), generator=generator)
        for n in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    wanted = torch_cell.oracle(q, k, v, q, torch_cell.mask_mod(shape, "cpu"))[0]
    torch.testing.assert_close(torch_cell.sdpa(q, k, v), wanted)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fa4_is_asked_for_the_shapes_attention(shape, monkeypatch):
    """The window, the ends of documents and the order of axes that FlashAttention-4 is given.

    It runs on GPUs only: a stand-in that reads its arguments as its documentation says computes
    what the oracle does.
    """

    def of_rows(q, k, v, causal, window_size=(None, None)):  # [B, T, heads, H], as it takes them
        assert causal and window_size[1] in (None, 0)
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
        visible = i >= j
        if window_size[0] is not None:
            visible &= i - j <= window_size[0]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch_cell.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        return out.transpose(1, 2), None

    def of_documents(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        ends = cu_seqlens_q.tolist()
        assert ends[-1] == len(q) and max_seqlen_q == max_seqlen_k == max(np.diff(ends))
        parts = [slice(*pair) for pair in zip(ends[:-1], ends[1:], strict=True)]
        out = [of_rows(q[None, p], k[None, p], v[None, p], causal)[0][0] for p in parts]
        return torch.cat(out), None

    module = types.ModuleType("flash_attn.cute")
    module.__dict__.update(flash_attn_func=of_rows, flash_attn_varlen_func=of_documents)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn((shape.batch, shape.length, n, shape.head_dim), generator=generator)
        for n in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    wanted = torch_cell.oracle(q, k, v, q, torch_cell.mask_mod(shape, "cpu"))[0]
    torch.testing.assert_close(torch_cell._fa4(shape, "cpu")(q, k, v), wanted)
