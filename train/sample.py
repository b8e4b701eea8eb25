"""A sample of text from what was trained."""

from flax import nnx

from models.generate import generate
from train.announce import say
from train.config import Config
from train.data import Batch
from train.defaults import Settled
from train.state import Params

PROMPT_TOKENS, SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 32, 200, 0.8


def write_sample(
    config: Config, settled: Settled, graphdef: nnx.GraphDef, params: Params, batch: Batch
) -> None:
    """Lets the model go on from the beginning of a training row, and writes it down."""
    prompt = [int(t) for t in batch.tokens[0, :PROMPT_TOKENS]]
    [tokens] = generate(
        nnx.merge(graphdef, params),
        [prompt],
        max_new_tokens=SAMPLE_TOKENS,
        temperature=SAMPLE_TEMPERATURE,
        seed=config.seed,
    )
    decode = settled.tokenizer.decode
    text = f"{decode(prompt)}|{decode(tokens)}"
    (settled.out / "sample.txt").write_text(text + "\n")
    say(f"sample after {config.steps} steps (the prompt ends at |):\n{text}")
