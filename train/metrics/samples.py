"""What the model says to fixed prompts, every so many steps."""

from pathlib import Path

from flax import nnx

from models.chat import encode_chat
from models.generate import generate
from models.tokenizer import Tokenizer
from train.metrics.records import Records
from train.step.state import Params

NEW_TOKENS = 100


def read_prompts(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """Prompts as typed; one that names a .txt file stands for its lines.

    Raises:
        OSError: such a file cannot be read.
        ValueError: it is empty.
    """
    texts = []
    for prompt in prompts:
        if not prompt.endswith(".txt"):
            texts.append(prompt)
            continue
        lines = [line for line in Path(prompt).read_text().splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"--prompts {prompt} has no line of text")
        texts += lines
    return tuple(texts)


class Sampler:
    """Continues the prompts greedily, so that steps can be compared; writes samples.jsonl.

    A line has step, prompt and text.
    """

    def __init__(
        self,
        prompts: tuple[str, ...],
        *,
        chat: bool,
        graphdef: nnx.GraphDef,
        tokenizer: Tokenizer,
        path: Path,
        start: int,
    ):
        """Lines after `start`, of a run that died, are dropped.

        Args:
            prompts: texts.
            chat: each is a user's message, to be answered, and not a text to go on with.
            graphdef: the model's, from `train.step.state.abstract_state`.
            tokenizer: the run's.
            path: of samples.jsonl; there only if there are prompts.
            start: step the run goes on from.

        Raises:
            ValueError: chat, and the tokenizer has no chat tokens.
        """
        self._prompts, self._graphdef, self._tokenizer = prompts, graphdef, tokenizer
        self._ids = [
            encode_chat([("user", text)], tokenizer)
            if chat
            else [tokenizer.bos_id, *tokenizer.encode(text)]
            for text in prompts
        ]
        ends = (tokenizer.eos_id, tokenizer.im_end_id)
        self._stop = tuple(i for i in ends if i is not None)
        self._records = Records(path, start=start) if prompts else None

    def __call__(self, step: int, params: Params) -> list[str]:
        """What the model says after `step` steps, one text for each prompt."""
        model = nnx.merge(self._graphdef, params)
        new = generate(model, self._ids, max_new_tokens=NEW_TOKENS, stop_ids=self._stop)
        texts = [self._tokenizer.decode(ids) for ids in new]
        if self._records is not None:
            pairs = zip(self._prompts, texts, strict=True)
            self._records.write(*({"step": step, "prompt": p, "text": t} for p, t in pairs))
        return texts
