"""Command lines: parsing, and exit codes of errors."""

import logging
import os

# Before tqdm is imported: no bar for what takes no time, in this project's steps and in those of its libraries.
os.environ.setdefault("TQDM_DELAY", "2")

from coss_hf.utils.errors import bad_input_exits, stopped_run_exits
from coss_hf.utils.lazy import lazy_names

__all__ = ["bad_input_exits", "log_to_console", "parse", "stopped_run_exits"]
__getattr__ = lazy_names(__name__, {"parse": "parser"})


def log_to_console() -> None:
    """Show log lines of a command as plain text."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("faiss").setLevel(logging.WARNING)  # which of its builds it tries to load
