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


def quiet_orbax() -> None:
    """Keeps pages of traceback off the screen for what is raised as an exception anyway."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # What is read beside a part that cannot be read is given up.
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    usual = sys.unraisablehook

    def hook(unraisable) -> None:
        # Writes that end after the save they belong to has failed find its event loop closed.
        if "Event loop is closed" not in str(unraisable.exc_value):
            usual(unraisable)

    if usual.__module__ != __name__:
        sys.unraisablehook = hook


def cause(error: Exception) -> str:
    """The system's own words where they are inside, else the first line."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, OSError):
        return text
    return next((words for words in _SYSTEM_WORDS if words in text), text[:300])
