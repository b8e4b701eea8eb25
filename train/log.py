"""Lines of the log; of several processes only the first one writes them."""

import jax
from tqdm import tqdm


def say(text: object) -> None:
    """Prints a line; of several processes only the first one does."""
    if jax.process_index() == 0:
        print(text, flush=True)


def note(text: str) -> None:
    """The same while the progress bar is shown, above it."""
    if jax.process_index() == 0:
        tqdm.write(text)
