"""Generate a sample of text from the trained model."""

import logging

import jax
from flax import nnx
from jax.experimental import multihost_utils

from models.generate import generate
from train.atomic import replace_text
from train.data.pack.packing import Batch
from train.run.resolve import Run
from train.step.state import Params

log = logging.getLogger(__name__)

PROMPT_TOKENS, SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 32, 200, 0.8


def write_sample(run: Run, graphdef: nnx.GraphDef, params: Params, batch: Batch) -> None:
    """Continue the beginning of a training row, and write the text to the log and to sample.txt."""
    prompt = multihost_utils.broadcast_one_to_all(batch.tokens[0, :PROMPT_TOKENS]).tolist()
    try:
        [tokens] = generate(
            nnx.merge(graphdef, params),
            [prompt],
            max_new_tokens=SAMPLE_TOKENS,
            temperature=SAMPLE_TEMPERATURE,
            seed=run.config.seed,
        )
    except FloatingPointError as error:
        log.warning(f"no sample after {run.steps} steps: {error}")
        return
    decode = run.tokenizer.decode
    text = f"{decode(prompt)}|{decode(tokens)}"
    if jax.process_index() == 0:
        replace_text(run.out / "sample.txt", text + "\n")
    log.info(f"sample after {run.steps} steps (the prompt ends at |):\n{text}")
