"""The plan counts bytes that can be counted by hand, and is within 10% of measured memory.

To measure the constants again, on one H200:

    test_measured_peaks: peak_memory_bytes in the bench.json of
        python -m train.bench --rows dense --remat attention --scan_layers --attn pallas cudnn xla
            eager --seq_lens 512 4096 16384 32768
    test_what_the_compiler_needs, and "parts" with two microbatches: xla_bytes in the bench.json of
        python -m train.bench --rows packed --attn pallas --seq_lens 32768 --remat dots attention
            full [--grad_accum 2 --tokens 65536], for the others --model internlm2-7b --remat qkv
            --optim.moment_dtype=int8 [--param_dtype bf16]
    the same over two GPUs: the line "XLA, after" of
        python -m train.main --dry_run --model internlm2-1.8b --attn pallas --seq_len 32768
            --batch_size 2 --remat dots [--mesh.fsdp 1 --mesh.tensor 2]; of the long row
            --seq_len 65536 --batch_size 1 --mesh.seq 2 (jax 0.12.0)
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxattn import xla
from models import internlm2
from models.config import PRESETS
from models.execution import Execution
from models.internlm2 import InternLM2
from models.lora import LoRA
from models.remat import REMAT
from train.config.sections import MeshConfig, OptimConfig
from train.distributed.mesh import make_mesh
from train.memory import plan as module
from train.step.optim import optimizer
from train.step.state import abstract_state

BIG = PRESETS["internlm2-1.8b"]
GiB = 2**30
SEQ = MeshConfig(seq=4)
INT8 = OptimConfig(moment_dtype="int8")


def plan(model=BIG, devices=1, **kwargs):
    sizes = kwargs.pop("sizes", MeshConfig())
    options = {"rows": 1, "seq_len": 32768, "grad_accum": 1, "remat": "full", "itemsize": 2}
    options |= {"attn": "pallas", "scan": True} | kwargs
    return module.plan(model, make_mesh(sizes, jax.devices()[:devices]), **options)


def test_1_8b_on_one_gpu():
    """fp32 weights and moments, bf16 copies and gradients: 18 bytes a parameter in all."""
    p = plan()
    n = BIG.num_params()
    assert (p.weights, p.optimizer, p.gradients) == (6 * n, 8 * n, 2 * n)
    assert p.gathered == p.scores == p.sums == p.host == 0
    assert plan(grad_accum=2).sums == 4 * n


@pytest.mark.parametrize(
    ("kwargs", "gib"),
    [
        ({}, 37.03),
        ({"attn": "cudnn"}, 34.36),
        ({"attn": "xla", "rows": 2, "seq_len": 16384}, 35.14),
        ({"attn": "eager", "rows": 64, "seq_len": 512}, 36.05),
        ({"attn": "eager", "rows": 8, "seq_len": 4096}, 53.55),
        ({"attn": "eager", "rows": 2, "seq_len": 16384}, 125.43),
    ],
)
def test_measured_peaks(kwargs, gib):
    """Of whole steps of 1.8B on an H200 (results/train), remat "attention", under a scan."""
    assert plan(remat="attention", **kwargs).total / GiB == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize(
    ("model", "kwargs", "gib"),
    [
        ("internlm2-1.8b", {"remat": "dots"}, 66.23),
        ("internlm2-1.8b", {"remat": "dots", "matmul": "fp8"}, 65.50),
        ("internlm2-1.8b", {"remat": "attention"}, 34.19),
        ("internlm2-1.8b", {"remat": "full"}, 31.30),
        ("internlm2-7b", {"remat": "qkv", "optim": INT8}, 94.70),
        ("internlm2-7b", {"remat": "qkv", "optim": INT8, "param_itemsize": 2}, 78.13),
    ],
)
def test_what_the_compiler_needs(model, kwargs, gib):
    """XLA's own count (jax 0.11.2, for an H200) of the step at 32k, each layer on its own."""
    total = plan(PRESETS[model], scan=False, **kwargs).total / GiB
    assert total == pytest.approx(gib, rel=0.05)


@pytest.mark.parametrize(
    ("model", "seq_len", "remat", "gib", "host"),
    [
        ("internlm2-7b", 131_072, "full", 84.59, 0),
        ("internlm2-7b", 131_072, "offload,attention,attention,attention", 106.51, 16),
        ("internlm2-7b", 262_144, "offload_input", 58.48, 64),
        ("internlm2-7b", 262_144, "offload,offload,offload,attention", 98.53, 96),
        ("internlm2-7b", 393_216, "offload,offload_input,offload_input,full", 99.74, 96),
        ("internlm2-20b", 32_768, "offload_input", 118.79, 18),
    ],
)
def test_what_the_compiler_needs_in_tiles(model, seq_len, remat, gib, host):
    """As above (jax 0.12.0), bf16 weights and int8 moments, under a scan, in tiles of 16,384."""
    kwargs = {"optim": INT8, "param_itemsize": 2, "tile_size": 16_384}
    ours = plan(PRESETS[model], seq_len=seq_len, remat=remat, **kwargs)
    assert ours.total / GiB == pytest.approx(gib, rel=0.05)
    assert ours.host / GiB == pytest.approx(host, rel=0.01)


@pytest.mark.parametrize(
    ("model", "kwargs", "gib"),
    [
        ("internlm2-7b", {"rows": 8, "remat": "attention"}, 41.4),
        ("internlm2-7b", {"rows": 1, "quantize": "nf4"}, 9.02),
        ("internlm2-7b", {"rows": 8, "quantize": "nf4"}, 22.83),
        ("internlm2-20b", {"rows": 8, "quantize": "nf4"}, 41.98),
    ],
)
def test_measured_peaks_with_adapters(model, kwargs, gib):
    """Rank 64 on all layers, on an H200 (results/train/h200/bench_fp8_lora.json)."""
    options = {"seq_len": 4096, "scan": False, "param_itemsize": 2} | kwargs
    total = plan(PRESETS[model], lora=LoRA(rank=64, alpha=16.0), **options).total / GiB
    assert total == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize(
    ("devices", "sizes", "kwargs", "gib"),
    [
        (1, MeshConfig(), {"remat": "dots", "grad_accum": 2}, 72.54),
        (1, MeshConfig(), {"remat": "attention", "grad_accum": 2}, 40.34),
        (2, MeshConfig(fsdp=2), {"remat": "dots", "rows": 2}, 54.26),
        (2, MeshConfig(fsdp=1, tensor=2), {"remat": "dots", "rows": 2}, 59.16),
        (2, MeshConfig(seq=2), {"remat": "dots", "seq_len": 65536}, 53.54),
    ],
    ids=["grad_accum", "grad_accum-attention", "fsdp", "tensor", "seq"],
)
def test_what_the_compiler_needs_in_parts_and_over_devices(devices, sizes, kwargs, gib):
    """As above, 1.8B: a row in each of two microbatches, two rows over two GPUs, a long one."""
    total = plan(devices=devices, sizes=sizes, scan=False, **kwargs).total / GiB
    assert total == pytest.approx(gib, rel=0.05)


def test_more_is_kept_with_less_remat():
    order = ("offload_input", "offload", "full", "attention", "qkv", "dots", "none")
    totals = [plan(remat=remat).activations for remat in order]
    assert totals == sorted(totals) and len(set(totals)) == 7
    assert plan(remat="attention", attn="xla") == plan(remat="full", attn="xla")
    assert plan(remat="offload_input").host == plan(remat="full").activations
    assert plan(remat="offload,full").host == plan(remat="offload").host // 2
    assert plan(remat="offload").host == pytest.approx(
        plan(remat="attention").activations, rel=0.01
    )


@pytest.mark.parametrize("remat", REMAT)
def test_plan_keeps_what_the_program_keeps(remat, monkeypatch):
    """Bytes that the forward scan stacks for the backward one, in the program's own words."""
    monkeypatch.setattr(internlm2, "attention", lambda *qkv, **_: named_attention(*qkv[:3]))
    monkeypatch.setattr(internlm2, "prepare", lambda mask, q, k, **_: mask)
    kwargs = {"remat": remat, "dtype": jnp.bfloat16, "attn": "pallas"}
    model = jax.eval_shape(lambda: InternLM2(BIG, rngs=nnx.Rngs(0), execution=Execution(**kwargs)))
    tokens = jnp.zeros((1, 512), jnp.int32)
    program = jax.make_jaxpr(jax.grad(lambda m: jnp.sum(m.hidden(tokens).astype(jnp.float32))))
    forward = next(e for e in program(model).eqns if e.primitive.name == "scan")
    stacked = [v.aval for v in forward.outvars if v.aval.shape[:1] == (BIG.num_layers,)]
    size = sum(a.size * a.dtype.itemsize for a in stacked)
    ours = plan(remat=remat, seq_len=512)
    assert ours.activations + ours.host == pytest.approx(size, rel=0.01)


def named_attention(q, k, v):
    """Stands for the kernel, which only a GPU can trace: the same names, shapes and residuals."""
    return _kernel(*checkpoint_name((q, k, v), "attn_qkv"))


@jax.custom_vjp
def _kernel(q, k, v):
    return q


def _forward(q, k, v):
    lse = checkpoint_name(jnp.sum(q.astype(jnp.float32), -1), "attn_lse")
    o = checkpoint_name(q * 2, "attn_out")
    return o, (q, k, v, o, lse)


def _backward(residuals, g):
    q, k, v, o, lse = residuals
    return g * q * o * lse[..., None].astype(g.dtype), k, v


_kernel.defvjp(_forward, _backward)


@pytest.mark.parametrize(
    ("optim", "bytes_each"),
    [
        (OptimConfig(moment_dtype="bf16"), 4),
        (OptimConfig(moment_dtype="int8"), 2.03125),
        (OptimConfig(name="lion"), 4),
        (OptimConfig(name="adafactor"), 0),
    ],
)
def test_other_optimizers(optim, bytes_each):
    assert plan(optim=optim).optimizer == pytest.approx(bytes_each * BIG.num_params())


def test_copies_of_bf16_weights():
    """None under a scan; else those of the blocks, which XLA slices out of their stacks."""
    n, table = BIG.num_params(), BIG.vocab_size * BIG.hidden_size
    assert plan(param_itemsize=2).weights == 2 * n
    assert plan(param_itemsize=2, scan=False).weights == pytest.approx(4 * n - 4 * table)


def test_devices_share():
    one, eight = plan(), plan(devices=8, rows=8)
    assert eight.optimizer == one.optimizer // 8
    assert eight.activations == one.activations  # a row each
    assert eight.gathered > 0
    assert plan(devices=8, sizes=MeshConfig(fsdp=1, tensor=8)).logits < one.logits


def test_seq_shares_tokens_and_weights():
    """As fsdp, but for one row; attention has the scores of its heads and copies of q, k, v."""
    one, eight = plan(attn="xla"), plan(devices=8, sizes=MeshConfig(seq=8), attn="xla")
    assert (eight.optimizer, eight.gathered > 0) == (one.optimizer // 8, True)
    assert eight.activations == one.activations // 8
    assert one.block // 8 < eight.block < one.block // 4
    scores = [plan(attn="eager").scores, plan(devices=4, sizes=SEQ, attn="eager").scores]
    assert scores[0] == 4 * scores[1]


def test_scores_are_counted():
    assert plan(attn="eager").scores >= 16 * 32768**2 * 4
    assert plan(attn="xla").scores == 3 * xla.SLICE_BYTES
    assert plan(attn="xla", seq_len=512).scores == plan(attn="eager", seq_len=512).scores
    assert (
        plan(attn="eager", rows=8, seq_len=512).scores == plan(attn="eager", seq_len=512).scores * 8
    )


@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(name="muon")], ids=["adamw", "muon"])
def test_state_takes_what_is_planned(tiny, optim):
    """The arrays of the state, against weights and moments of the plan; counts of steps are few."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer(optim, 1e-3, 10)
    _, like = abstract_state(lambda: InternLM2(tiny, rngs=nnx.Rngs(0)), tx, mesh)
    ours = plan(tiny, rows=2, seq_len=64, itemsize=4, attn="xla", optim=optim)
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(like))
    assert ours.weights + ours.optimizer == pytest.approx(held, abs=1024)


def test_fp8_keeps_less_of_what_remat_does_not_compute_again():
    """SwiGLU keeps two arrays of six; the inputs of wqkv, wo, and w1 and w3 take one byte each."""
    D, F, L, T = BIG.hidden_size, BIG.intermediate_size, BIG.num_layers, 32768
    less = [plan(remat="none", matmul=m).activations for m in ("bf16", "fp8")]
    assert less[0] - less[1] == T * L * (2 * (2 * D + 4 * F) - 3 * D)
    assert plan(remat="dots", matmul="fp8") == plan(remat="dots")
