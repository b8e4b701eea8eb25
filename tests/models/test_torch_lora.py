"""Live parity with peft: the same adapters on transformers' LlamaForCausalLM and here.

Needs the torch extra. In Llama's layout q, k and v have an adapter each. They share one A here, so
their A is one tensor in PyTorch, too, wherever they are trained.
"""

import importlib.util

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from models.config import ModelConfig
from models.execution import Execution
from models.internlm2 import init
from models.lora import LoRA, LoRAParam, adapter_params
from models.weights.adapter_files import load_adapter, save_adapter
from models.weights.save import save_hf
from tests.models.test_lora import with_values

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("torch", "peft"))),
        reason="needs PyTorch: pip install -e '.[torch]'",
    ),
    pytest.mark.filterwarnings("default"),  # those of other projects
    pytest.mark.usefixtures("one_torch_thread"),
]

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
ADAPTERS = LoRA(rank=4, alpha=8.0)


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Import PyTorch here: every process that collects this file would need seconds for it."""
    global peft, torch, LlamaForCausalLM
    import peft
    import torch
    from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Make a base model here, and its directory in Llama's layout."""
    directory = tmp_path_factory.mktemp("base") / "llama"
    execution = Execution(dtype="float32", attn="xla", lora=ADAPTERS)
    model = with_values(init(CONFIG, seed=1, execution=execution))
    save_hf(model, directory, layout="llama")
    return model, directory


@pytest.fixture
def pair(base, tmp_path, exact):
    """(ours, PyTorch's) with the adapter that was written here and read by peft."""
    model, directory = base
    path = tmp_path / "adapter"
    params = adapter_params(model)
    save_adapter(path, CONFIG, ADAPTERS, params, base=str(directory), layout="llama")
    theirs = LlamaForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(theirs, path, is_trainable=True)
    for layer in theirs.base_model.model.model.layers:
        attention = layer.self_attn
        for part in (attention.k_proj, attention.v_proj):
            part.lora_A["default"].weight = attention.q_proj.lora_A["default"].weight
    return model, theirs


def batch(seed):
    rng = np.random.default_rng(seed)
    return rng.integers(3, CONFIG.vocab_size, (2, 32), dtype=np.int32)


@jax.jit
def logits(model, tokens):
    """Compute the logits in one program."""
    return model(tokens)


def loss_of(graphdef, trained, frozen, tokens):
    """Mean over all targets, as LlamaForCausalLM's."""
    logits = nnx.merge(graphdef, trained, frozen)(tokens)[:, :-1]
    hit = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1], dtype=logits.dtype)
    return (jax.nn.logsumexp(logits, axis=-1) - (logits * hit).sum(axis=-1)).mean()


def test_logits_loss_and_gradients(pair):
    """An adapter written here is read by peft: logits, loss and every adapter gradient agree."""
    model, theirs = pair
    tokens = batch(0)
    labels = torch.tensor(tokens).long()
    out = theirs(labels, labels=labels)
    out.loss.backward()
    np.testing.assert_allclose(logits(model, tokens), out.logits.detach(), rtol=0, atol=1e-4)
    graphdef, trained, frozen = nnx.split(model, LoRAParam, ...)
    gradients = jax.jit(jax.value_and_grad(loss_of, argnums=1), static_argnums=0)
    loss, grads = gradients(graphdef, trained, frozen, tokens)
    np.testing.assert_allclose(float(loss), float(out.loss.detach()), rtol=1e-5)
    grads = adapter_params(nnx.merge(graphdef, grads, frozen))
    layer = theirs.base_model.model.model.layers[1]
    names = {"wo": layer.self_attn.o_proj, "w1": layer.mlp.gate_proj, "w2": layer.mlp.down_proj}
    names |= {"w3": layer.mlp.up_proj}
    for target, module in names.items():
        a, b = (np.asarray(x[1]) for x in grads[target])
        a, b = a.reshape(-1, ADAPTERS.rank).T, b.reshape(ADAPTERS.rank, -1).T
        for ours, want in ((a, module.lora_A), (b, module.lora_B)):
            np.testing.assert_allclose(
                ours, want["default"].weight.grad, rtol=1e-4, atol=2e-6, err_msg=target
            )
    shared = np.asarray(grads["wqkv"][0][1]).T
    want = layer.self_attn.q_proj.lora_A["default"].weight.grad
    np.testing.assert_allclose(shared, want, rtol=1e-4, atol=2e-6)
    k = np.asarray(grads["wqkv"][1][1])[:, :, -2].reshape(ADAPTERS.rank, -1).T
    want = layer.self_attn.k_proj.lora_B["default"].weight.grad
    np.testing.assert_allclose(k, want, rtol=1e-4, atol=2e-6)


def test_fifty_steps_of_adamw(pair):
    """Optax here and torch.optim there train the same adapters: every loss within 1e-4."""
    model, theirs = pair
    rate, steps = 3e-3, 50
    tx = optax.adamw(rate, 0.9, 0.999, eps=1e-8, weight_decay=0.0)
    graphdef, trained, frozen = nnx.split(model, LoRAParam, ...)

    @jax.jit
    def step(trained, state, tokens):
        loss, grads = jax.value_and_grad(loss_of, argnums=1)(graphdef, trained, frozen, tokens)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    learned = [p for p in theirs.parameters() if p.requires_grad]
    rule = torch.optim.AdamW(learned, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    state, ours_losses, their_losses = tx.init(trained), [], []
    for i in range(steps):
        tokens = batch(i % 3)
        trained, state, loss = step(trained, state, tokens)
        ours_losses.append(float(loss))
        rule.zero_grad()
        loss = theirs(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss
        loss.backward()
        rule.step()
        their_losses.append(float(loss.detach()))
    assert ours_losses[-1] < 0.9 * ours_losses[0]  # it does train
    np.testing.assert_allclose(ours_losses, their_losses, rtol=1e-4)


def test_what_peft_writes_is_read(pair, tmp_path):
    """Peft's own file gives the arrays and the numbers back."""
    model, theirs = pair
    theirs.save_pretrained(tmp_path / "theirs")
    lora, params = load_adapter(tmp_path / "theirs", CONFIG)
    assert lora == ADAPTERS
    for target, arrays in adapter_params(model).items():
        for got, want in zip(params[target], arrays, strict=True):
            np.testing.assert_array_equal(got, np.asarray(want))


def test_peft_merges_to_what_the_adapter_computes(pair):
    """merge_and_unload of peft gives our logits with the adapter."""
    model, theirs = pair
    tokens = batch(1)
    merged = theirs.merge_and_unload()
    got = merged(torch.tensor(tokens).long()).logits.detach()
    np.testing.assert_allclose(logits(model, tokens), got, rtol=0, atol=1e-4)
