"""Generate samples for fixed prompts during training."""

import logging
from pathlib import Path

from flax import nnx

from models.chat import encode_chat
from models.files import check_file
from models.generate import generate
from models.tokenizer import Tokenizer
from train.metrics.records import Records
from train.step.state import Params

log = logging.getLogger(__name__)

NEW_TOKENS = 100


def read_prompts(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the prompts of --prompts; the name of a .txt file gives its lines.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is empty, not UTF-8, not regular, or a pointer of Git LFS.
    """
    texts = []
    for prompt in prompts:
        if not prompt.endswith(".txt"):
            texts.append(prompt)
            continue
        if Path(prompt).exists():  # reading reports a missing file
            try:
                check_file(Path(prompt))
            except ValueError as error:
                raise ValueError(f"--prompts {error}") from error
        try:
            content = Path(prompt).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {prompt} is not UTF-8: {error}") from error
        lines = [line for line in content.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"--prompts {prompt} has no line of text")
        texts += lines
    return tuple(texts)


class Sampler:
    """Continue the prompts greedily, so that steps can be compared, and write samples.jsonl.

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
        """Tokenize the prompts; open samples.jsonl at `path`, without lines of steps after `start`.

        With `chat` a prompt is a user's message to answer, else a text to continue. The graphdef is
        the model's, from `train.step.state.abstract_state`.

        Raises:
            ValueError: chat is True and the tokenizer has no chat tokens.
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
        self._records = Records(path, start=start)

    def __call__(self, step: int, params: Params) -> None:
        """Generate one text for each prompt after `step` steps; log and record the texts."""
        model = nnx.merge(self._graphdef, params)
        try:
            new = generate(model, self._ids, max_new_tokens=NEW_TOKENS, stop_ids=self._stop)
        except FloatingPointError as error:
            log.warning("step %s: no samples: %s", step, error)
            return
        texts = [self._tokenizer.decode(ids) for ids in new]
        pairs = list(zip(self._prompts, texts, strict=True))
        self._records.write(*({"step": step, "prompt": p, "text": t} for p, t in pairs))
        for prompt, text in pairs:
            log.info("step %s, sample for %r: %r", step, prompt, text)
