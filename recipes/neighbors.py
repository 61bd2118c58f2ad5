"""Find every training image's nearest neighbours as a teacher sees them, and keep them with the images.

    python recipes/neighbors.py --teacher facebook/dinov2-small --dataset path/to/images --neighbors_pool 31 \
        --output images-with-neighbors

The output is an ordinary dataset: it can be pushed (--push_to_hub USER/NAME) and given to recipes/distill.py as
--dataset. Its train split has two columns more: `neighbors`, and `neighbors_hash` to tell whether they belong to these
images. Images that --validation_size holds out of train become its split `validation`. `neighbors.json` in the folder
says how they were found (search, recall, seconds). With several processes each embeds and searches its share:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/neighbors.py ...
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/neighbors.py --use_cpu ...

The same command resumes a run that was stopped: finished shards of embeddings are in --neighbors_cache.
"""

from coss_hf.cli.help import show_help

show_help(__name__, "neighbors")

import contextlib
import json
import os
import shutil
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from coss_hf.utils.ending import ENDING

if __name__ == "__main__":
    ENDING.install()  # before the imports that take seconds

import datasets
import numpy as np
from accelerate import PartialState
from filelock import FileLock, Timeout

from coss_hf.cli import bad_input_exits, log_to_console, parse, stopped_run_exits
from coss_hf.data.loading import ImageSplits
from coss_hf.hub.push import check_repo, push_dataset
from coss_hf.neighbors.columns import summary
from coss_hf.neighbors.dataset import splits_with_neighbors
from coss_hf.neighbors.mining import cache_folder, nearest_neighbors
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.checkpoint_files import publish, staging
from coss_hf.utils.disk import full_disk
from coss_hf.utils.distributed import leave
from coss_hf.utils.errors import RunStopped


@dataclass
class NeighborsArguments:
    """How neighbours are searched, and where the result goes. Of the models only the teacher is read."""

    output: str | None = field(default=None, metadata={"help": "New folder to which the dataset is written."})
    neighbors_pool: int = field(
        default=31, metadata={"help": "Number of nearest neighbours that are kept for each image."}
    )
    batch_size: int = field(default=256, metadata={"help": "Number of images per forward pass."})
    num_workers: int = field(default=0, metadata={"help": "Number of processes that decode images."})
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU; several processes on a CPU need it."})
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Repository on the Hub to push the dataset to, as USER/NAME."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Create a private dataset repository on the Hub."})

    @property
    def private(self) -> bool | None:
        """Whether a new repository is private; None for what its owner's repositories are by default."""
        return self.hub_private_repo or None  # False would make a public one where an organisation's are private


def find_neighbors(
    models: ModelArguments, data: DataArguments, args: NeighborsArguments
) -> tuple[ImageSplits, np.ndarray, dict]:
    """Return the images, neighbours ``(n, K)`` of those of train, and how they were found.

    Raises:
        ValueError: any input that cannot be used; found before anything is computed.
    """
    if not args.output:
        raise ValueError("--output is missing; see --help.")
    if Path(args.output).exists():
        raise ValueError(f"--output {args.output} exists already; remove it or give another folder.")
    state = PartialState(cpu=args.use_cpu, timeout=timedelta(days=100))
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != state.num_processes:
        raise ValueError(f"{launched} processes were launched, but each would work alone; on a CPU add --use_cpu.")
    with state.main_process_first():
        splits = data.load(hold_out_by_default=True)
    if args.push_to_hub and state.is_main_process:
        check_repo(args.push_to_hub, "--push_to_hub", repo_type="dataset", private=args.private)
    teacher = models.load_teacher()
    teacher.model.to(state.device)
    neighbors, meta = nearest_neighbors(
        splits.train,
        teacher,
        splits.image_column,
        k=args.neighbors_pool,
        options=data,
        cache_dir=data.neighbors_cache,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        on_bad_image=data.on_bad_image,
    )
    return splits, neighbors, meta


def write(
    data: DataArguments, args: NeighborsArguments, splits: ImageSplits, neighbors: np.ndarray, meta: dict
) -> datasets.DatasetDict:
    """Write the dataset of all splits and ``neighbors.json`` to a folder that is complete or not there.

    Raises:
        RunStopped: the disk is full, another command is writing the folder, or something has been put there meanwhile.
    """
    output = Path(args.output)
    unfinished = staging(output)
    with _sole_writer(output):
        try:
            _check_unused(output)
            result = splits_with_neighbors(splits, neighbors, cache_folder(data.neighbors_cache))
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            result.save_to_disk(unfinished)
            (unfinished / "neighbors.json").write_text(json.dumps(meta, indent=2) + "\n")
            _check_unused(output)
        except Exception as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            full = full_disk(error)
            if full:
                raise RunStopped(
                    f"--output {output} could not be written: {full}; free some space and give the same command "
                    f"again: what was computed is kept in the cache."
                ) from error
            raise
        publish(unfinished, output)
    return result


@contextlib.contextmanager
def _sole_writer(output: Path):
    """Keep other commands from writing the same folder, since both would use the same unfinished one."""
    lock = FileLock(output.with_name(f".{output.name}.lock"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunStopped(
            f"--output {output}: another command is writing it. Give another folder, or wait until it has ended: what "
            f"was computed is kept in the cache."
        ) from None
    except OSError as error:
        raise RunStopped(
            f"--output {output} could not be written: {error}. Give another folder: what was computed is kept in the "
            f"cache."
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # before it is released, so that it is not another command's
        lock.release()


def _check_unused(output: Path) -> None:
    """Raise ``RunStopped`` where something came to be at ``output`` during the search; it would be replaced."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise RunStopped(
            f"--output {output} was not there when this command began, and is now; it is left as it is. Give another "
            f"--output: what was computed is kept in the cache."
        )


ARGUMENTS = (ModelArguments, DataArguments, NeighborsArguments)


def main() -> None:
    log_to_console()
    with bad_input_exits():
        models, data, args = parse(ARGUMENTS)
        splits, neighbors, meta = find_neighbors(models, data, args)
    leave()
    if not PartialState().is_main_process:
        return
    with stopped_run_exits():
        result = write(data, args, splits, neighbors, meta)
    print(summary(meta))
    sizes = ", ".join(f"{name} {len(split):,}" for name, split in result.items())
    print(f"{args.output}: {sizes} images, each of train with its {args.neighbors_pool} nearest neighbours.")
    pool = f"--neighbors_k {min(15, args.neighbors_pool)} --neighbors_pool {args.neighbors_pool}"
    print(f"Next: coss-hf distill --dataset {args.output} {pool} ...")
    if args.push_to_hub:
        with stopped_run_exits():
            push_dataset(args.output, args.push_to_hub, private=args.private)


if __name__ == "__main__":
    main()
