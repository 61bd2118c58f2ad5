"""Runs of recipes/distill.py one after another in the processes of one group, which import everything once.

python tests/helpers/distill_runs.py FOLDER, with jobs.json in it: a list of {"words", "port", "copied": [from, to]}
"""

import contextlib
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from coss_hf.utils.distributed import leave
from recipes.distill import main


def run(words: list[str], port: int, copied: list[str] = ()) -> dict:
    """One run: its exit code and what it said. ``copied`` is a folder that it finds."""
    if copied and os.environ["RANK"] == "0":
        shutil.copytree(copied[0], f"{copied[1]}.part")
        os.rename(f"{copied[1]}.part", copied[1])
    while copied and not Path(copied[1]).exists():
        time.sleep(0.01)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = ["distill.py", *words]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    leave()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    done = [run(**job) for job in json.loads((folder / "jobs.json").read_text())]
    (folder / f"done-{os.environ['RANK']}.json").write_text(json.dumps(done))
