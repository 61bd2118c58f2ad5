"""Measure an epoch on real images against a bare PyTorch loop that only trains.

    python recipes/benchmarks/epoch.py --train_parquet TRAIN.parquet --output epoch.json

The trainer decodes, augments and collates CIFAR-10's images in 1 or 2 loader processes; the bare loop takes tensors in
memory, without augmentation. Both train resnet20 towards resnet56 at batch 128. Segments of the two alternate in one
run; the trainer's first steps of each are not counted: its loaders worked ahead during the bare segment.
"""

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path

import torch
from bare_loop import decode
from trainer_step import BareLoop, machine, now, restart_with_kept_memory, save_networks
from transformers import set_seed

from coss_hf.data.loading import load_images
from coss_hf.models.loading import load_backbone
from coss_hf.trainer.factory import build_trainer
from coss_hf.trainer.training_args import DistillationArguments

BATCH = 128
SEGMENT = 30  # steps


class Segments(BareLoop):
    """Run as many bare steps after every segment of the trainer, and time both in seconds per step."""

    def __init__(self, *args, skip: int):
        super().__init__(*args)
        self.skip = skip

    def on_step_end(self, args, state, control, **kwargs):
        moment = now()
        position = state.global_step % SEGMENT
        if position == self.skip:
            self.start = moment
        if position == 0 and self.start is not None:
            trainer = (moment - self.start) / (SEGMENT - self.skip)
            begin = now()
            for _ in range(SEGMENT - self.skip):
                self.step()
            self.pairs.append((trainer, (now() - begin) / (SEGMENT - self.skip)))


def measure(parquet: str, workers: int, segments: int, folder: str) -> dict:
    """Return the speed of the trainer as a share of the bare loop's, segment by segment."""
    teacher = load_backbone(f"{folder}/resnet56")
    student = load_backbone(f"{folder}/resnet20")
    other = load_backbone(f"{folder}/resnet20")
    splits = load_images(parquet)
    # One segment more: the first starts the loaders.
    args = DistillationArguments(
        output_dir=f"{folder}/out",
        settings="paper",
        augmentation="cifar",
        seed=0,
        per_device_train_batch_size=BATCH,
        max_steps=SEGMENT * (segments + 1),
        dataloader_num_workers=workers,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    images = decode(parquet)[: BATCH * 64, None]
    bare = Segments(copy.copy(teacher).freeze(), other, BATCH, images, skip=2 * workers + 1)
    other.model.to(args.device).train()
    build_trainer(splits, args, teacher=teacher, student=student, callbacks=[bare]).train()
    shares = sorted(loop / trainer for trainer, loop in bare.pairs[1:])
    return {
        "workers": workers,
        "segments": len(shares),
        "steps_a_segment": SEGMENT - bare.skip,
        "trainer_images_per_second": round(BATCH / statistics.median(t for t, _ in bare.pairs[1:]), 1),
        "bare_images_per_second": round(BATCH / statistics.median(b for _, b in bare.pairs[1:]), 1),
        "share_median": round(statistics.median(shares), 4),
        "share_range": [round(shares[0], 4), round(shares[-1], 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_parquet", required=True)
    parser.add_argument("--segments", type=int, default=5)
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    restart_with_kept_memory()
    set_seed(0)
    result = {
        "command": f"python recipes/benchmarks/epoch.py --train_parquet ... --segments {options.segments}",
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory() as folder:
        save_networks(folder, ("resnet56", "resnet20"))
        for workers in (1, 2):
            result[f"workers_{workers}"] = measure(options.train_parquet, workers, options.segments, folder)
    print(json.dumps(result, indent=2))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
