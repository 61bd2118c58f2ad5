"""Runs whose images are deleted while they are at work: they end with a word, or go on, and resume."""

import json

import pytest
from transformers import TrainerCallback

import tests.helpers.runs as h
from coss_hf.data.reading import ImageReader
from coss_hf.data.run_images import RunImages
from coss_hf.neighbors import mining
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.factory import build_run
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.errors import UnreadableImage


class DeleteAfter(TrainerCallback):
    """Deletes a file after a step; and stops the training after another."""

    def __init__(self, step, path, stop_after=None):
        self.step = step
        self.path = path
        self.stop_after = stop_after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.path.unlink()
        if state.global_step == self.stop_after:
            control.should_training_stop = True


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr("coss_hf.trainer.factory.rehearse", lambda *_: None)  # takes longer than these runs
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images, _ = h.colour_images(16, seed=0)
    for i, image in enumerate(images):
        path = tmp_path / "images" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    networks = {
        "teacher": h.save_resnet(tmp_path / "teacher", seed=1),
        "student": h.save_resnet(tmp_path / "s", seed=2),
    }

    def build(on_bad_image="error", output="out", **options):
        data = DataArguments(dataset=str(tmp_path / "images"), on_bad_image=on_bad_image, validation_size=0)
        args = DistillationArguments(
            output_dir=str(tmp_path / output),
            settings="paper",
            per_device_train_batch_size=8,
            max_steps=6,
            augmentation="moco",
            save_strategy="steps",
            save_steps=2,
            learning_rate=0.01,
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        return build_run(ModelArguments(**networks), data, args)

    return build


def test_skip_replaces_and_resumes_to_the_same_student(world, tmp_path, caplog):
    students = []
    path = tmp_path / "images" / "05.png"
    picture = path.read_bytes()
    for output in ("interrupted", "through"):
        path.write_bytes(picture)
        run = world("skip", output)
        run.trainer.add_callback(DeleteAfter(2, path, 4 if output == "interrupted" else None))
        run.train()
        if output == "interrupted":
            run = world("skip", output, resume_from_checkpoint="auto")
            assert "05.png. other images" in caplog.text.replace(";", ".")
            run.train()
        students.append(h.state(run.trainer))
        record = run.report().record
        assert record["replaced_images"] == [str(path)]
        assert json.loads((tmp_path / output / "run.json").read_text())["replaced_images"] == [str(path)]
    h.assert_same(*students)
    assert "1 images were replaced: " in caplog.text


def test_error_says_which_file_and_how_to_resume(world, tmp_path):
    path = tmp_path / "images" / "05.png"
    picture = path.read_bytes()
    run = world()
    run.trainer.add_callback(DeleteAfter(2, path))
    with pytest.raises(UnreadableImage, match="05.png cannot be decoded.*--resume_from_checkpoint"):
        run.train()
    with pytest.raises(ValueError, match="1 images of split train can no longer be decoded: .*05.png. Restore"):
        world(resume_from_checkpoint="auto")
    path.write_bytes(picture)
    run = world(resume_from_checkpoint="auto")
    run.train()
    assert run.trainer.state.global_step == 6 and run.trainer.train_dataset.reader.replaced() == []


def test_a_replaced_image_is_refused_at_resume(world, tmp_path):
    run = world("skip")
    run.train()
    h.colour_images(1, seed=9)[0][0].save(tmp_path / "images" / "05.png")
    with pytest.raises(ValueError, match="not those that the run began with: .*05.png"):
        world("skip", resume_from_checkpoint="auto")
    assert RunImages.load(tmp_path / "out").root == str(tmp_path / "images")


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_skip_reaches_the_search_for_neighbours(world, tmp_path, monkeypatch, damage):
    """The search stopped with the advice to give --on_bad_image skip, which was given."""
    lost = tmp_path / "images" / "05.png"
    search = mining.nearest_neighbors

    def damaged_before(*args, **kwargs):
        if damage == "deleted":
            lost.unlink()
        else:
            lost.write_bytes(lost.read_bytes()[:60])
        return search(*args, **kwargs)

    monkeypatch.setattr(mining, "nearest_neighbors", damaged_before)
    images = tmp_path / "images"
    whole = {path.name: path.read_bytes() for path in images.iterdir()}
    with pytest.raises(UnreadableImage, match="05.png"):
        world(neighbors_k=1, neighbors_pool=3)
    lost.write_bytes(whole["05.png"])
    run = world("skip", neighbors_k=1, neighbors_pool=3)
    reader = ImageReader(run.trainer.splits.train, "image", "skip")
    (stand_in,) = {row for i, row in enumerate(reader.rows_to_read()) if i != row}
    assert run.trainer.train_dataset.neighbors[5][0] == stand_in, "the same image is in both rows"
    run.train()
    assert run.trainer.state.global_step == 6
    # What was kept for the images as they are now is not taken for those of the full folder.
    lost.write_bytes(whole["05.png"])
    monkeypatch.setattr(mining, "nearest_neighbors", search)
    again = world("skip", output="again", neighbors_k=1, neighbors_pool=3)
    assert again.trainer.train_dataset.neighbors[5][0] != stand_in
