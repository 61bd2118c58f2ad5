"""Installed packages, next to scripts of the same name."""

from tests.helpers.processes import run as run_program


def test_a_script_of_that_name_is_not_taken_for_the_package(tmp_path):
    (tmp_path / "evaluate.py").write_text("raise SystemExit('the script was imported')")
    program = (
        "from coss_hf.evaluation.hf_metrics import KNNAccuracy, evaluate; print(evaluate.Metric in KNNAccuracy.__mro__)"
    )
    (tmp_path / "run.py").write_text(program)
    done = run_program([tmp_path / "run.py"])
    assert done.stdout.strip() == "True", done.stderr
