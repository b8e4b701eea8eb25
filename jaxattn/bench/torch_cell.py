"""Cells of PyTorch's attention: fused SDPA kernels, FlexAttention, FlashAttention-4.

B batch, T tokens (queries and keys), N query heads, K kv heads, H head dim; torch's order is
[B, N, T, H]. PyTorch is no dependency: only child processes of PyTorch's cells import this file.
"""

import functools
import importlib.metadata
from collections.abc import Callable

# pyright runs without PyTorch too.
import torch  # pyright: ignore[reportMissingImports]
from torch import Tensor  # pyright: ignore[reportMissingImports]
from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]
from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
    create_block_mask,
    flex_attention,
)
from torch.nn.functional import (  # pyright: ignore[reportMissingImports]
    scaled_dot_product_attention,
)

from jaxattn.bench.harness import Cell, child_fields, milliseconds, report
from jaxattn.bench.shapes import Shape, document_lengths, shape_of

# Queries per slice in the fp32 oracle: its scores take ORACLE_ROWS * T * 4 bytes per head.
ORACLE_ROWS = 4096


def measure(shape: Shape, impl: str, *, check: bool) -> Cell:
    """Measure one cell, as `jaxattn.bench.cell.measure`.

    Returns:
      Also torch, the version; and for SDPA kernel, the name of its fastest kernel.
    """
    if not torch.cuda.is_available():
        return {"why": "PyTorch finds no CUDA GPU"}
    try:
        if impl == "torch-flex":
            cell = _measure(shape, _flex(shape, "cuda"), check)
        elif impl == "torch-fa4":
            cell = _measure(shape, _fa4(shape, "cuda"), check)
            cell["package"] = f"flash-attn-4 {importlib.metadata.version('flash-attn-4')}"
        else:
            cell = _measure_sdpa(shape, check)
    except ImportError:
        return {"why": f"{impl} is not installed (pip install flash-attn-4)"}
    except torch.OutOfMemoryError:
        return {"why": "out of device memory"}
    return cell | {"torch": torch.__version__}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal `scaled_dot_product_attention`, K and V shared by a group of query heads."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def mask_mod(shape: Shape, device: str) -> Callable:
    """Return the mask as FlexAttention's predicate of (batch, head, query, key)."""
    ids = shape.segment_ids()
    ids_BT = None if ids is None else torch.as_tensor(ids, device=device)

    def visible(b, h, i, j):
        allowed = i >= j
        if shape.window is not None:
            allowed = allowed & (i - j < shape.window)
        if ids_BT is not None:
            allowed = allowed & (ids_BT[b, i] == ids_BT[b, j])
        return allowed

    return visible


def oracle(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, visible: Callable
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute o, dq, dk, dv in fp32 by the formulas, one head and a slice of queries at a time."""
    q, k, v, do = (x.float() for x in (q, k, v, do))
    o, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    batch, heads, length, head_dim = q.shape
    group, scale = heads // k.shape[1], head_dim**-0.5
    j = torch.arange(length, device=q.device)
    for b in range(batch):
        for begin in range(0, length, ORACLE_ROWS):
            rows = slice(begin, min(begin + ORACLE_ROWS, length))
            hidden = ~visible(b, 0, j[rows, None], j[None, :])
            for n in range(heads):
                kv = b, n // group
                s = (scale * q[b, n, rows] @ k[kv].T).masked_fill_(hidden, -torch.inf)
                p = s.softmax(dim=-1)
                o[b, n, rows] = p @ v[kv]
                dv[kv] += p.T @ do[b, n, rows]
                delta = (o[b, n, rows] * do[b, n, rows]).sum(dim=-1, keepdim=True)
                ds = scale * p * (do[b, n, rows] @ v[kv].T - delta)
                dq[b, n, rows] = ds @ k[kv]
                dk[kv] += ds.T @ q[b, n, rows]
    return o, dq, dk, dv


def _measure_sdpa(shape: Shape, check: bool) -> Cell:
    """Measure the faster of the fused kernels."""
    if shape.documents is not None or shape.window is not None:
        kind = "document" if shape.documents is not None else "window"
        return {"why": f"SDPA has no {kind} mask but a dense T x T one"}
    cells, refused = [], []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        name = backend.name.removesuffix("_ATTENTION").lower()
        try:
            with sdpa_kernel(backend):
                cells.append(_measure(shape, sdpa, check) | {"kernel": name})
        except RuntimeError as error:  # "No available kernel", with the reason as a warning
            if "No available kernel" not in str(error):
                raise
            refused.append(name)
    if not cells:
        return {"why": f"SDPA has no kernel for it ({', '.join(refused)} refused)"}
    return min(cells, key=lambda cell: cell["both_ms"])


def _flex(shape: Shape, device: str) -> Callable:
    size = shape.length
    batch = None if shape.documents is None else shape.batch
    make = torch.compile(create_block_mask)  # else it builds a dense T x T mask on the way
    blocks = make(mask_mod(shape, device), batch, None, size, size, device=device)
    attend = torch.compile(flex_attention, dynamic=False)
    return functools.partial(attend, block_mask=blocks, enable_gqa=True)


def _fa4(shape: Shape, device: str) -> Callable:
    """Return FlashAttention-4; documents use its variable-length interface, rows concatenated."""
    from flash_attn.cute import (  # pyright: ignore[reportMissingImports]
        flash_attn_func,
        flash_attn_varlen_func,
    )

    settings: dict = {"causal": True}
    if shape.window is not None:
        settings["window_size"] = (shape.window - 1, 0)
    if shape.documents is None:
        run = functools.partial(flash_attn_func, **settings)
    else:
        lengths = document_lengths(shape.length, *shape.documents) * shape.batch
        ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        sizes = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        sizes |= {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
        run = functools.partial(flash_attn_varlen_func, **settings, **sizes)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # It takes [B, T, heads, H], which is the memory layout of `_inputs`, or [B * T, heads, H].
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        if shape.documents is not None:
            rows = [x.flatten(0, 1) for x in rows]
        out = run(*rows)
        out = out[0] if isinstance(out, tuple) else out
        return out.reshape(shape.batch, shape.length, *out.shape[-2:]).transpose(1, 2)

    return attend


def _measure(shape: Shape, attend: Callable, check: bool) -> dict:
    q, k, v, do = _inputs(shape)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward():
        with torch.no_grad():
            return attend(q, k, v)

    def both():
        out = attend(q, k, v)
        return out, *torch.autograd.grad(out, leaves, do)

    def wait(_):
        torch.cuda.synchronize()

    cell: dict = {
        "forward_ms": milliseconds(forward, wait),
        "both_ms": milliseconds(both, wait),
    }
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = both()
    wait(None)
    peak = torch.cuda.max_memory_allocated()
    size = sum(x.nbytes for x in results)
    cell |= {"temp_bytes": peak - before - size, "peak_bytes": peak}
    if check:
        with torch.no_grad():
            wanted = oracle(q, k, v, do, mask_mod(shape, "cuda"))
            cell["errors"] = {}
            for name, got, want in zip(("o", "dq", "dk", "dv"), results, wanted, strict=True):
                error = (got.float() - want).abs()
                cell["errors"][name] = {"max": error.max().item(), "mean": error.mean().item()}
    return cell


def _inputs(shape: Shape) -> list[Tensor]:
    """Draw standard normal q, k, v and gradient of the output, bf16 [B, heads, T, H].

    They are views of arrays [B, T, heads, H].
    """
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(
            (shape.batch, shape.length, n, shape.head_dim),
            generator=generator,
            device="cuda",
            dtype=torch.bfloat16,
        ).transpose(1, 2)
        for n in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    ]


if __name__ == "__main__":
    given = child_fields()
    checked = given.pop("check")
    report(lambda: measure(shape_of(given["shape"]), given["impl"], check=checked), given)
