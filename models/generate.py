"""python -m models.generate DIR --prompt TEXT: text from a model.

B batch, T prompt slots.
"""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from jaxattn.errors import first_line, is_out_of_memory
from models import sharding
from models.cache import SLOTS, capacity_for, decode, prefill
from models.chat import encode_chat
from models.config import NO_ID
from models.internlm2 import InternLM2
from models.sampling import Sampling, sample
from models.tokenizer import Tokenizer, load_tokenizer
from models.unstack import taken_apart
from models.weights.hf_files import eos_ids
from models.weights.load import load


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
    consume: bool = False,
) -> Iterator[list[int | None]]:
    """Continues every prompt, and yields the new tokens as they come.

    Args:
      model: its weights are copied once, in the compute type and layer by layer.
      prompts: ids, at least one each, of any lengths.
      max_new_tokens: at most this many new tokens a prompt.
      sampling: how tokens are chosen.
      stop_ids: a row ends before any of these.
      seed: of the sampling.
      consume: free the model's memory while they are copied; it cannot be used afterwards.

    Yields:
      One id for each prompt, None for those that have ended; stops when all have.

    Raises:
      ValueError: no prompts, an empty one, an id beyond the vocabulary, or max_new_tokens < 1.
    """
    _check(prompts, model.config.vocab_size, max_new_tokens)
    tokens_BT, filled_BT = _left_pad(prompts, sharding.batch_multiple(model.norm_D[...]))
    capacity = capacity_for(tokens_BT.shape[1] + max_new_tokens)
    key = jax.random.key(seed)
    tokens_B, state = _first(model, tokens_BT, filled_BT, key, capacity, sampling)
    jax.block_until_ready(tokens_B)  # a cache that does not fit is an error here, below it hangs
    # Flattened once: for every token it would take the host longer than the device.
    leaves, tree = jax.tree.flatten(taken_apart(model, consume=consume))
    running = [True] * len(prompts)
    for step in range(1, max_new_tokens + 1):
        current_B = tokens_B
        # Sent off before the current tokens are waited for: the device never waits for the host.
        if step < max_new_tokens:
            tokens_B, state = _next(leaves, state, current_B, tree, sampling)
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


def stop_ids_of(directory: Path, model: InternLM2, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a text: the eos ids of both configs in the directory, and <|im_end|>."""
    ids = {model.config.eos_token_id} - {NO_ID}
    for name in ("config.json", "generation_config.json"):
        ids |= set(eos_ids(directory / name))
    return tuple(sorted(ids | {i for i in (tokenizer.im_end_id,) if i is not None}))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(
            "error: out of memory for weights and the cache of keys and values; a smaller "
            f"--max_new_tokens ({args.max_new_tokens}) needs less: {first_line(error)}",
            file=sys.stderr,
        )
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
    if not directory.is_dir():
        raise ValueError(f"{directory} does not exist: give a HF directory or models.convert's")
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
        consume=True,
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
    """The first new tokens, and the state (cache, key, step) that the others come from."""
    logits_BV, cache = prefill(model, tokens_BT, filled_BT, capacity=capacity)
    return sample(logits_BV, key, sampling), (cache, key, jnp.int32(1))


@functools.partial(jax.jit, static_argnames=("tree", "sampling"), donate_argnames="state")
def _next(leaves, state, tokens_B, tree, sampling: Sampling):
    """One token more in each row; leaves and tree are a model that is `taken_apart`."""
    cache, key, step = state
    logits_BV, cache = decode(jax.tree.unflatten(tree, leaves), cache, tokens_B)
    new_B = sample(logits_BV, jax.random.fold_in(key, step), sampling)
    return new_B, (cache, key, step + 1)


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
