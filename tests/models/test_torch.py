"""Live parity with PyTorch: transformers' LlamaForCausalLM with the un-fused weights.

Needs the torch extra. What PyTorch loads is what `save_hf(layout="llama")` wrote, so the export is
proven by the same runs. fp32, exact products; tolerances as in tests/models/test_internlm2.py.
"""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from models.config import ModelConfig, RopeScaling
from models.execution import Execution
from models.generate import generate
from models.internlm2 import init
from models.weights import llama
from models.weights.load import load_hf
from models.weights.save import save_hf
from models.weights.table import find_param, hf_tensors

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None,
        reason="needs PyTorch: pip install -e '.[torch]'",
    ),
    pytest.mark.filterwarnings("default"),  # those of another project
    pytest.mark.usefixtures("one_torch_thread"),
]

LOGITS, LOSS, GRAD = 1e-4, 1e-5, {"atol": 2e-6, "rtol": 1e-5}
CONFIG = ModelConfig(
    vocab_size=131,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=96,
    max_position_embeddings=64,
    initializer_range=0.1,
)
VARIANTS = {
    "plain": CONFIG,
    "groups_of_6": dataclasses.replace(CONFIG, hidden_size=96, num_heads=6, num_kv_heads=1),
    "bias": dataclasses.replace(CONFIG, bias=True),
    # Where positions hardly turn a pair of dimensions, a bias of k moves all scores alike: its
    # gradient is rounding error, which Adam scales up to whole steps. Here every pair turns.
    "bias_fast": dataclasses.replace(CONFIG, bias=True, rope_theta=10.0),
    "tied": dataclasses.replace(CONFIG, tie_word_embeddings=True),
    "linear": dataclasses.replace(CONFIG, rope_scaling=RopeScaling(type="linear", factor=4.0)),
    "dynamic": dataclasses.replace(CONFIG, rope_scaling=RopeScaling(type="dynamic", factor=2.0)),
    "dynamic_active": dataclasses.replace(
        CONFIG,
        rope_scaling=RopeScaling(type="dynamic", factor=2.0),
        max_position_embeddings=16,  # the rows below have 32 tokens
    ),
}


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Import PyTorch here: every process that collects this file would need seconds for it."""
    global torch, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
    import torch
    from transformers import LlamaForCausalLM, PretrainedConfig, PreTrainedModel


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Make (model, its directory in Llama's layout), once for a configuration.

    Every weight is random, biases and norms too.
    """
    made = {}

    def make(config, attn):
        if (config, attn) not in made:
            directory = tmp_path_factory.mktemp("pair") / "llama"
            model = perturbed(
                init(config, seed=1, execution=Execution(dtype=jnp.float32, attn=attn))
            )
            save_hf(model, directory, layout="llama", max_shard_bytes=100_000)
            made[config, attn] = model, directory
        return made[config, attn]

    return make


@pytest.fixture
def pair(request, exported, exact):
    """(ours, PyTorch's) with the same weights; PyTorch's is loaded anew, for it is trained."""
    model, directory = exported(*request.param)
    theirs, report = LlamaForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert not list(directory.glob("*.bin"))
    return model, theirs


def pairs(*names, attns=("xla",)):
    """Parametrizes `pair`."""
    params = [(VARIANTS[name], attn) for name in names for attn in attns]
    ids = [f"{name}-{attn}" for name in names for attn in attns]
    return pytest.mark.parametrize("pair", params, ids=ids, indirect=True)


@pairs(*VARIANTS)
def test_logits_loss_and_every_gradient(pair):
    """For each configuration: groups, biases, tying, rope scalings."""
    compare(*pair)


@pairs("plain", attns=("eager",))
def test_logits_loss_and_every_gradient_with_the_other_attention(pair):
    compare(*pair)


@pairs("plain", "bias_fast")
def test_fifty_steps_of_adamw(pair):
    """The same batches, optax here and torch.optim there: every step's loss within 1e-4."""
    model, theirs = pair
    rate, decay, steps = 3e-3, 0.1, 50
    tx = optax.adamw(rate, 0.9, 0.95, eps=1e-8, weight_decay=decay)

    @jax.jit
    def step(model, state, tokens):
        loss, grads = jax.value_and_grad(loss_of)(model, tokens)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, model)
        return optax.apply_updates(model, updates), state, loss

    rule = torch.optim.AdamW(
        theirs.parameters(), lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay
    )
    state = tx.init(model)
    ours_losses, their_losses = [], []
    for i in range(steps):
        tokens = batch(i % 5, model.config)
        model, state, loss = step(model, state, tokens)
        ours_losses.append(float(loss))
        rule.zero_grad()
        loss = theirs(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss
        loss.backward()
        rule.step()
        their_losses.append(float(loss.detach()))
    assert ours_losses[-1] < 0.6 * ours_losses[0]  # it does train
    np.testing.assert_allclose(ours_losses, their_losses, rtol=1e-4)


@pairs("plain", "dynamic", "bias")
def test_greedy_generation_is_the_same(pair):
    """Id for id, from the KV cache on both sides, within the trained length."""
    model, theirs = pair
    for seed in range(3):
        prompt = batch(seed, model.config)[0, : 9 + 2 * seed].tolist()
        [ours] = generate(model, [prompt], max_new_tokens=24)
        ids = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert ours == ids[0, len(prompt) :].tolist()


def test_transformers_loads_the_shards_of_its_own_layout(tmp_path, tiny_dir):
    """Sharded safetensors with an index, through from_pretrained of a model with these names."""
    tensors = load_file(tiny_dir / "model.safetensors")

    class Named(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            for name, x in tensors.items():
                *owners, last = name.split(".")
                owner = self
                for part in owners:
                    if not hasattr(owner, part):
                        owner.add_module(part, torch.nn.Module())
                    owner = getattr(owner, part)
                owner.register_parameter(last, torch.nn.Parameter(torch.zeros(x.shape)))
            self.post_init()

    save_hf(
        load_hf(tiny_dir, execution=Execution(dtype="float32")),
        tmp_path / "hf",
        max_shard_bytes=150_000,
    )
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    config = PretrainedConfig.from_dict(json.loads((tiny_dir / "config.json").read_text()))
    model, report = Named.from_pretrained(tmp_path / "hf", config=config, output_loading_info=True)
    assert not any(report.values()), report
    for name, x in model.state_dict().items():
        np.testing.assert_array_equal(x.numpy(), tensors[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_files_that_torch_saves_are_read(tmp_path, tiny_dir, dtype, shards):
    """pytorch_model*.bin as torch writes it today, with its own pickling of parameters."""
    tensors = load_file(tiny_dir / "model.safetensors")
    kind = getattr(torch, dtype)
    (tmp_path / "config.json").write_bytes((tiny_dir / "config.json").read_bytes())
    weight_map = {}
    for i in range(shards):
        part = {n: torch.tensor(tensors[n]).to(kind) for n in sorted(tensors)[i::shards]}
        name = next(iter(part))
        part[name] = torch.nn.Parameter(part[name])
        file = f"pytorch_model-{i + 1:05}-of-00002.bin" if shards > 1 else "pytorch_model.bin"
        torch.save(part, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = load_hf(tmp_path, execution=Execution(dtype="float32"))
    for name, weight, i in hf_tensors(model.config):
        got = hf_tensor(model, weight, i)
        want = torch.tensor(tensors[name]).to(kind).float().numpy()
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_torch_files_in_the_old_format_are_refused(tmp_path, tiny_dir):
    (tmp_path / "config.json").write_bytes((tiny_dir / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="torch before 1.6"):
        load_hf(tmp_path)


def compare(model, theirs):
    """Assert that logits, loss and the gradient of every tensor agree."""
    config, tokens = model.config, batch(0, model.config)
    labels = torch.tensor(tokens).long()
    out = theirs(labels, labels=labels)
    out.loss.backward()
    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))(
        model, tokens
    )
    np.testing.assert_allclose(logits, out.logits.detach(), rtol=0, atol=LOGITS)
    np.testing.assert_allclose(float(loss), float(out.loss.detach()), rtol=0, atol=LOSS)
    named = dict(theirs.named_parameters())
    compared = set()
    for name, weight, i in hf_tensors(config):
        shapes = llama.shapes(name, weight.hf_shape(config), config)
        parts = llama.tensors(name, hf_tensor(grads, weight, i), config)
        for their_name, ours in zip(shapes, parts, strict=True):
            want = named[their_name].grad.numpy()
            np.testing.assert_allclose(ours, want, err_msg=their_name, **GRAD)
            compared.add(their_name)
    assert compared == named.keys()


def batch(seed, config):
    """Tokens [2, 32], without the padding id, whose gradient a tied PyTorch model drops."""
    rng = np.random.default_rng(seed)
    return rng.integers(3, config.vocab_size, (2, 32), dtype=np.int32)


def loss_of(model, tokens):
    return loss_and_logits(model, tokens)[0]


def loss_and_logits(model, tokens):
    """Mean over all targets, as LlamaForCausalLM's."""
    logits = model(tokens)
    scores = logits[:, :-1]
    hit = jax.nn.one_hot(tokens[:, 1:], scores.shape[-1], dtype=scores.dtype)
    return (jax.nn.logsumexp(scores, axis=-1) - (scores * hit).sum(axis=-1)).mean(), logits


def hf_tensor(tree, weight, layer):
    owner, name = find_param(tree, weight.path)
    x = np.asarray(getattr(owner, name).get_value())
    return weight.to_hf(x if layer is None else x[layer], tree.config)


@functools.partial(jax.jit)
def perturbed(model):
    """Biases of 0 and norms of 1 would hide a mistake: everything is moved."""
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        x + 0.1 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)
