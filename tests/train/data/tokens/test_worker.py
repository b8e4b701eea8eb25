"""Worker processes start at the same time."""

import subprocess
import sys


def test_the_module_of_a_worker_imports_nothing_large():
    """Whoever starts a worker waits until this module is imported."""
    code = "import sys, train.data.tokens.worker; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
