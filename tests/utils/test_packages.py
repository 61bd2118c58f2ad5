"""Installed packages, next to scripts of the same name."""

import subprocess
import sys


def test_a_script_of_that_name_is_not_taken_for_the_package(tmp_path):
    (tmp_path / "evaluate.py").write_text("raise SystemExit('the script was imported')")
    program = (
        "from coss_hf.evaluation.hf_metrics import KNNAccuracy, evaluate; print(evaluate.Metric in KNNAccuracy.__mro__)"
    )
    (tmp_path / "run.py").write_text(program)
    done = subprocess.run([sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
