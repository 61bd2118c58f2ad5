"""FSDP2 on two real processes. accelerate enables it on GPUs only, so the script forces its state on the CPU."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import tests.helpers.runs as h
from coss_hf.data.loading import load_images
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.models.loading import load_backbone
from tests.helpers.fsdp_script import OPTIONS
from tests.helpers.processes import run as run_program

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of one launch, and what each process found."""
    folder = tmp_path_factory.mktemp("fsdp")
    h.write_images(folder / "images")
    h.save_resnet(folder / "teacher", seed=1)
    h.save_vit(folder / "vit", seed=2, hidden_size=8)
    h.save_resnet(folder / "resnet", seed=3)
    done = run_program([ROOT / "tests" / "helpers" / "fsdp_script.py", folder], processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in (0, 1)]


def losses(found) -> list[float]:
    return [line["loss"] for line in found["log"] if "loss" in line]


def used(found) -> dict[str, torch.Tensor]:
    """Weights without the pooler, which is not in the checkpoint: drawn at random at each loading, unused."""
    return {name: tensor for name, tensor in found["student"].items() if "pooler" not in name}


def test_the_student_is_sharded_and_the_teacher_is_not(world):
    for found in world[1]:
        assert found["ddp"]["kinds"] == ["Parameter"] and found["fsdp"]["kinds"] == ["DTensor"]
        assert found["fsdp"]["shards"] == [
            "FSDPDistillationModel",
            "FSDPViTEmbeddings",
            "FSDPViTLayer",
            "FSDPViTLayer",
        ]
        assert found["resnet"]["shards"] == ["FSDPDistillationModel"]  # its class names no blocks
        for name in ("fsdp", "resumed", "resnet"):
            assert not any(found[name][f"teacher_{state}"] for state in ("sharded", "trained", "training"))
            assert {key.split(".")[0] for key in found[name]["trained"]} <= {"network", "head"}


def test_same_training_as_ddp_and_as_one_process(world, tmp_path):
    folder, (first, second) = world
    networks = str(folder / "teacher"), str(folder / "vit")
    alone = h.make_trainer(tmp_path, folder / "images", *networks, **(OPTIONS | {"save_strategy": "no"}))
    alone.train()
    one = [line["loss"] for line in alone.state.log_history if "loss" in line]
    assert one[-1] < one[0] - 10, "nothing was learnt"
    for found in (first, second):
        assert losses(found["fsdp"]) == pytest.approx(losses(found["ddp"]), rel=1e-5)
        assert losses(found["fsdp"]) == pytest.approx(one, rel=1e-4)
        for name, tensor in used(found["fsdp"]).items():
            torch.testing.assert_close(tensor, found["ddp"]["student"][name], rtol=1e-4, atol=1e-5, msg=name)
            torch.testing.assert_close(tensor, alone.student.model.state_dict()[name], rtol=0, atol=1e-4, msg=name)


def test_resume_is_bit_identical(world):
    for found in world[1]:
        assert losses(found["resumed"]) == losses(found["fsdp"])
        h.assert_same(used(found["resumed"]), used(found["fsdp"]))
        assert torch.equal(found["resumed"]["projected"], found["fsdp"]["projected"])


def test_published_folder_holds_the_unsharded_student_only(world):
    folder, (found, _) = world
    vit = {"config.json", "model.safetensors", "preprocessor_config.json", "training_args.bin", "head.safetensors"}
    vit |= {"run.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
    for name, student, files in (("fsdp", "vit", vit), ("resnet-out", "resnet", vit - {"head.safetensors"})):
        assert {path.name for path in (folder / name).iterdir() if path.is_file() and path.suffix != ".py"} == files
        model = AutoModel.from_pretrained(folder / name)
        trained = found["resnet" if student == "resnet" else name]["student"]
        saved = {
            key: value for key, value in model.state_dict().items() if "pooler" not in key
        }  # settled at the saving
        h.assert_same(saved, {key: value for key, value in trained.items() if "pooler" not in key})
        before = AutoModel.from_pretrained(folder / student).state_dict()
        assert all(
            not torch.equal(tensor, before[key])
            for key, tensor in trained.items()
            if tensor.dim() > 1 and "pooler" not in key
        )
    assert load_file(folder / "fsdp" / "head.safetensors")["0.weight"].shape == (12, 8)


def test_evaluation_sees_the_same_unsharded_student_on_every_process(world):
    """In training and after it; batch norm's statistics are the first process's, which are those published."""
    folder, both = world
    for name in ("fsdp", "resnet"):
        lines = [[line for line in found[name]["log"] if "eval_loss" in line] for found in both]
        for first, second in zip(*lines, strict=True):
            for key in ("eval_loss", "eval_cosine", "eval_knn10", "eval_overlap10"):
                assert first[key] == second[key], (name, key)
        h.assert_same(both[0][name]["student"], both[1][name]["student"])
    evaluated = [
        [line["eval_loss"] for line in both[0][name]["log"] if "eval_loss" in line] for name in ("ddp", "fsdp")
    ]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-4) and len(set(evaluated[1])) > 1
    metrics = both[0]["resnet"]["metrics"]
    splits = load_images(str(folder / "images"))
    measure = Evaluator(
        load_backbone(str(folder / "teacher")),
        splits.test,
        splits.image_column,
        label_column="label",
        train_images=splits.train,
    )
    again, _ = measure(load_backbone(str(folder / "resnet-out")))
    for key in ("knn10", "overlap10", "cosine"):
        assert again[key] == pytest.approx(metrics[f"eval_{key}"], abs=1e-5)


def test_the_best_checkpoint_is_loaded(world):
    folder, (found, _) = world
    lines = [line for line in found["resnet"]["log"] if "eval_loss" in line]
    best = min(lines, key=lambda line: line["eval_loss"])["step"]
    saved = load_file(folder / "resnet-out" / f"checkpoint-{best}" / "model.safetensors")
    h.assert_same(saved, load_file(folder / "resnet-out" / "model.safetensors"))


def test_under_bf16_weights_and_loss_stay_float32(world):
    folder, (found, _) = world
    assert {tensor.dtype for tensor in found["resnet"]["student"].values() if tensor.is_floating_point()} == {
        torch.float32
    }
    values = torch.tensor(losses(found["resnet"]))
    assert (values != values.bfloat16().float()).any(), "the loss was rounded to bfloat16"


def test_two_processes_fill_and_read_one_teacher_cache(world):
    """Filled by DDP, each process its own views; read by DDP, where each gets views of the other, and by FSDP."""
    first, second = world[1]
    for found in (first, second):
        assert found["live"]["embedded"] == 14 * 8 and len(set(found["live"]["losses"])) == 14
        assert found["warm"]["embedded"] == found["warm fsdp"]["embedded"] == 0
        for name in ("cold", "warm"):
            assert found[name]["losses"] == pytest.approx(found["live"]["losses"], rel=1e-6)
        assert found["warm fsdp"]["losses"] == pytest.approx(found["live fsdp"]["losses"], rel=1e-4)
    # Of 14 steps the last 2 are of the first epoch again; the one process may be there before the other has flushed.
    assert 12 * 16 <= first["cold"]["embedded"] + second["cold"]["embedded"] <= 14 * 16
