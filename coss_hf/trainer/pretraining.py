"""What some losses learn from the teacher alone, before the student's training begins."""

import itertools

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from coss_hf.data.views import collate_views
from coss_hf.utils.distributed import world_size
from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)

LEARNING_RATE = 1e-3  # of Adam; ours


def learners(criterion: nn.Module) -> list[nn.Module]:
    """Return the losses in ``criterion`` that learn first: those with ``pretraining_steps``."""
    return [part for part in criterion.modules() if getattr(part, "pretraining_steps", 0)]


def pretraining_images(trainer) -> int:
    """Images that pass through the teacher before a run's first step; neighbours count, as in training."""
    steps = sum(part.pretraining_steps for part in learners(trainer.model.criterion))
    return steps * trainer.args.per_device_train_batch_size * (1 + trainer.args.neighbors_k)


def pretrain(trainer) -> None:
    """Trains the ``pretraining_module`` of a run's losses on views of the training images, and freezes it.

    A batch is one of a device in training: ``per_device_train_batch_size`` anchors, each with its neighbours.
    Every process does the same on the same images; the first one's result counts.
    """
    args = trainer.args
    dataset = trainer.train_dataset
    parts = learners(trainer.model.criterion)
    if parts and trainer.is_streaming:
        raise ValueError("--criterion learns from images in random order before the training, which no stream gives.")
    for part in parts:
        part.to(args.device)
        module = part.pretraining_module()
        generator = torch.Generator().manual_seed(args.seed)
        options = {"num_workers": args.dataloader_num_workers, "collate_fn": collate_views, "drop_last": True}
        loader = DataLoader(dataset, args.per_device_train_batch_size, shuffle=True, generator=generator, **options)
        optimizer = torch.optim.Adam(module.requires_grad_(True).parameters(), LEARNING_RATE)
        batches = itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), part.pretraining_steps)
        quiet = args.disable_tqdm or args.process_index > 0
        for batch in tqdm(batches, "Pre-training of the loss", part.pretraining_steps, disable=quiet, leave=False):
            with torch.enable_grad():
                error = part.pretraining_loss(trainer.teacher_features(send_to_device(batch, args.device)))
                optimizer.zero_grad()
                error.backward()
                optimizer.step()
        module.requires_grad_(False)
        if world_size() > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)
        name = type(part).__name__
        logger.info("%s pre-trained on %d batches, error %.4f", name, part.pretraining_steps, error.detach())
