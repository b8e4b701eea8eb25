"""The model against the original's outputs and gradients, and against itself over a mesh."""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import attention
from models import internlm2, sharding
from models.config import PRESETS, ModelConfig, RopeScaling
from models.execution import Execution
from models.internlm2 import InternLM2, init
from models.weights.load import load_hf
from models.weights.table import hf_tensors

# As the goldens' README suggests for fp32 with exact products; the originals differ from a
# float64 evaluation by about 1e-5 themselves.
LOGITS, LOSS, GRAD = 1e-4, 1e-5, {"atol": 2e-6, "rtol": 1e-5}

SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    intermediate_size=128,
    rope_scaling=RopeScaling(type="dynamic", factor=2.0),
    max_position_embeddings=8,
    bias=True,
    initializer_range=0.1,
)


def loss_of(logits, labels):
    """Compute the loss of the original: shifted labels, mean over labels that are not -100."""
    valid = labels[:, 1:] >= 0
    nll = nll_of(logits[:, :-1], jnp.where(valid, labels[:, 1:], 0))
    return jnp.where(valid, nll, 0).sum() / jnp.float32(valid.sum())


def nll_of(logits, targets):
    """Negative log likelihood without a gather: the vocabulary may be sharded."""
    hit = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    return jax.nn.logsumexp(logits, axis=-1) - (logits * hit).sum(axis=-1)


def segments_of(golden, case):
    """Shift the ids of the golden file, which start at 0: 0 is padding here."""
    return golden[f"{case}/segment_ids"] + 1 if f"{case}/segment_ids" in golden else None


def hf_gradients(grads, config):
    """Gradients under their HF names, in the HF layout."""
    named = {}
    for name, weight, i in hf_tensors(config):
        leaf = grads
        for part in weight.path.split("."):
            leaf = getattr(leaf, part)
        array = np.asarray(leaf.get_value())
        named[name] = weight.to_hf(array if i is None else array[i], config)
    return named


@pytest.fixture(scope="module", params=["eager", "xla"])
def model(request, tiny_dir) -> InternLM2:
    return load_hf(tiny_dir, execution=Execution(dtype="float32", attn=request.param))


@pytest.fixture(scope="module")
def forward():
    return jax.jit(lambda model, tokens, **kwargs: model(tokens, **kwargs))


def test_logits_of_the_original(model, golden, exact, forward):
    logits = forward(model, golden["basic/input_ids"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden["basic/logits"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("case", ["padded_right", "padded_left"])
def test_padded_rows_of_the_original(model, golden, exact, forward, case):
    """Padding is segment 0; positions are the default, per document."""
    real = golden[f"{case}/attention_mask"]
    logits = forward(model, golden[f"{case}/input_ids"], segment_ids=real)
    want = golden[f"{case}/logits"]
    np.testing.assert_allclose(logits[real == 1], want[real == 1], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("key", ["logits", "logits_separate"])
def test_packed_documents_are_as_alone(model, golden, exact, forward, key):
    """One row of three documents equals the original's packed run and its three separate runs."""
    logits = forward(model, golden["packed/input_ids"], segment_ids=segments_of(golden, "packed"))
    np.testing.assert_allclose(logits, golden[f"packed/{key}"], rtol=0, atol=LOGITS)


def test_default_positions_are_those_of_the_packed_golden(model, golden, exact, forward):
    ids = {"segment_ids": segments_of(golden, "packed")}
    default = forward(model, golden["packed/input_ids"], **ids)
    positions = golden["packed/position_ids"]
    given = forward(model, golden["packed/input_ids"], positions=positions, **ids)
    np.testing.assert_array_equal(default, given)


@pytest.mark.parametrize("case", ["basic", "packed"])
def test_loss_and_every_gradient_of_the_original(model, golden, exact, case):
    """Named gradients element by element, and the norm of each of the 17 parameters.

    Row 2 of the embedding is exactly 0 there (padding_idx) and has to be here.
    """
    segments = segments_of(golden, case)

    @jax.jit
    def loss_and_grad(model):
        return jax.value_and_grad(
            lambda model: loss_of(
                model(golden[f"{case}/input_ids"], segment_ids=segments),
                golden[f"{case}/labels"],
            )
        )(model)

    loss, grads = loss_and_grad(model)
    np.testing.assert_allclose(loss, golden[f"{case}/loss"], rtol=0, atol=LOSS)

    grads = hf_gradients(grads, model.config)
    compared = 0
    for key in golden:
        if key.startswith(f"{case}/grad/"):
            name = key.removeprefix(f"{case}/grad/")
            np.testing.assert_allclose(grads[name], golden[key], err_msg=name, **GRAD)
            compared += 1
    assert compared == 6
    rows = golden[f"{case}/grad_rows/ids"]
    for name in ("model.tok_embeddings.weight", "output.weight"):
        want = golden[f"{case}/grad_rows/{name}"]
        np.testing.assert_allclose(grads[name][rows], want, err_msg=name, **GRAD)
    assert (golden["basic/input_ids"] == 2).any()
    assert not grads["model.tok_embeddings.weight"][2].any()
    names, norms = golden[f"{case}/grad_norm/names"], golden[f"{case}/grad_norm/values"]
    assert sorted(names) == sorted(grads)
    for name, norm in zip(names, norms, strict=True):
        got = np.linalg.norm(grads[name].astype(np.float64))
        np.testing.assert_allclose(got, norm, rtol=1e-5, atol=2e-6, err_msg=name)


def test_bf16_is_as_near_to_fp32_as_the_original_is(tiny_dir, golden, forward):
    """Mean and largest distance of logits, and the share of equal argmaxes."""
    model = load_hf(
        tiny_dir, execution=Execution(dtype="bfloat16", attn="eager", param_dtype="bfloat16")
    )
    ours = np.asarray(forward(model, golden["basic/input_ids"]))
    exact, theirs = golden["basic/logits"], golden["bf16/logits"]
    assert np.abs(ours - exact).mean() <= np.abs(theirs - exact).mean()
    assert np.abs(ours - exact).max() <= 1.5 * np.abs(theirs - exact).max()
    agree = np.mean(np.argmax(ours, -1) == np.argmax(exact, -1))
    assert agree >= np.mean(np.argmax(theirs, -1) == np.argmax(exact, -1)) - 0.02
    loss = loss_of(jnp.asarray(ours), golden["basic/labels"])
    np.testing.assert_allclose(loss, golden["basic/loss"], atol=2e-2)


BATCH = {
    "tokens": jax.random.randint(jax.random.key(1), (8, 24), 3, 64),
    # Documents of up to 14 tokens, beyond SMALL's max_position_embeddings: NTK is at work.
    "segment_ids": jnp.tile(jnp.repeat(jnp.array([1, 2, 0]), jnp.array([14, 7, 3]))[None], (8, 1)),
}


def packed_loss(model, batch):
    logits = model(batch["tokens"], segment_ids=batch["segment_ids"])
    logits = sharding.constrain(logits, "batch", None, "vocab")  # whole rows, for the shift
    nll = nll_of(logits[:, :-1], batch["tokens"][:, 1:])
    return jnp.where(batch["segment_ids"][:, :-1] > 0, nll, 0).mean(), logits


def run(model, mesh=None):
    """(logits, gradients) as numpy; over a mesh, whether or not it is the current one."""
    grad = jax.jit(jax.grad(packed_loss, has_aux=True))
    batch = jax.tree.map(np.asarray, BATCH)
    if mesh is None:
        grads, logits = grad(model, batch)
    else:
        with jax.set_mesh(mesh):
            grads, logits = grad(model, batch)
    return np.asarray(logits), [np.asarray(g) for g in jax.tree.leaves(grads)]


@functools.cache
def small(tied=False) -> InternLM2:
    """Make the random model of the tests below, on one device; compiling its init takes seconds."""
    return init(
        dataclasses.replace(SMALL, tie_word_embeddings=tied),
        execution=Execution(attn="xla", dtype=jnp.float32),
    )


@functools.cache
def one_device(tied=False):
    """Its logits and gradients there."""
    with jax.default_matmul_precision("highest"):
        return run(small(tied))


@pytest.mark.parametrize(
    ("shape", "tied"),
    [((1, 8, 1), False), ((2, 1, 4), False), ((1, 2, 2, 2), True), ((1, 1, 1, 8), False)],
)
def test_eight_devices_compute_what_one_does(make_mesh, exact, shape, tied):
    """Same weights, logits and gradients, in every mix of data, fsdp, tensor and seq axes."""
    mesh = make_mesh(*shape)
    model = jax.device_put(small(tied), sharding.shardings(small(tied), mesh))
    assert model.blocks.ffn.w1_DF.sharding.num_devices == 8
    logits, grads = run(model, mesh)
    want_logits, want_grads = one_device(tied)
    np.testing.assert_allclose(logits, want_logits, rtol=0, atol=2e-5)
    for got, want in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_sharded_weights_need_no_current_mesh(make_mesh, exact):
    """model(tokens) after load_hf(mesh=...), without jax.set_mesh; gradients are sharded too."""
    model = jax.device_put(small(), sharding.shardings(small(), make_mesh(1, 4, 2)))
    _, logits = jax.jit(packed_loss)(model, BATCH)
    np.testing.assert_allclose(logits, one_device()[0], rtol=0, atol=2e-5)
    # Traced only: gradients have their weights' types, shardings included.
    grads, _ = jax.eval_shape(jax.grad(packed_loss, has_aux=True), model, BATCH)
    for grad, weight in zip(jax.tree.leaves(grads), jax.tree.leaves(model), strict=True):
        assert grad.sharding.spec == weight.sharding.spec


@pytest.mark.parametrize("remat", ["none", "dots", "qkv", "offload"])  # "full" is the default
@pytest.mark.parametrize("scan", [True, False])
def test_remat_and_scan_change_memory_and_speed_alone(exact, remat, scan):
    model = jax.tree.map(lambda x: x, small())
    model.execution = dataclasses.replace(model.execution, remat=remat, scan=scan)
    _, grads = run(model)
    for got, want in zip(grads, one_device()[1], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_remat_policies_save_what_they_name():
    """Residual bytes: full < qkv < dots < none ("attention" names what only a kernel has)."""

    def residual_bytes(remat):
        model = jax.eval_shape(
            lambda: InternLM2(
                SMALL,
                rngs=nnx.Rngs(0),
                execution=Execution(attn="xla", dtype=jnp.float32, remat=remat),
            )
        )
        pull = jax.eval_shape(lambda m: jax.vjp(lambda m: m.hidden(BATCH["tokens"]), m)[1], model)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))

    sizes = {remat: residual_bytes(remat) for remat in ("full", "qkv", "dots", "none")}
    B, T, heads = *BATCH["tokens"].shape, SMALL.num_heads + 2 * SMALL.num_kv_heads
    saved = SMALL.num_layers * B * T * heads * SMALL.head_dim * 4
    assert sizes["qkv"] - sizes["full"] == pytest.approx(saved, rel=0.02)
    saved = SMALL.num_layers * B * T * (SMALL.hidden_size + 2 * SMALL.intermediate_size) * 4
    assert sizes["dots"] - sizes["qkv"] == pytest.approx(saved, rel=0.02)
    assert sizes["none"] > sizes["dots"]


def test_init_is_the_originals():
    """normal(0, initializer_range), norms 1, biases 0, the padding row 0."""
    model = small()
    assert sum(x.size for x in jax.tree.leaves(model)) == SMALL.num_params()
    for weight in (model.blocks.attention.wqkv_DKgH, model.blocks.ffn.w2_FD, model.output_DV):
        np.testing.assert_allclose(np.std(weight), 0.1, rtol=0.05)
        assert abs(np.mean(weight)) < 0.005
    w1 = np.asarray(model.blocks.ffn.w1_DF)
    assert np.abs(w1[0] - w1[1]).mean() > 0.05, "layers are drawn independently"
    assert (np.asarray(model.blocks.attention_norm_D) == 1).all()
    assert (np.asarray(model.blocks.attention.wqkv_bias_KgH) == 0).all()
    assert not np.asarray(model.embed_VD)[2].any() and np.asarray(model.embed_VD)[1].any()


def test_init_on_a_mesh_never_holds_a_whole_weight(make_mesh):
    """Each device draws its own shards: its memory falls with their number."""

    def peak(mesh):
        config = dataclasses.replace(PRESETS["nano"], num_kv_heads=4, intermediate_size=8192)

        def create():
            return InternLM2(config, rngs=nnx.Rngs(params=0))

        places = sharding.shardings(jax.eval_shape(create), mesh)
        stats = jax.jit(create, out_shardings=places).lower().compile().memory_analysis()
        return stats.temp_size_in_bytes + stats.output_size_in_bytes

    assert peak(make_mesh(1, 8, 1)) < 0.3 * peak(make_mesh(1, 1, 1))


@pytest.mark.parametrize("tokens", [np.ones(8, np.int32), np.ones((1, 8), np.float32)])
def test_tokens_of_another_kind_are_refused(model, tokens):
    """Without the checks of types that pytest adds, as callers have it."""
    kind = re.escape(f"tokens have shape {tokens.shape} and dtype {tokens.dtype}, must be integers")
    with pytest.raises(ValueError, match=kind):
        inspect.unwrap(InternLM2._place_inputs)(model, tokens, None, None)


def test_padding_has_no_influence(exact, forward):
    """Other tokens in padding slots change no logits of real tokens."""
    padded = np.asarray(BATCH["segment_ids"]) == 0
    tokens = jnp.where(padded, 5, BATCH["tokens"])
    logits = forward(small(), tokens, segment_ids=BATCH["segment_ids"])
    np.testing.assert_allclose(logits[~padded], one_device()[0][~padded], atol=1e-5)


def test_init_does_not_depend_on_the_mesh(make_mesh):
    spread = init(
        SMALL, mesh=make_mesh(2, 2, 2), execution=Execution(attn="xla", dtype=jnp.float32)
    )
    assert spread.output_DV.sharding.num_devices == 8
    jax.tree.map(np.testing.assert_array_equal, spread, small())


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_reaches_attention(deterministic, monkeypatch):
    """Every attention of a forward pass is asked for what the model was made for."""
    asked = []

    def attend(*args, **kwargs):
        asked.append(kwargs["deterministic"])
        return attention(*args, **kwargs)

    monkeypatch.setattr(internlm2, "attention", attend)
    model = nnx.eval_shape(
        lambda: InternLM2(
            SMALL,
            rngs=nnx.Rngs(0),
            execution=Execution(attn="xla", deterministic=deterministic, dtype=jnp.float32),
        )
    )
    jax.eval_shape(lambda model: model(jnp.zeros((1, 8), jnp.int32)), model)
    assert asked == [deterministic]  # one trace for all layers
