"""`python -m models.generate DIR --prompt TEXT`: generate text with a model.

B batch, T prompt slots.
"""

import dataclasses
import functools
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import multihost_utils
from jaxtyping import Array

from jaxattn import Impl
from jaxattn.errors import first_line, is_out_of_memory
from models import sharding
from models.cache import SLOTS, capacity_for, decode, prefill
from models.chat import encode_chat
from models.cli import fail, interruptible, parse
from models.config import NO_ID
from models.execution import Execution
from models.internlm2 import InternLM2
from models.sampling import Sampling, sample
from models.terminal import escape_control
from models.tokenizer import Tokenizer, load_given_or
from models.unstack import unstack_layers
from models.weights.hf_files import eos_ids
from models.weights.load import check_loadable, load
from models.weights.train_checkpoint import find_run

NOT_FINITE = -1  # id of a row whose logits have no finite maximum


def generate(
    model: InternLM2,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Continue every prompt; arguments and errors as for `stream` and `Sampling`.

    Returns:
      The new ids of each prompt, without the stop id that ended it.
    """
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    new: list[list[int]] = [[] for _ in prompts]
    for step in stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        seed=seed,
    ):
        for ids, token in zip(new, step, strict=True):
            if token is not None:
                ids.append(token)
    return new


def stream(
    model: InternLM2,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    consume: bool = False,
) -> Iterator[list[int | None]]:
    """Continue every prompt, and yield the new tokens one step at a time.

    Args:
      model: the model; its weights are copied once, in the compute dtype and layer by layer.
      prompts: ids, at least one for each prompt, of any lengths.
      max_new_tokens: upper bound of the new tokens for each prompt.
      sampling: options of sampling.
      stop_ids: a row ends before any of these ids.
      seed: seed of the sampling.
      consume: free the model's memory while its weights are copied; the model cannot be used
        afterwards.

    Yields:
      One id for each prompt, None for prompts that have ended; stops when all have ended.

    Raises:
      ValueError: there are no prompts, a prompt is empty or has an id outside of the vocabulary, or
        max_new_tokens < 1.
      FloatingPointError: the logits are NaN or infinite.
    """
    _check(prompts, model.config.vocab_size, max_new_tokens)
    rows, slots = (sharding.multiple(axis, model.norm_D[...]) for axis in ("batch", "seq"))
    tokens_BT, filled_BT = _left_pad(prompts, rows, math.lcm(SLOTS, slots))
    capacity = capacity_for(tokens_BT.shape[1] + max_new_tokens)
    key = jax.random.key(seed)
    tokens_B, state = _first(model, tokens_BT, filled_BT, key, capacity, sampling)
    jax.block_until_ready(tokens_B)  # a cache that does not fit is an error here; below it hangs
    # Flattened once: flattening takes the host longer than a token takes the device.
    leaves, tree = jax.tree.flatten(unstack_layers(model, consume=consume))
    running = [True] * len(prompts)
    for step in range(1, max_new_tokens + 1):
        current_B = tokens_B
        # Dispatched before the current tokens are fetched: the device never waits for the host.
        if step < max_new_tokens:
            tokens_B, state = _next(leaves, state, current_B, tree, sampling)
        ids = _fetch(current_B)[: len(prompts)].tolist()
        running = [r and i not in stop_ids for r, i in zip(running, ids, strict=True)]
        if any(r and i == NOT_FINITE for r, i in zip(running, ids, strict=True)):
            raise FloatingPointError(
                f"the logits of token {step} are NaN or infinite: the weights are damaged, or "
                f"overflow in {model.execution.dtype} (--dtype=float32 has the largest range)"
            )
        if not any(running):
            return
        yield [i if r else None for r, i in zip(running, ids, strict=True)]


def stop_ids_of(directory: Path, model: InternLM2, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end a text: eos ids of both configs in the directory, and <|im_end|>."""
    ids = {model.config.eos_token_id} - {NO_ID}
    for name in ("config.json", "generation_config.json"):
        ids |= set(eos_ids(directory / name))
    return tuple(sorted(ids | {i for i in (tokenizer.im_end_id,) if i is not None}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue a prompt with an InternLM2 checkpoint."""

    dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """HF directory, orbax directory from models.convert, or a training run, whose latest checkpoint
    is taken, or one of its checkpoints."""

    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """Text to continue."""

    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The prompt is the message of a user in a chat."""

    max_new_tokens: int = 256
    """Upper bound of the new tokens."""

    temperature: float = 0.0
    """Temperature of sampling; 0: always take the most likely token."""

    top_p: float = 1.0
    """Sample from the most likely tokens that together reach this probability."""

    top_k: int = 0
    """Sample from this many of the most likely tokens; 0: from all."""

    seed: int = 0
    """Seed of the sampling."""

    attn: Impl = "auto"
    """Attention implementation of the prefill."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of weights and activations."""

    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="byte|FILE|DIR")] = None
    """byte, a tokenizer.model, or a directory. By default that of DIR, or of the run."""

    adapter: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """PEFT directory of a LoRA adapter for DIR, or a run that trained one."""

    def __post_init__(self):
        """Check the ranges."""
        try:
            _check_new(self.max_new_tokens)
            _ = self.sampling
        except ValueError as error:
            raise ValueError(f"--{error}") from error

    @property
    def sampling(self) -> Sampling:
        """Options of sampling.

        Raises:
          ValueError: a value is out of its range.
        """
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)


@interruptible
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0; 1 for an error; 2 for wrong flags."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        config = parse(GenerateConfig, sys.argv[1:] if argv is None else argv, "models.generate")
    except ValueError as error:
        return fail(error, 2)
    try:
        _generate(config)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # `interruptible` handles it
    except (ValueError, NotImplementedError, OSError, FloatingPointError) as error:
        return fail(error, 1)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        remedy = "a smaller --max_new_tokens needs less"
        return fail(f"out of memory for weights and KV cache; {remedy}: {first_line(error)}", 1)
    return 0


def _generate(config: GenerateConfig) -> None:
    dir, dtype = config.dir, config.dtype
    if not dir.is_dir():
        raise ValueError(f"{dir} does not exist: give a HF directory, or a training run")
    tok = _tokenizer(dir, config.tokenizer)
    execution = Execution(attn=config.attn, dtype=dtype, param_dtype=dtype)
    model = load(dir, execution=execution, adapter=config.adapter)
    if tok.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer {tok.name} has {tok.vocab_size} ids, the model only "
            f"{model.config.vocab_size}: give the tokenizer that the model was trained with "
            "(--tokenizer)"
        )
    if config.chat:
        ids = encode_chat([("user", config.prompt)], tok)
    else:
        ids = [tok.bos_id, *tok.encode(config.prompt)]
    show = escape_control if sys.stdout.isatty() else str
    new: list[int] = []
    shown = ""
    for step in stream(
        model,
        [ids],
        max_new_tokens=config.max_new_tokens,
        sampling=config.sampling,
        stop_ids=stop_ids_of(dir, model, tok),
        seed=config.seed,
        consume=True,
    ):
        new += [token for token in step if token is not None]
        text = tok.decode(new, skip_special=True)
        # A character of several tokens is printed when all its bytes are there.
        if text.startswith(shown) and not text.endswith("�"):
            print(show(text[len(shown) :]), end="", flush=True)
            shown = text
    print(show(tok.decode(new, skip_special=True)[len(shown) :]))


def _tokenizer(directory: Path, spec: str | None) -> Tokenizer:
    """Load --tokenizer, or the tokenizer of the directory or the run."""
    run = find_run(directory)
    if run is None:
        check_loadable(directory)
        if not (directory / "config.json").exists():
            raise ValueError(
                f"{directory} is no model: it has no config.json, and no checkpoints of a run"
            )
    own = directory if run is None else run.tokenizer_spec or directory
    tokenizer = load_given_or(spec, own)
    if run is not None and run.tokenizer not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"tokenizer {tokenizer.name} is not the one that {directory} was trained with, which "
            f"was {own}: name that one with --tokenizer"
        )
    return tokenizer


@functools.partial(jax.jit, static_argnames=("capacity", "sampling"))
def _first(model, tokens_BT, filled_BT, key, capacity: int, sampling: Sampling):
    """Prefill; return the first new tokens and the state (cache, key, step) of the next step."""
    logits_BV, cache = prefill(model, tokens_BT, filled_BT, capacity=capacity)
    return _sample(logits_BV, key, sampling), (cache, key, jnp.int32(1))


@functools.partial(jax.jit, static_argnames=("tree", "sampling"), donate_argnames="state")
def _next(leaves, state, tokens_B, tree, sampling: Sampling):
    """Decode one token in each row; leaves and tree are a model from `unstack_layers`."""
    cache, key, step = state
    logits_BV, cache = decode(jax.tree.unflatten(tree, leaves), cache, tokens_B)
    new_B = _sample(logits_BV, jax.random.fold_in(key, step), sampling)
    return new_B, (cache, key, step + 1)


def _sample(logits_BV, key, sampling: Sampling):
    finite_B = jnp.isfinite(logits_BV.max(axis=-1))  # the maximum is NaN if any logit is
    return jnp.where(finite_B, sample(logits_BV, key, sampling), NOT_FINITE)


def _fetch(a: Array) -> np.ndarray:
    """Fetch a whole array, parts on other processes included; all processes call this."""
    if a.is_fully_addressable:
        return np.asarray(a)
    return np.asarray(multihost_utils.process_allgather(a, tiled=True))


def _check(prompts: Sequence[Sequence[int]], vocab_size: int, max_new_tokens: int) -> None:
    _check_new(max_new_tokens)
    if len(prompts) == 0 or not all(len(p) for p in prompts):
        raise ValueError("every prompt must have at least one id: give bos for an empty text")
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise ValueError(f"prompt {i} is text, must be ids: give those of tokenizer.encode")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"prompt {i} has ids outside 0 .. {vocab_size - 1} of the model")


def _check_new(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")


def _left_pad(
    prompts: Sequence[Sequence[int]], of_rows: int, of_slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, filled), int32, padded to multiples; filler rows have a single token."""
    rows = _round_up(len(prompts), of_rows)
    slots = _round_up(max(len(p) for p in prompts), of_slots)
    tokens_BT = np.zeros((rows, slots), np.int32)
    filled_BT = np.zeros((rows, slots), np.int32)
    filled_BT[:, -1] = 1
    for row, prompt in enumerate(prompts):
        tokens_BT[row, -len(prompt) :] = prompt
        filled_BT[row, -len(prompt) :] = 1
    return tokens_BT, filled_BT


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


if __name__ == "__main__":
    sys.exit(main())
