"""Where results go, checked while arguments are read: not after the work."""

import argparse
import pathlib


def output_file(text: str) -> pathlib.Path:
    """A path that can be written, as argparse's `type`.

    Raises:
      argparse.ArgumentTypeError: its directory does not exist, or it is one itself.
    """
    path = pathlib.Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory, must be a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is no directory: make it first")
    return path


def picture_file(text: str) -> pathlib.Path:
    """As `output_file`, in a format that matplotlib draws.

    Raises:
      argparse.ArgumentTypeError: it draws no such format, or is not installed.
    """
    path = output_file(text)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise argparse.ArgumentTypeError(f"plots need matplotlib: {error}") from error
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise argparse.ArgumentTypeError(f"{path} must end in one of .{', .'.join(sorted(known))}")
    return path
