"""Parse a window of steps, the value of `--profile`."""


def parse_window(text: str) -> tuple[int, int]:
    """Parse START:STOP into the first and the last step, both included.

    Raises:
        ValueError: The text is not two positive numbers in order.
    """
    first, colon, last = text.partition(":")
    try:
        window = int(first), int(last)
    except ValueError:
        window = 0, 0
    if not colon or not 1 <= window[0] <= window[1]:
        raise ValueError(f"--profile={text} must be START:STOP, steps from 1, such as 10:12")
    return window
