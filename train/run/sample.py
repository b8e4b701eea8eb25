"""A sample of text from what was trained."""

import jax
from flax import nnx
from jax.experimental import multihost_utils

from models.generate import generate
from train.atomic import replace_text
from train.config.config import Config
from train.data import Batch
from train.log import say
from train.run.resolve import Settled
from train.step.state import Params

PROMPT_TOKENS, SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 32, 200, 0.8


def write_sample(
    config: Config, settled: Settled, graphdef: nnx.GraphDef, params: Params, batch: Batch
) -> None:
    """Lets the model go on from the beginning of a training row, and writes it down."""
    prompt = multihost_utils.broadcast_one_to_all(batch.tokens[0, :PROMPT_TOKENS]).tolist()
    [tokens] = generate(
        nnx.merge(graphdef, params),
        [prompt],
        max_new_tokens=SAMPLE_TOKENS,
        temperature=SAMPLE_TEMPERATURE,
        seed=config.seed,
    )
    decode = settled.tokenizer.decode
    text = f"{decode(prompt)}|{decode(tokens)}"
    if jax.process_index() == 0:
        replace_text(settled.out / "sample.txt", text + "\n")
    say(f"sample after {config.steps} steps (the prompt ends at |):\n{text}")
