"""A stretch of steps, as `--profile` names it."""


def parse_window(text: str) -> tuple[int, int]:
    """START:STOP -> the first and the last step, both included.

    Raises:
        ValueError: not two numbers, or not in order.
    """
    first, colon, last = text.partition(":")
    try:
        window = int(first), int(last)
    except ValueError:
        window = 0, 0
    if not colon or not 1 <= window[0] <= window[1]:
        raise ValueError(f"--profile={text} must be START:STOP, steps from 1, such as 10:12")
    return window
