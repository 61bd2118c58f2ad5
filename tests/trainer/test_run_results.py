"""A final evaluation that fails never costs a student its record, card and page."""

import json

import pytest

from coss_hf import DistillationArguments, DistillationTrainer
from coss_hf.trainer.arguments import DataArguments


@pytest.fixture
def trainer(tmp_path, image_parquet, networks):
    args = DistillationArguments(
        str(tmp_path / "out"),
        settings="paper",
        per_device_train_batch_size=8,
        max_steps=1,
        save_strategy="no",
        eval_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        teacher=networks.teacher,
        student=networks.resnet,
        args=args,
        train_dataset=str(image_parquet),
        data=DataArguments(neighbors_cache=str(tmp_path / "cache")),
    )
    trainer.train()
    trainer.save_model()
    return trainer


def left(tmp_path):
    folder = tmp_path / "out"
    texts = [(folder / name).read_text() for name in ("README.md", "report.html")]
    return json.loads((folder / "run.json").read_text()), *texts


def test_failed_final_evaluation_does_not_fail_the_run(trainer, tmp_path, monkeypatch, caplog):
    """A table of 640 GB for four classes of large numbers ended the run after its training, without record and card."""

    def no_memory(*_, **__):
        raise MemoryError("Unable to allocate 640. GiB for an array")

    with monkeypatch.context() as patch:
        patch.setattr("coss_hf.evaluation.evaluator.compare", no_memory)
        report = trainer.report()
    record, card, page = left(tmp_path)
    said = (
        "The final evaluation failed (MemoryError: Unable to allocate 640. GiB for an array). The student is complete"
    )
    assert said in caplog.text and record["results"] == report.record["results"] == {}
    assert record["problems"] == report.record["problems"] == record["verdict"][:1]
    assert said in card and f"<p class=alarm>{said}" in page
    # And when the reason is gone:
    assert trainer.report().record["problems"] == []
    record, card, page = left(tmp_path)
    assert set(record["results"]) == {"teacher", "student", "random"} and "evaluation failed" not in card + page


def test_failed_pictures_do_not_fail_the_run(trainer, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no font")

    monkeypatch.setattr("coss_hf.trainer.run_results.write_pictures", broken)
    report = trainer.report()
    record, card, _ = left(tmp_path)
    assert "The final pictures failed (RuntimeError: no font)." in card and record["results"]
    assert report.neighbors is report.projection is None


def test_a_process_that_is_killed_while_it_measures(trainer, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("coss_hf.evaluation.evaluator.compare", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.report()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "did not come to an end" in record["verdict"][0] and (tmp_path / "out" / "report.html").is_file()
