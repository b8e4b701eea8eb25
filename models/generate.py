"""python -m models.generate DIR --prompt TEXT: text from a model.

B batch, T prompt slots, V vocab.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from models import sharding
from models.cache import KVCache, decode, prefill
from models.chat import encode_chat
from models.hf_files import read_json
from models.internlm2 import InternLM2
from models.load import load
from models.tokenizer import Tokenizer, load_tokenizer

# Prompts and cache are padded to a multiple of this many slots, so that similar requests share
# one compilation.
SLOTS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: 0 takes the most likely token; otherwise logits are divided by it.
      top_k: only the k most likely; 0: all.
      top_p: only the most likely that together reach this probability; 1: all.

    Raises:
      ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0 (0: greedy)")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (1: all tokens)")


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
    """Continues every prompt; arguments as `stream` and `Sampling`.

    Returns:
      New ids of each prompt, without the stop id that ended it.
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
) -> Iterator[list[int | None]]:
    """Continues every prompt, and yields the new tokens as they come.

    Args:
      model: weights that are stored wider than the compute type are copied once in that type.
      prompts: ids, at least one each, of any lengths.
      max_new_tokens: at most this many new tokens a prompt.
      sampling: how tokens are chosen.
      stop_ids: a row ends before any of these.
      seed: of the sampling.

    Yields:
      One id for each prompt, None for those that have ended; stops when all have.

    Raises:
      ValueError: no prompts, an empty one, an id beyond the vocabulary, or max_new_tokens < 1.
    """
    _check(prompts, model.config.vocab_size, max_new_tokens)
    model = _in_compute_type(model)
    tokens_BT, filled_BT = _left_pad(prompts, sharding.batch_multiple(model.norm_D[...]))
    capacity = _round_up(tokens_BT.shape[1] + max_new_tokens, SLOTS)
    key = jax.random.key(seed)
    tokens_B, cache = _first(model, tokens_BT, filled_BT, key, capacity, sampling)
    running = [True] * len(prompts)
    for step in range(1, max_new_tokens + 1):
        current_B = tokens_B
        if step < max_new_tokens:  # sent off before the current tokens are waited for
            tokens_B, cache = _next(
                model, cache, current_B, jax.random.fold_in(key, step), sampling
            )
        ids = _fetch(current_B)[: len(prompts)].tolist()
        running = [r and i not in stop_ids for r, i in zip(running, ids, strict=True)]
        if not any(running):
            return
        yield [i if r else None for r, i in zip(running, ids, strict=True)]


def _fetch(a: Array) -> np.ndarray:
    """All of an array, also where other processes hold parts of it; all of them call this."""
    if a.is_fully_addressable:
        return np.asarray(a)
    return np.asarray(multihost_utils.process_allgather(a, tiled=True))


def sample(logits_BV: Float[Array, "B V"], key: Array, sampling: Sampling) -> Int[Array, " B"]:
    """The next token of each row, int32; top_k applies before top_p, both after temperature.

    References:
      Holtzman et al. 2020, arXiv:1904.09751 (top-p).
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        smallest_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays while those before it have not reached top_p: the first always does.
        stays_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < sampling.top_p
        smallest_B1 = jnp.where(stays_BV, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def stop_ids_of(directory: Path, model: InternLM2, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a text: the eos ids of both configs in the directory, and <|im_end|>."""
    path = directory / "generation_config.json"
    named = read_json(path).get("eos_token_id", []) if path.exists() else []
    ids = {model.config.eos_token_id, *(named if isinstance(named, list) else [named])}
    return tuple(sorted(ids | {i for i in (tokenizer.im_end_id,) if i is not None}))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.generate",
        description="Continue a prompt with an InternLM2 checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("dir", metavar="DIR", help="HF directory, or one from models.convert")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="at most this many tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest")
    parser.add_argument("--top_p", type=float, default=1.0, help="probability mass to sample from")
    parser.add_argument("--top_k", type=int, default=0, help="tokens to sample from; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--attn", default="auto", help="attention implementation of the prefill")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        help="type of weights and compute",
        choices=("bfloat16", "float16", "float32"),
    )
    parser.add_argument("--tokenizer", help="byte, a tokenizer.model or a directory; else DIR's")
    return parser


def _run(args: argparse.Namespace) -> None:
    directory = Path(args.dir)
    sampling = Sampling(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
    tokenizer = load_tokenizer(args.tokenizer or directory)
    model = load(directory, dtype=args.dtype, attn=args.attn)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model only "
            f"{model.config.vocab_size}: give the tokenizer it was trained with"
        )
    if args.chat:
        prompt = encode_chat([("user", args.prompt)], tokenizer)
    else:
        prompt = [tokenizer.bos_id, *tokenizer.encode(args.prompt)]
    new: list[int] = []
    shown = ""
    for step in stream(
        model,
        [prompt],
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids_of(directory, model, tokenizer),
        seed=args.seed,
    ):
        new += [token for token in step if token is not None]
        text = tokenizer.decode(new, skip_special=True)
        # A character whose bytes have not all come yet is shown when they have.
        if text.startswith(shown) and not text.endswith("�"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(new, skip_special=True)[len(shown) :])


@functools.partial(jax.jit, static_argnames=("capacity", "sampling"))
def _first(model, tokens_BT, filled_BT, key, capacity: int, sampling: Sampling):
    logits_BV, cache = prefill(model, tokens_BT, filled_BT, capacity=capacity)
    return sample(logits_BV, key, sampling), cache


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def _next(model, cache: KVCache, tokens_B, key, sampling: Sampling):
    logits_BV, cache = decode(model, cache, tokens_B)
    return sample(logits_BV, key, sampling), cache


@jax.jit
def _in_compute_type(model: InternLM2) -> InternLM2:
    return jax.tree.map(lambda w: w.astype(model.dtype), model)


def _check(prompts: Sequence[Sequence[int]], vocab_size: int, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("every prompt must have at least one id: give bos for an empty text")
    for i, prompt in enumerate(prompts):
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"prompt {i} has ids outside 0 .. {vocab_size - 1} of the model")


def _left_pad(prompts: Sequence[Sequence[int]], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, filled), int32; rows to make up the multiple hold a single token."""
    rows = _round_up(len(prompts), multiple)
    slots = _round_up(max(len(p) for p in prompts), SLOTS)
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
