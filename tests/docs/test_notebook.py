"""The notebook runs from top to bottom, with a shorter training."""

import json

import pytest

from tests.helpers.runs import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "outputs are not kept in the repository"
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("EPOCHS = 20", "EPOCHS = 3"), scope)
    results = scope["report"].record["results"]
    assert results["student"]["knn10"] > results["random"]["knn10"] + 0.05, results
    assert scope["embeddings"].shape == (5, 64)
    assert (tmp_path / "digits-student" / "report.html").is_file()
