"""Command lines: parsing, and exit codes of errors."""

from coss_hf.utils.errors import bad_input_exits, stopped_run_exits
from coss_hf.utils.lazy import lazy_names

__all__ = ["bad_input_exits", "parse", "stopped_run_exits"]
__getattr__ = lazy_names(__name__, {"parse": "parser"})
