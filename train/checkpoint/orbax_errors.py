"""What goes wrong inside orbax, as one line."""

import logging
import sys
import warnings

_SYSTEM_WORDS = (
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
    "Permission denied",
)
# What ends after the checkpoint that it belongs to was given up: a write that finds its event loop
# closed, a read that is thrown away half done.
_LEFT_BEHIND = ("Event loop is closed", "Encountered error while reading array index")


def quiet_orbax() -> None:
    """Keeps pages of traceback off the screen for what is raised as an exception anyway."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # What is read beside a part that cannot be read is given up.
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    usual = sys.unraisablehook

    def hook(unraisable) -> None:
        if not any(words in str(unraisable.exc_value) for words in _LEFT_BEHIND):
            usual(unraisable)

    if usual.__module__ != __name__:
        sys.unraisablehook = hook


def cause(error: Exception) -> str:
    """The system's own words where they are inside, else the first line."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, OSError):
        return text
    return next((words for words in _SYSTEM_WORDS if words in text), text[:300])
