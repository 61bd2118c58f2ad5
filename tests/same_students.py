"""Shows that a change of the code changes no number: the same short runs before and after it, compared bit for bit.

    python tests/same_students.py --checkout PATH_OF_A_CHECKOUT --record FILE.json
    python tests/same_students.py --checkout . --compare FILE.json

The first form runs the recipes of a checkout on tiny images and networks, made here, and writes what comes out: a hash
of the tensors of every safetensors file, the names of all files, images seen, final results, and the log. The second
runs them again, prints one line a run, and exits with 1 where anything differs. `--only PART` takes the runs whose name
contains PART. Timings are left out, and `eval_` before a metric's name is ignored. Both forms belong on one machine
with the same packages, for another processor may round differently; each takes some 15 minutes on two slow cores.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

datasets.disable_progress_bars()
# Run on the checkout. The ViT with a classifier lacks a pooler: a teacher's is drawn at random, before the seed is set.
NETWORKS = """
import sys
from pathlib import Path
import torch
from transformers import AutoModel, AutoModelForImageClassification, ViTConfig, ViTImageProcessor
import coss_hf
from coss_hf.models import CifarResNetConfig

assert Path(coss_hf.__file__).resolve().is_relative_to(sys.argv[1]), f"{coss_hf.__file__} is not of {sys.argv[1]}"
cnn = CifarResNetConfig(depth=8, stem_width=4, hidden_sizes=[4, 8, 16], image_size=16, num_labels=4)
sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
vit = ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=4)
for seed, (name, config) in enumerate({"cnn": cnn, "vit": vit, "vit-whole": vit}.items()):
    torch.manual_seed(seed)
    kind = AutoModel if name == "vit-whole" else AutoModelForImageClassification
    kind.from_config(config).save_pretrained(name)
    ViTImageProcessor(size={"height": 16, "width": 16}, image_std=[0.25] * 3).save_pretrained(name)
"""

COMMON = "--dataset images --use_cpu --disable_tqdm true --logging_steps 2 "
DISTILL = COMMON + "--teacher cnn --augmentation cifar --learning_rate 0.02 --max_steps 7 --save_strategy no "
RANDOM = "--student resnet20 --student_init random --student_config_overrides depth=8 stem_width=4 image_size=16 "
CNN, NARROW = RANDOM + "hidden_sizes=[4,8,16] ", RANDOM + "hidden_sizes=[4,8,12] "
VIT, NEAR = "--student vit ", "--neighbors_k 1 --neighbors_pool 4 "
HALVES = "--per_device_train_batch_size 8 --gradient_accumulation_steps 2 "
SAVED = "--save_strategy steps --save_steps 3 "

# Name, processes, options. Those that end in "-resumed" go on from their first checkpoint after a whole run. A step is
# of 16 images and their neighbours, an epoch of 3 steps.
RUNS = [
    ("coss", 1, CNN),
    ("coss-near", 1, CNN + NEAR),
    ("coss-near-two", 2, CNN + NEAR),
    ("coss-vit", 1, VIT),
    ("coss-vit-near-two", 2, VIT + NEAR),
    ("coss-carried-neighbors", 1, CNN + NEAR + "--dataset neighbors"),
    ("coss-accumulated", 1, CNN + HALVES),
    ("coss-exact", 1, CNN + HALVES + "--exact_accumulation true"),
    ("coss-exact-near-two", 2, CNN + NEAR + HALVES + "--exact_accumulation true --per_device_train_batch_size 4"),
    ("coss-milestones", 1, CNN + "--max_steps=-1 --num_train_epochs 3 --lr_milestones 1 2 --save_strategy epoch"),
    ("coss-mlp-near", 1, NARROW + NEAR + "--head mlp --head_hidden_size 32"),
    ("coss-validation", 1, CNN + NEAR + "--validation_size 12 --eval_steps 3"),
    ("coss-vit-resumed", 1, VIT + NEAR + SAVED),
    ("coss-teacher-layers", 1, "--teacher vit-whole --student_init teacher_layers"),
    ("coss-rkd", 1, CNN + "--method coss(lambda_ss=0.5)+rkd"),
    ("seed", 1, CNN + "--method seed --augmentation moco"),
    ("seed-near-two-resumed", 2, CNN + NEAR + SAVED + "--method seed"),
    ("crd", 1, VIT + "--method crd"),
    ("crd-near-two", 2, CNN + NEAR + "--method crd"),
    ("at", 1, CNN + "--method at"),
    ("vid", 1, NARROW + "--method vid"),
    ("factor", 1, CNN + "--method factor(pretraining_steps=4)"),
    ("kd", 1, CNN + "--method kd"),
    ("kd-vit", 1, CNN + "--method kd --teacher vit"),
    ("srrl", 1, CNN + "--method srrl"),
    ("bn-adamw", 1, CNN + "--method bn --augmentation imagenet --optim adamw_torch --weight_decay_on matrices"),
    ("other-methods", 1, CNN + "--method dist+hint+nst+pkt+sp --max_grad_norm 1 --dataloader_num_workers 2"),
    ("train_teacher", 1, "--model resnet20 --image_size 16 --num_train_epochs 1"),
]


def inputs(checkout: Path, folder: Path) -> dict:
    """Images (48 to train on, 24 to test, 16x16, of four classes), networks, and the images with their neighbours."""
    (folder / "images").mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
    for seed, (split, count) in enumerate({"train": 48, "test": 24}.items()):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 4, count)
        pixels = 60 * labels[:, None, None, None] + rng.integers(0, 75, (count, 16, 16, 3))
        columns = {"image": [Image.fromarray(x) for x in pixels.astype(np.uint8)], "label": labels.tolist()}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "images" / f"{split}.parquet")
    call(checkout, folder, ["-c", NETWORKS, str(checkout)])
    found = {path.parent.name: tensor_hash(path) for path in sorted(folder.glob("*/model.safetensors"))}
    options = "--teacher cnn --dataset images --neighbors_pool 4 --neighbors_cache cold --output neighbors --use_cpu"
    call(checkout, folder, [f"{checkout}/recipes/neighbors.py", *options.split()])
    train = datasets.load_from_disk(folder / "neighbors")["train"]
    columns = {"neighbors": np.int32, "neighbors_hash": np.uint64}
    arrays = {name: np.array(train[name][:], dtype=dtype) for name, dtype in columns.items()}
    return found | {name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in arrays.items()}


def call(checkout: Path, folder: Path, command: list[str]) -> None:
    """Runs Python on ``checkout`` from ``folder``, where names are relative: results hold no path of this machine."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(command)}\n{done.stderr[-3000:]}")


def run(checkout: Path, folder: Path, name: str, processes: int, options: str) -> dict:
    """What a run of the table leaves: hashes, names and numbers of its output folder."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", f"{checkout}/accelerate_configs/cpu.yaml"]
    output, recipe = folder / name, "train_teacher" if name == "train_teacher" else "distill"
    own = f"--output_dir {name} --per_device_train_batch_size {16 // processes} "
    own += f"--neighbors_cache {name}-cache {DISTILL}" if recipe == "distill" else COMMON
    command = [*(launch if processes > 1 else []), f"{checkout}/recipes/{recipe}.py", *own.split(), *options.split()]
    call(checkout, folder, command)
    if name.endswith("-resumed"):
        for path in output.iterdir():
            if path.name != "checkpoint-3":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        call(checkout, folder, [*command, "--resume_from_checkpoint", "auto"])
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    jsons = ("run.json", "trainer_state.json")
    record, state = (json.loads((output / file).read_text()) if file in files else {} for file in jsons)
    return {
        "tensors": {file: tensor_hash(output / file) for file in files if file.endswith(".safetensors")},
        "files": dict.fromkeys(files, "there"),
        "numbers": {key: record[key] for key in ("images_seen", "accuracy") if key in record},
        "results": {network: untimed(row) for network, row in record.get("results", {}).items()},
        "log": {f"line {i}, step {line['step']}": untimed(line) for i, line in enumerate(state.get("log_history", []))},
    }


def untimed(row: dict) -> dict:
    return {key.removeprefix("eval_"): row[key] for key in row if "per_second" not in key and "runtime" not in key}


def tensor_hash(path: Path) -> str:
    """Of names, types, shapes and bytes of all tensors, in the order of their names; not of what else the file says."""
    content, digest = path.read_bytes(), hashlib.sha256()
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in sorted(json.loads(content[8:start]).items()):
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            digest.update(content[start + first : start + last])
    return digest.hexdigest()


def differences(old, new, where: str = "") -> list[str]:
    """Where two records differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [text for key in keys for text in differences(old.get(key), new.get(key), f"{where} {key}")]
    shown = ("missing" if value is None else str(value)[:20] for value in (old, new))
    return [] if json.dumps(old) == json.dumps(new) else [f"{where.strip()} (was {', is '.join(shown)})"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--only", default="", metavar="PART")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, metavar="FILE.json")
    what.add_argument("--compare", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    before, found, bad = json.loads(args.compare.read_text()) if args.compare else None, {}, 0
    # What the runs start from comes first, whatever was asked for.
    jobs = [("inputs", inputs, ())] + [(name, run, (name, *how)) for name, *how in RUNS if args.only in name]
    with tempfile.TemporaryDirectory() as folder:
        for name, job, how in jobs:
            start = time.perf_counter()
            try:
                found[name] = job(args.checkout, Path(folder), *how)
                wrong = differences(before.get(name), found[name]) if before else []
            except RuntimeError as error:
                wrong = [str(error)]
            bad += bool(wrong)
            said = f"DIFFERENT: {len(wrong)}: {'; '.join(wrong[:8])}" if wrong else "same" if before else "recorded"
            print(f"{name} ({time.perf_counter() - start:.0f} s): {said}", flush=True)
    print(f"{len(jobs)} runs, {bad} of them different or failed.")
    if args.record and not bad:
        args.record.write_text(json.dumps(found, indent=1) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
