"""How long each method's gradient is on the first batches, with the student's initial weights and scale 1.

    python recipes/benchmarks/gradients.py --dataset path/to/cifar100 --student resnet20 \
        --teacher recipes/benchmarks/results/cifar100-resnet56 --output gradients.json

One seed, ``--batches`` batches without an update between them; the norm is that over all of the student's parameters.
``factor`` is left out: its loss means nothing before its paraphraser has been trained.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

from torch.nn.utils import get_total_norm

from coss_hf.reporting.run_record import versions
from coss_hf.study.paper_tables import CHOICE_SEED, ROWS, TRAINING
from coss_hf.study.trials import StudyConfig, Trial, build_trial_trainer
from coss_hf.trainer.arguments import DataArguments, ModelArguments

METHODS = {name: rows[name] for rows in (ROWS[1], ROWS[4], ROWS[5]) for name in rows if "neighbours" not in name}
LEFT_OUT = ("factor", "L_co")


def norms(method: str, config: StudyConfig, batches: int, folder: str) -> list[float]:
    """Return the norm of the student's gradient on each batch."""
    trial = Trial("pair", method, METHODS[method], 1, CHOICE_SEED, batches * 128, "validation")
    trainer = build_trial_trainer(trial, config, Path(folder))
    model = trainer.model.train()
    found = []
    for batch in trainer.get_train_dataloader():
        model.zero_grad()
        trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()
        gradients = [one.grad for one in trainer.student.model.parameters() if one.grad is not None]
        found.append(float(get_total_norm(gradients)))
        if len(found) == batches:
            return found
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="the images")
    parser.add_argument("--teacher", required=True, help="folder or name of the teacher")
    parser.add_argument("--student", required=True, help="name of the student, which has random weights")
    parser.add_argument("--batches", type=int, default=8, help="number of batches of 128 images")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    options = parser.parse_args()
    models = ModelArguments(teacher=options.teacher, student=options.student, student_init="random")
    data = DataArguments(dataset=options.dataset, validation_size=5000)
    config = StudyConfig(data, {"pair": models}, TRAINING | {"use_cpu": True, "dataloader_num_workers": 0})
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            if method not in LEFT_OUT:
                values = norms(method, config, options.batches, folder)
                stated = {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
                found[method] = {name: float(f"{value:.3g}") for name, value in stated.items()}
                print(f"{method}: {found[method]['mean']:.3g}", flush=True)
    record = {"gradient_norms": found, "batches": options.batches, "command": shlex.join(["python", *sys.argv])}
    options.output.write_text(json.dumps(record | {"versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
