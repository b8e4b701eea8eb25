"""The attention interface: choice of implementation, argument checks, sharding."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxattn import (
    ALIASES,
    IMPLEMENTATIONS,
    Mask,
    api,
    attention,
    describe,
    device,
    prepare,
    resolve,
)
from jaxattn.pallas.wgmma import tiles as wgmma_tiles
from jaxattn.pallas.wgmma.tiles import rule_tiles
from tests.jaxattn.interpret import hopper, interpreted
from tests.jaxattn.oracle import random_problem

pytestmark = pytest.mark.usefixtures("compile_quickly")

CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what holds on a CPU")


def _qkv(b=2, t=16, s=16, n=4, k=2, h=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(b, t, n, h)), dtype)
    kk, v = (jnp.asarray(rng.normal(size=(b, s, k, h)), dtype) for _ in range(2))
    return q, kk, v


@pytest.mark.parametrize("impl", ["eager", "xla"])
@pytest.mark.parametrize("spec", [("d", None), ("d", "m"), (None, "m")])
@pytest.mark.parametrize("blocks", [None, (2, 2), (4, 2, 2)], ids=["", "blocks", "blocks by row"])
def test_sharded_equals_unsharded(impl, spec, blocks):
    """Batch and heads split over 8 devices: same output, same gradients.

    A block pattern for all rows lies on every device, one for each row is split as the rows are.
    """
    t = 16 if blocks is None else 160
    q, k, v = _qkv(b=4, t=t, s=t, n=8, k=4)
    ids = jnp.asarray(np.repeat([[1, 1, 2, 2, 2, 3, 3, 0]], 4, 0).repeat(t // 8, 1), jnp.int32)
    if blocks is not None:
        blocks = jnp.asarray(np.random.default_rng(1).random(blocks) < 0.6)
    mask = Mask(segment_ids=ids, blocks=blocks)

    def loss(q, k, v, mask):
        out = attention(q, k, v, mask, impl=impl)
        return (out * out).sum()

    want = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v, mask)
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        bnh = NamedSharding(mesh, PartitionSpec(spec[0], None, spec[1], None))
        rows = NamedSharding(mesh, PartitionSpec(spec[0], None))
        args = [jax.device_put(x, bnh) for x in (q, k, v)]
        if blocks is not None and blocks.ndim == 3:
            blocks = jax.device_put(blocks, NamedSharding(mesh, PartitionSpec(spec[0])))
        sharded_mask = Mask(segment_ids=jax.device_put(ids, rows), blocks=blocks)
        got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args, sharded_mask)
    for w, g in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=1e-5, atol=1e-5)


def _split_rows(sizes, n=8, k=2, dtype=jnp.float32, b=2, t=48, h=8):
    """Make (q, k, v, mask) whole, and split over a mesh of (d, s, m) with T over s; and the mesh.

    Documents begin and end anywhere, and a row ends in padding.
    """
    args = _qkv(b=b, t=t, s=t, n=n, k=k, h=h, dtype=dtype)
    ids = np.sort(np.random.default_rng(2).integers(1, 4, (b, t)), axis=1)
    ids[0, -3:] = 0
    mesh = jax.make_mesh(sizes, ("d", "s", "m"), axis_types=(AxisType.Explicit,) * 3)
    where = NamedSharding(mesh, PartitionSpec("d", "s", "m", None))
    rows = NamedSharding(mesh, PartitionSpec("d", "s"))
    whole = (*args, Mask(segment_ids=jnp.asarray(ids, jnp.int32)))
    with jax.set_mesh(mesh):
        parts = [jax.device_put(x, where) for x in args]
        return whole, (*parts, jax.device_put(whole[3], rows)), mesh


def _loss_and_gradients(args, impl, mesh=None, **options):
    """Of the output, and of the log-sum-exp where there is one; also the compiled program."""

    def loss(q, k, v, mask):
        if mesh is not None:
            mask = prepare(mask, q, k, impl=impl)
        out, lse = attention(q, k, v, mask, impl=impl, return_lse=True, **options)
        return (out.astype(jnp.float32) ** 2).sum() + jnp.tanh(lse).sum(where=jnp.isfinite(lse))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        compiled = run.lower(*args).compile()
        return jax.tree.map(np.asarray, compiled(*args)), compiled.as_text()


@functools.cache
def _of_one_device(n, k):
    whole, _, _ = _split_rows((1, 1, 1), n, k)
    return _loss_and_gradients(whole, "eager")[0]


@pytest.mark.parametrize(
    ("impl", "sizes", "heads"),
    [
        ("xla", (1, 2, 1), (8, 2)),
        ("eager", (1, 8, 1), (8, 2)),  # each kv head is repeated for the 4 devices that use it
        ("eager", (2, 2, 2), (8, 2)),
        ("xla", (1, 3, 2), (12, 4)),  # 2 of 12 query heads, in groups of 3, on a device
    ],
)
def test_sharded_positions_are_exchanged_for_heads(impl, sizes, heads):
    """T over 2, 3 and 8 devices, beside batch and heads: same output, log-sum-exp, gradients.

    The exchange is all-to-all, there and back; what is gathered are segment ids.
    """
    _, parts, mesh = _split_rows(sizes, *heads)
    want = _of_one_device(*heads)
    got, program = _loss_and_gradients(parts, impl, mesh, deterministic=True)
    for w, g in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
    assert program.count(" all-to-all(") >= 8
    assert set(re.findall(r"= (\w+)\[\S* all-gather\(", program)) == {"s32"}


def sharded_positions() -> None:
    """Compare the kernels on two devices, with a plan for the heads of each, with the einsum."""
    from jax._src.pallas.mosaic_gpu.interpret.shared_memory import GPUSharedMemory

    # A device that is done finds the barriers of the other one.
    if hasattr(GPUSharedMemory, "assert_no_barriers_allocated"):
        GPUSharedMemory.assert_no_barriers_allocated = lambda self: None
    whole, parts, mesh = _split_rows((1, 2, 1), 2, 2, jnp.bfloat16, b=1, t=32, h=64)
    want, _ = _loss_and_gradients(whole, "eager")
    with interpreted():
        got, _ = _loss_and_gradients(parts, "pallas", mesh)
    for w, g in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        w, g = (x.astype(np.float32) for x in (w, g))
        np.testing.assert_allclose(g, w, rtol=2e-2, atol=2e-2 * np.abs(w).max())


@pytest.mark.timeout(360)
def test_sharded_positions_interpreted():
    """In another process, up to six times: with two devices jax's interpreter sometimes hangs.

    Results that differ are an error of the first process that ends.
    """
    code = "from tests.jaxattn.test_api import sharded_positions; sharded_positions()"
    root, variables = pathlib.Path(__file__).parents[2], os.environ | {"JAX_PLATFORMS": "cpu"}
    for _ in range(6):
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                cwd=root,
                env=variables,
                timeout=45,
            )
            if done.returncode != -signal.SIGABRT:  # XLA's, of a device that waits too long
                assert done.returncode == 0, done.stderr[-3000:]
                return
    pytest.fail("six processes did not end in 45 s each")


@pytest.mark.parametrize(
    ("sizes", "heads", "message"),
    [
        (
            (1, 8, 1),
            (4, 2),
            "^4 query heads must be a multiple of 8: positions are sharded",
        ),
        ((1, 2, 4), (4, 4), "^4 .* of 8: .* for heads, which are sharded over 4$"),
    ],
)
def test_heads_that_cannot_be_exchanged_are_refused(sizes, heads, message, on_hopper):
    """Also by `prepare`, before anything is compiled."""
    _, (q, k, v, mask), mesh = _split_rows(sizes, *heads, jnp.bfloat16, h=64)
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, mask, impl="xla")
        with pytest.raises(ValueError, match=message):
            prepare(mask, q, k, impl="pallas")


@pytest.mark.parametrize("name", ["segment_ids", "kv_segment_ids", "blocks", "pattern"])
def test_misplaced_mask_is_named(name, monkeypatch):
    """Ids and blocks of rows lie with the rows, a pattern for all on every device; `prepare` too.

    The error has what it is, what it must be, and one line.
    """
    q, k, v = _qkv(b=4, t=256, s=256, h=64, dtype=jnp.bfloat16)
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        rows, everywhere = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("d", None))
        q, k, v = (jax.device_put(x, rows) for x in (q, k, v))
        ids = jnp.ones((4, 256), jnp.int32)
        good = {"segment_ids": jax.device_put(ids, rows)}
        bad = {
            "segment_ids": {"segment_ids": jax.device_put(ids, everywhere)},
            "kv_segment_ids": good | {"kv_segment_ids": jax.device_put(ids, everywhere)},
            "blocks": {"blocks": jax.device_put(jnp.ones((4, 2, 2), bool), everywhere)},
            "pattern": {"blocks": jax.device_put(jnp.ones((2, 2), bool), rows)},
        }
        mask = Mask(**bad[name])
        what = "blocks" if name == "pattern" else name
        axis = "None" if name == "pattern" else "'d'"
        message = rf"^{what} is sharded P.*, must be P.*\({axis}, .*; see jax.reshard$"
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, mask, impl="xla")
        monkeypatch.setattr(device, "default_device", hopper)
        with pytest.raises(ValueError, match=message):
            prepare(mask, q, k, impl="pallas")


def test_every_device_plans_its_own_rows_and_heads(on_hopper):
    """A sharded plan is the plans of the devices' parts, end to end."""
    runs = np.random.default_rng(0).integers(0, 5, (4, 30))
    ids = np.repeat(np.sort(runs, axis=1), 10, axis=1).astype(np.int32)
    q, k, _ = _qkv(b=4, t=300, s=300, n=8, k=2, h=64, dtype=jnp.bfloat16)
    q_part, k_part = (jax.ShapeDtypeStruct((2, 300, x.shape[2] // 2, 64), x.dtype) for x in (q, k))
    plan_part = jax.jit(lambda mask: prepare(mask, q_part, k_part, impl="pallas").plan)
    parts = [plan_part(Mask(segment_ids=jnp.asarray(part))) for part in (ids[:2], ids[2:])]
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        bnh = NamedSharding(mesh, PartitionSpec("d", None, "m", None))
        rows = NamedSharding(mesh, PartitionSpec("d", None))
        mask = Mask(segment_ids=jax.device_put(jnp.asarray(ids), rows))
        q, k = (jax.device_put(x, bnh) for x in (q, k))
        plan = jax.jit(lambda mask, q, k: prepare(mask, q, k, impl="pallas").plan)(mask, q, k)
    for whole, *own in zip(*map(jax.tree.leaves, (plan, *parts)), strict=True):
        np.testing.assert_array_equal(np.asarray(whole), np.concatenate(own))


@pytest.mark.parametrize("by_row", [False, True])
def test_every_device_plans_its_part_of_a_pattern(by_row, on_hopper):
    """As without a pattern; one for all rows is not split, and the mask comes back with it."""
    blocks = np.random.default_rng(0).random((4, 3, 3)) < 0.5
    blocks = blocks if by_row else blocks[0]
    q, k, _ = _qkv(b=4, t=300, s=300, n=8, k=2, h=64, dtype=jnp.bfloat16)
    q_part, k_part = (jax.ShapeDtypeStruct((2, 300, x.shape[2] // 2, 64), x.dtype) for x in (q, k))
    plan_part = jax.jit(lambda mask: prepare(mask, q_part, k_part, impl="pallas").plan)
    halves = (blocks[:2], blocks[2:]) if by_row else (blocks, blocks)
    parts = [plan_part(Mask(blocks=jnp.asarray(half))) for half in halves]
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        bnh = NamedSharding(mesh, PartitionSpec("d", None, "m", None))
        rows = NamedSharding(mesh, PartitionSpec("d" if by_row else None))
        q, k = (jax.device_put(x, bnh) for x in (q, k))
        mask = Mask(blocks=jax.device_put(jnp.asarray(blocks), rows))
        mask = jax.jit(lambda mask, q, k: prepare(mask, q, k, impl="pallas"))(mask, q, k)
    np.testing.assert_array_equal(np.asarray(mask.blocks), blocks)
    for whole, *own in zip(*map(jax.tree.leaves, (mask.plan, *parts)), strict=True):
        np.testing.assert_array_equal(np.asarray(whole), np.concatenate(own))


def test_planned_once_equals_planned_in_every_call():
    """`prepare` changes nothing but where the metadata is computed: the same bits."""
    ids = np.repeat([[2, 1, 1, 0]], 20, axis=1)
    problem = random_problem(0, 1, 80, 80, 2, 1, 64, jnp.bfloat16, ids=ids)
    with interpreted():
        q, k = jnp.asarray(problem.q), jnp.asarray(problem.k)
        planned = jax.jit(lambda mask: prepare(mask, q, k, impl="pallas"))(problem.mask)
        assert planned.plan is not None
        run = jax.jit(lambda mask: attention(q, k, jnp.asarray(problem.v), mask, impl="pallas"))
        want, got = (np.asarray(run(mask)) for mask in (problem.mask, planned))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("impl", ["eager", "xla", "sdpa", "auto"])
def test_prepare_is_a_no_op_for_others(impl):
    q, k, _ = _qkv()
    mask = Mask(segment_ids=jnp.ones((2, 16), jnp.int32))
    assert prepare(mask, q, k, impl=impl) is mask


def test_interpreter_leaves_nothing_behind():
    """After it, pallas is refused on this CPU as before."""
    q, k, v = _qkv(h=64, dtype=jnp.bfloat16)
    with interpreted():
        assert resolve("auto", q, k)[0] == "pallas"
    with pytest.raises(NotImplementedError, match="Hopper.*this device is: cpu"):
        attention(q, k, v, impl="pallas")


@CPU
def test_auto_and_aliases_on_a_cpu():
    """`auto` says what it took and why; an alias says what it stands for."""
    q, k, _ = _qkv()
    assert resolve("auto", q, k) == ("xla", "auto: a cpu device, where the kernels cannot run")
    assert resolve("sdpa", q, k) == ("xla", "asked for as sdpa")
    assert resolve("eager", q, k) == ("eager", "asked for")
    assert set(IMPLEMENTATIONS) == {"pallas", "pallas_mma", "xla", "cudnn", "eager"}
    assert set(ALIASES.values()) <= set(IMPLEMENTATIONS)


def test_auto_on_hopper(on_hopper):
    """The kernels where they can run, else XLA with the reason."""
    q, k, _ = _qkv(h=128, dtype=jnp.bfloat16)
    assert resolve("auto", q, k) == ("pallas", "auto: a Hopper GPU")
    assert resolve("flash_attention_2", q, k)[0] == "pallas"
    assert resolve("pallas_mma", q, k) == ("pallas_mma", "asked for")
    name, why = resolve("auto", *_qkv(h=96, dtype=jnp.bfloat16)[:2])
    assert name == "xla" and "head_dim 64 or 128, not 96" in why


def test_pallas_is_refused_under_x64(on_hopper):
    """Its kernels mix their 32-bit counters with what jax then makes 64 bits wide."""
    q, k, v = _qkv(h=128, dtype=jnp.bfloat16)
    with jax.enable_x64(True):
        with pytest.raises(NotImplementedError, match="jax_enable_x64 is on.*use impl='xla'"):
            attention(q, k, v, impl="pallas")
        assert resolve("auto", q, k)[0] == "xla"
    assert resolve("auto", q, k)[0] == "pallas"


@pytest.mark.parametrize(
    ("gpu", "architecture"),
    [
        ("a100-80", "an Ampere GPU"),
        ("rtx3090", "an Ampere GPU"),
        ("rtx4090", "an Ada GPU"),
        ("l40s", "an Ada GPU"),
        ("rtx5090", "a Blackwell workstation GPU"),
    ],
)
def test_auto_on_gpus_without_wgmma(gpu, architecture):
    """`auto` and `pallas` select the kernels by mma.sync."""
    q, k, _ = _qkv(h=128, dtype=jnp.bfloat16)
    on_gpu = {"device": device.GPUS[gpu]}
    assert resolve("auto", q, k, **on_gpu) == ("pallas_mma", f"auto: {architecture}")
    assert resolve("pallas", q, k, **on_gpu) == ("pallas_mma", "asked for as pallas")
    name, why = resolve("auto", *_qkv(h=96, dtype=jnp.bfloat16)[:2], **on_gpu)
    assert name == "xla" and "head_dim 64 or 128, not 96" in why


@pytest.mark.parametrize(
    ("kind", "capability"), [("Tesla V100", "7.0"), ("Tesla T4", "7.5"), ("NVIDIA B200", "10.0")]
)
def test_auto_on_gpus_without_kernels(kind, capability, monkeypatch):
    """They get XLA, with the reason; pallas asked for by name names the device and the remedy."""
    gpu = device.DeviceSpec(kind, 16.0, capability)
    monkeypatch.setattr(device, "default_device", lambda: gpu)
    q, k, v = _qkv(h=128, dtype=jnp.bfloat16)
    name, why = resolve("auto", q, k)
    reason = rf"sm_80, sm_86, sm_89, sm_90, sm_120.*: {kind} .sm_{capability.replace('.', '')}"
    assert name == "xla" and re.search(reason, why)
    for impl in ("pallas", "pallas_mma"):
        with pytest.raises(NotImplementedError, match=f"{reason}.*use impl='xla'"):
            attention(q, k, v, impl=impl)


def test_a_plan_of_the_other_kernels_is_refused(on_hopper):
    """Their tiles differ."""
    q, k, v = _qkv(h=128, dtype=jnp.bfloat16)
    mask = prepare(Mask(), q, k, impl="pallas")
    with pytest.raises(ValueError, match="wgmma kernels, not .* mma kernels: call jaxattn.prepare"):
        attention(q, k, v, mask, impl="pallas_mma")


@CPU
@pytest.mark.parametrize("impl", ["pallas", "pallas_mma", "flash_attention_2", "cudnn"])
def test_gpu_implementations_are_refused_on_a_cpu(impl):
    """Nothing stands in for what was asked: an error with the reason and the remedy."""
    q, k, v = _qkv(h=64, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"cannot run: .*impl='xla'"):
        attention(q, k, v, impl=impl)


@pytest.mark.parametrize(
    ("impl", "changes", "mask", "message"),
    [
        ("pallas", {"dtype": jnp.float32, "h": 64}, Mask(), "bfloat16 and float16, not float32"),
        ("pallas", {"h": 96}, Mask(), "head_dim 64 or 128, not 96"),
        ("cudnn", {}, Mask(segment_ids=jnp.ones((2, 16), jnp.int32)), "no document mask"),
        (
            "cudnn",
            {},
            Mask(blocks=jnp.ones((1, 1), bool)),
            "no block mask .blocks given.; use impl=",
        ),
        ("cudnn", {"dtype": jnp.float32}, Mask(), "bfloat16 and float16, not float32"),
    ],
    ids=["pallas dtype", "pallas head_dim", "cudnn documents", "cudnn blocks", "cudnn dtype"],
)
def test_what_an_implementation_cannot(impl, changes, mask, message, on_hopper):
    """On a Hopper GPU: NotImplementedError with the value and what to use instead."""
    q, k, v = _qkv(**{"h": 128, "dtype": jnp.bfloat16, **changes})
    with pytest.raises(NotImplementedError, match=message):
        attention(q, k, v, mask, impl=impl)


def test_cudnn_promises_no_repeatable_bits(on_hopper):
    """Asked to be deterministic it is refused, by `resolve` too, before a run starts."""
    q, k, v = _qkv(h=128, dtype=jnp.bfloat16)
    for ask in (lambda **x: attention(q, k, v, **x), lambda **x: resolve(q=q, k=k, **x)):
        with pytest.raises(NotImplementedError, match="deterministic=True.*use impl='pallas'"):
            ask(impl="cudnn", deterministic=True)
    assert resolve("auto", q, k, deterministic=True)[0] == "pallas"


@pytest.mark.parametrize("impl", ["eager", "xla"])
def test_one_form_is_deterministic_too(impl):
    """Implementations with one form take the keyword and compute the same."""
    q, k, v = _qkv()
    got = attention(q, k, v, impl=impl, deterministic=True)
    np.testing.assert_array_equal(got, attention(q, k, v, impl=impl))


def test_pallas_needs_a_positive_scale(on_hopper):
    q, k, v = _qkv(h=128, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="it takes scale > 0, not -1.0; use impl='xla'"):
        attention(q, k, v, impl="pallas", scale=-1.0)
    name, why = resolve("auto", q, k, scale=0.0)
    assert name == "xla" and "scale > 0, not 0.0" in why


@CPU
def test_auto_asks_what_it_chose_as_well():
    """float16, which jax.nn does not take on a CPU: the same words as for xla asked for by name."""
    q, k, v = _qkv(dtype=jnp.float16)
    for impl in ("auto", "xla"):
        with pytest.raises(NotImplementedError, match="no float16 on a CPU; .* impl='eager'"):
            attention(q, k, v, impl=impl)


@CPU
def test_eager_is_refused_where_its_scores_cannot_fit(monkeypatch):
    """The message has what it would need, what there is, and what to use; nothing is allocated."""
    monkeypatch.setattr(device, "device_memory", lambda device: 80 << 30)
    q = jax.ShapeDtypeStruct((1, 32_768, 32, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 32_768, 8, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"384 GiB a layer, this device has 80 GiB"):
        resolve("eager", q, k)
    # On an explicit mesh each device has only its own heads and rows.
    mesh = jax.make_mesh((1, 8), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, PartitionSpec("d", None, "m", None))
        local = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec) for x in (q, k)]
        assert resolve("eager", *local)[0] == "eager"


@pytest.mark.parametrize(
    ("shapes", "mask", "message"),
    [
        (((2, 16, 4, 8), (2, 16, 3, 8), (2, 16, 3, 8)), Mask(), "4 query heads .* 3 kv heads"),
        (((2, 16, 4, 8), (2, 16, 2, 8), (2, 15, 2, 8)), Mask(), r"v has shape \(2, 15, 2, 8\)"),
        (((2, 16, 4, 8), (1, 16, 2, 8), (1, 16, 2, 8)), Mask(), "agree in batch and head dim"),
        (((2, 16, 4, 8), (2, 16, 2, 4), (2, 16, 2, 4)), Mask(), "agree in batch and head dim"),
        (((2, 16, 4, 8),) * 3, Mask(window=0), "window=0 must be at least 1"),
        (((2, 16, 4, 8),) * 3, Mask(segment_ids=jnp.ones((2, 9), jnp.int32)), r"be \(2, 16\)"),
        (((2, 200, 4, 8),) * 3, Mask(blocks=jnp.ones((1, 2), bool)), r"\(1, 2\), must be \(2, 2\)"),
        (((0, 16, 4, 8),) * 3, Mask(), "must have no empty axis"),
        (
            ((2, 16, 4, 8), (2, 0, 2, 8), (2, 0, 2, 8)),
            Mask(),
            r"k \(2, 0, 2, 8\) must have no empty",
        ),
        (((2, 16, 4, 8), (2, 16, 0, 8), (2, 16, 0, 8)), Mask(), "must have no empty axis"),
        (((2, 16, 4, 8),) * 3, Mask(window=2.5), "window=2.5 must be a number of tokens"),
        (((2, 16, 4, 8),) * 3, Mask(window=True), "window=True must be a number of tokens"),
        (((2, 16, 4, 8),) * 3, Mask(causal=1), "causal=1 must be True or False"),
    ],
    ids=[
        *("heads", "v", "batch", "head dim", "window", "ids", "blocks", "no rows", "no keys"),
        *("no heads", "half a token", "a window that is none", "causal"),
    ],
)
def test_contradicting_arguments(shapes, mask, message):
    """ValueError, one line, before anything is compiled; the same from `resolve`'s callers."""
    q, k, v = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    with pytest.raises(ValueError, match=message) as error:
        api._check_shapes(q, k, v, mask)
    assert "\n" not in str(error.value)


def test_dtypes_must_agree():
    q, k, v = _qkv()
    with pytest.raises(ValueError, match="dtypes bfloat16, float32, float32; must be one"):
        attention(q.astype(jnp.bfloat16), k, v)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64, jnp.float8_e4m3fn])
def test_dtypes_that_no_implementation_has(dtype):
    x = jax.ShapeDtypeStruct((2, 16, 4, 8), dtype)
    with pytest.raises(ValueError, match=f"dtype {x.dtype}, must be bfloat16, float16 or float32"):
        api._check_shapes(x, x, x, Mask())


def test_an_array_is_no_mask():
    x = jax.ShapeDtypeStruct((2, 16, 4, 8), jnp.float32)
    with pytest.raises(TypeError, match=r"mask is a ndarray, must be a jaxattn.Mask or None"):
        api._check_shapes(x, x, x, np.ones((16, 16), bool))


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), "0.5"])
def test_scale_is_a_finite_number(scale):
    with pytest.raises(ValueError, match=f"scale={scale!r} must be a finite number"):
        api._number(scale)


@pytest.mark.parametrize(
    "other",
    [
        {"mask": {"window": 5}},
        {"mask": {"causal": False}},
        {"mask": {"blocks": np.ones((1, 1), bool)}},
        {"sizes": {"b": 1}},
        {"sizes": {"t": 40, "s": 40}},
        {"sizes": {"k": 4}},
    ],
    ids=["window", "causal", "blocks", "batch", "tokens", "kv heads"],
)
def test_a_plan_of_something_else_is_refused(other, on_hopper):
    """It would be wrong numbers, or reads outside of the arrays."""
    sizes = {"h": 64, "dtype": jnp.bfloat16}
    q, k, _ = _qkv(**sizes)
    mask = dataclasses.replace(prepare(Mask(), q, k), **other.get("mask", {}))
    arrays = _qkv(**sizes, **other.get("sizes", {}))
    message = (
        r"mask.plan was prepared for q \[2, 16, 4\], k \[2, 16, 2\] .*: call jaxattn.prepare again"
    )
    with pytest.raises(ValueError, match=message):
        attention(*arrays, mask, impl="pallas")


def test_unknown_implementation_lists_the_known():
    q, k, v = _qkv()
    with pytest.raises(ValueError, match="'flash'; choose one of auto, pallas, .*, sdpa"):
        attention(q, k, v, impl="flash")


@CPU
def test_describe_on_a_cpu():
    """The line has the implementation, why, the device, the tiles, the mask and what is skipped."""
    q, k, _ = _qkv(h=64)
    line = str(describe("auto", q, k, Mask(window=5)))
    assert line.startswith("xla (auto: a cpu device, where the kernels cannot run) on cpu; tiles ")
    assert line.endswith(
        "1 slice of 16 queries x 16 keys; mask causal + window 5; 0.0% of tiles skipped"
    )
    assert "none, the whole 16 x 16 matrix" in str(describe("eager", q, k, Mask()))


@pytest.mark.parametrize("spec", [("d", None, "m"), ("d", "m", None)], ids=["heads", "positions"])
def test_describe_under_a_mesh(spec, monkeypatch):
    """Slices are of one device's rows and heads, tiles of its heads; all rows count as skipped."""
    q = jax.ShapeDtypeStruct((4, 4096, 16, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((4, 4096, 8, 128), jnp.bfloat16)
    mask = Mask(segment_ids=jnp.repeat(jnp.arange(1, 5, dtype=jnp.int32)[:, None], 4096, 1))
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    bnh = NamedSharding(mesh, PartitionSpec(*spec, None))
    whole = "8 slices of 512 queries x 4096 keys"
    assert describe("xla", q, k, mask).tiles == whole
    monkeypatch.setattr(
        wgmma_tiles, "choose_tiles", lambda *heads: heads_seen.append(heads) or rule
    )
    heads_seen, rule = [], rule_tiles(16, 8, 128)
    with jax.set_mesh(mesh):
        q, k = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=bnh) for x in (q, k))
        assert describe("xla", q, k, mask).tiles == "2 slices of 2048 queries x 4096 keys"
        monkeypatch.setattr(device, "default_device", hopper)
        assert 0.4 < describe("pallas", q, k, mask).skipped < 0.5
    assert heads_seen == [(8, 4, 128)]


def test_describe_on_hopper(on_hopper):
    """Pallas names its tiles and what the mask spares: half for causal, most for packs."""
    q = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 4096, 2, 128), jnp.bfloat16)
    assert 0.4 < describe("pallas", q, k, Mask()).skipped < 0.5
    packed = Mask(segment_ids=jnp.repeat(jnp.arange(1, 33, dtype=jnp.int32), 128)[None])
    found = describe("pallas", q, k, packed)
    assert 0.9 < found.skipped < 1.0
    assert "pallas (asked for) on NVIDIA H200; tiles forward 32x128 x 4 heads" in str(found)
    assert "mask causal + documents" in str(found)
    found = describe("pallas_mma", q, k, packed)
    assert 0.9 < found.skipped < 1.0
    assert "pallas_mma (asked for) on NVIDIA H200; tiles forward 32x64 x 4 heads" in str(found)


def test_describe_counts_the_blocks_of_a_pattern(on_hopper):
    """Every block of 128 x 128 that the pattern, and causal order, hide is skipped.

    Of a block on the diagonal, its first 64 queries skip the last 64 keys.
    """
    q = jax.ShapeDtypeStruct((2, 2048, 8, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 2048, 2, 128), jnp.bfloat16)
    blocks = np.random.default_rng(0).random((2, 16, 16)) < 0.3
    blocks[:, :, 0] = True  # a row without a block would still visit one
    found = describe("pallas", q, k, Mask(blocks=jnp.asarray(blocks), causal=False))
    assert found.skipped == pytest.approx(1 - blocks.mean())
    assert "mask blocks;" in str(found)
    found = describe("pallas", q, k, Mask(blocks=jnp.asarray(blocks[0])))
    visited = np.tril(blocks[0], -1).mean() + 0.75 * np.diag(blocks[0]).sum() / blocks[0].size
    assert found.skipped == pytest.approx(1 - visited)
