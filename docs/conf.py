"""Sphinx configuration. Build with `make docs`; the pages are MyST Markdown."""

import contextlib
import io
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import jaxattn  # noqa: E402  (after the path)
from train.main import main as train_main  # noqa: E402

project = "internlm2-jax"
author = "internlm2-jax maintainers"
version = release = jaxattn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "_generated"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "code"  # `name` in a docstring is code
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88

smartquotes = False  # "--flag" stays as it is

html_theme = "sphinx_book_theme"
html_title = f"internlm2-jax {version}"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}


def setup(app) -> None:
    """Register the hook for docstrings and write the generated pages."""
    app.connect("autodoc-process-docstring", _as_in_the_source, priority=400)  # before napoleon
    _write_help(HERE / "_generated" / "train_help.txt")


def _as_in_the_source(app, what, name, obj, options, lines: list[str]) -> None:
    """Let docstrings look as they do in the source, where that is not reStructuredText.

    An indented block after "...:" and a blank line is literal. The bars of <|im_end|> are text.
    """
    for i, line in enumerate(lines[:-2]):
        blank, block = lines[i + 1 : i + 3]
        deeper = len(block) - len(block.lstrip()) > len(line) - len(line.lstrip())
        if line.endswith(":") and not line.endswith("::") and not blank and block and deeper:
            lines[i] = f"{line}:"
    for i, line in enumerate(lines):
        parts = line.split("`")  # those with an odd index are code already
        parts[::2] = [part.replace("<|", r"<\|").replace("|>", r"\|>") for part in parts[::2]]
        lines[i] = "`".join(parts)


def _write_help(path: pathlib.Path) -> None:
    """Write `python -m train.main --help`, so that the page of flags is that of the code."""
    os.environ["COLUMNS"] = "96"
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        train_main(["--help"])
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.getvalue())
