"""The trainer of every method."""

import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, set_seed
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from coss_hf.backbones import Backbone
from coss_hf.checkpoints import find_checkpoint, finished, read_state
from coss_hf.config import DistillationArguments
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.features import Features
from coss_hf.losses import build_loss
from coss_hf.modeling import HEAD_FILE, DistillationModel, projection_head
from coss_hf.schedule import EpochCallback, RunLength, milestone_schedule
from coss_hf.views import ViewDataset, collate_views

CRITERION_FILE = "criterion.safetensors"


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the images."""


class DistillationTrainer(Trainer):
    """Distils a frozen teacher into a student without labels.

    Args:
        student: the network to train.
        teacher: the network to learn from; frozen, never saved.
        args: ``DistillationArguments``.
        train_dataset: groups of views.
        evaluator: what ``evaluate`` measures; None for no evaluation.
        criterion: the loss; by default ``args.method``.
        callbacks, optimizers: as in ``transformers.Trainer``.

    Raises:
        ValueError: fewer images than one batch, dimensions that no head joins, or a batch that the loss cannot use.
    """

    def __init__(
        self,
        student: Backbone,
        teacher: Backbone,
        args: DistillationArguments,
        train_dataset: ViewDataset,
        evaluator: Evaluator | None = None,
        criterion: nn.Module | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers=(None, None),
    ):
        self.length = run_length(args, len(train_dataset))
        if args.num_images is not None:
            args.max_steps = self.length.steps_for(args.num_images)
        self.teacher = teacher.freeze()
        # Whatever drew random numbers before (a cold neighbour cache does), a seed gives one head.
        set_seed(args.seed)
        head = projection_head(args.head, student.dim, teacher.dim, args.head_hidden_size)
        model = DistillationModel(student, criterion or build_loss(args), head)
        self.evaluator = evaluator
        self.forget()
        super().__init__(
            model,
            args,
            data_collator=collate_views,
            train_dataset=train_dataset,
            eval_dataset=None if evaluator is None else evaluator.queries,
            processing_class=student.processor,
            callbacks=[EpochCallback(train_dataset), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.teacher.model.to(args.device)
        if args.torch_compile:
            self.teacher.model.compile()

    @property
    def _unwrapped(self) -> DistillationModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def student(self) -> Backbone:
        """The student, without its head."""
        return self._unwrapped.backbone

    @torch.no_grad()
    def project(self, embedding: Tensor) -> Tensor:
        """Student embeddings ``(n, d_s)`` in the teacher's space ``(n, d_t)``, on the CPU."""
        return self._unwrapped.project(embedding.to(self.args.device)).cpu()

    def forget(self) -> None:
        """Starts the running means, the clock and the watch over losses anew."""
        self._parts: dict[str, Tensor] = {}
        self._parts_steps = 0
        self._suspects: list[tuple[int, Tensor, Tensor]] = []
        self._clock = None

    # ---- a step ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        views = inputs["pixel_values"]
        if self._clock is None:
            self._clock = time.perf_counter(), self.images_seen
        with torch.no_grad(), self.accelerator.autocast():
            dtype = next(self.teacher.model.parameters()).dtype
            teacher = self.teacher.features(self.teacher.normalize(views).to(dtype))
        outputs = model(pixel_values=views, teacher=teacher, index=inputs["index"])
        loss = outputs["loss"]
        for name, value in outputs.items():
            if name != "loss":
                self._parts[name] = self._parts.get(name, 0) + value.detach()
        self._parts_steps += 1
        self._suspects.append((self.state.global_step + 1, loss.detach(), inputs["index"]))
        if loss.device.type == "cpu":
            self._stop_if_not_finite()
        return (loss, outputs) if return_outputs else loss

    def _stop_if_not_finite(self) -> None:
        """Reads the losses since the last look; on a GPU only when logging or saving, since a look waits for it."""
        suspects, self._suspects = self._suspects, []
        if not suspects or torch.stack([loss for _, loss, _ in suspects]).isfinite().all():
            return
        step, loss, index = next(s for s in suspects if not s[1].isfinite())
        names = self.train_dataset.names(index.tolist()[:8])
        raise NonFiniteLoss(
            f"The loss is {loss.item()} at step {step}; nothing was saved after it. Images of that batch: "
            f"{', '.join(names)}{', ...' if len(index) > 8 else ''}. Lower --learning_rate or --beta, or use float32."
        )

    # ---- optimiser and schedule ----

    def get_decay_parameter_names(self, model) -> list[str]:
        if self.args.weight_decay_on == "all":
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if optimizer is torch.optim.SGD:
            kwargs["momentum"] = args.momentum
        return optimizer, kwargs

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None and self.args.lr_milestones:
            drops = [round(epoch * self.length.steps_per_epoch) for epoch in self.args.lr_milestones]
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = milestone_schedule(optimizer or self.optimizer, drops, self.args.lr_gamma, warmup)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- logs ----

    @property
    def images_seen(self) -> int:
        """Images of all optimiser steps so far, anchors and neighbours alike."""
        return self.length.images_after(self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._stop_if_not_finite()
        if "loss" in logs and self._parts_steps:
            names = list(self._parts)
            means = torch.stack([self._parts[name].float() for name in names]) / self._parts_steps
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs |= dict(zip(names, means))
            self._parts, self._parts_steps = {}, 0
            now, seen = time.perf_counter(), self.images_seen
            logs["images_per_second"] = round((seen - self._clock[1]) / (now - self._clock[0]), 1)
            self._clock = now, seen
        logs["images_seen"] = self.images_seen
        super().log(logs, start_time)

    # ---- evaluation ----

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Only counted by ``evaluate``: the evaluator reads the images, every one of them, itself."""
        return DataLoader(eval_dataset if eval_dataset is not None else self.eval_dataset)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        if self.evaluator is None:
            raise ValueError("evaluate() needs an evaluator: give --validation_size or a dataset with a test split.")
        metrics, projected = self.evaluator(self.student, self.project)
        metrics["eval_loss"] = self._eval_loss(projected)
        named = {name.replace("eval_", f"{metric_key_prefix}_", 1): v for name, v in metrics.items() if v is not None}
        self._clock = None  # evaluation is no training time
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=len(self.evaluator.queries))

    @torch.no_grad()
    def _eval_loss(self, projected: Tensor) -> float:
        """Mean loss over held-out batches of the training size, un-augmented."""
        size, criterion = min(self.args.images_per_batch, len(projected)), self._unwrapped.criterion
        training = criterion.training
        rows = torch.arange(len(projected))
        parts = [x.to(self.args.device).split(size) for x in (projected, self.evaluator.teacher_queries, rows)]
        criterion.eval()
        losses = [
            criterion(Features(s), Features(t), index)["loss"] for s, t, index in zip(*parts) if len(index) == size
        ]
        criterion.train(training)
        return torch.stack(losses).mean().item()

    # ---- saving and resuming: the student is what is published, the rest is training state ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self._stop_if_not_finite()
        output_dir = output_dir or self.args.output_dir
        if not self.args.should_save:
            return
        os.makedirs(output_dir, exist_ok=True)
        model = self._unwrapped
        state = model.state_dict() if state_dict is None else state_dict
        parts = {"student": {}, "head": {}, "criterion": {}}
        for key, tensor in state.items():
            part, name = key.split(".", 1)
            parts[part][name] = tensor
            if not tensor.isfinite().all():
                raise NonFiniteLoss(f"{key} is not finite at step {self.state.global_step}: nothing was saved.")
        model.student.save_pretrained(output_dir, state_dict=parts["student"])
        self.processing_class.save_pretrained(output_dir)
        for part, file in (("head", HEAD_FILE), ("criterion", CRITERION_FILE)):
            path = Path(output_dir, file)
            path.unlink(missing_ok=True)  # of an earlier run in this folder
            if parts[part]:
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parts[part].items()}
                save_file(tensors, path, metadata={"format": "pt"})
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Stock loading is not strict and knows only the file's key layout: ViT and others would restart silently."""
        model = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        own = model.student
        saved = type(own).from_pretrained(resume_from_checkpoint, dtype=own.dtype)
        own.load_state_dict(saved.state_dict(), strict=True)
        for part, file in ((model.head, HEAD_FILE), (model.criterion, CRITERION_FILE)):
            if part is not None and part.state_dict():
                part.load_state_dict(load_file(os.path.join(resume_from_checkpoint, file)), strict=True)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As stock, but see ``find_checkpoint`` for what ``resume_from_checkpoint`` may be."""
        checkpoint = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
        if checkpoint is None:
            if resume_from_checkpoint:
                print(f"No complete checkpoint in {self.args.output_dir}: starting afresh.", flush=True)
            return super().train(**kwargs)
        state = read_state(checkpoint)
        print(f"Resuming from {checkpoint}, step {state['global_step']}.", flush=True)
        if not finished(state, self.args):
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        # Stock training would do one more step where a finished run ended in mid-epoch.
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or checkpoint)
        return TrainOutput(self.state.global_step, float("nan"), {})

    def create_model_card(self, **kwargs) -> None:
        """A short card beside the student; the wrapper has no configuration that stock code could describe."""
        if not self.is_world_process_zero():
            return
        text = (
            f"---\nlibrary_name: transformers\ntags: [distillation, coss]\n---\n\n"
            f"# {Path(self.args.output_dir).name}\n\n"
            f"Distilled without labels from `{self.teacher.name}` with `{self.args.method}`, {self.images_seen:,} "
            f"images seen. Load it with `AutoModel.from_pretrained`; embedding: `{self.student.pooling}`.\n"
        )
        Path(self.args.output_dir, "README.md").write_text(text)


def run_length(args: DistillationArguments, images: int) -> RunLength:
    """Length of an epoch over ``images`` training images.

    Raises:
        ValueError: fewer images than one step takes, or ``--num_images`` less than one step.
    """
    anchors = args.images_per_step // (1 + args.neighbors_k)
    if images < anchors:
        raise ValueError(
            f"--per_device_train_batch_size={args.per_device_train_batch_size}: a step takes {anchors} anchors, the "
            f"training split has {images} images; use a smaller batch or more images."
        )
    if args.num_images is not None and args.num_images < args.images_per_step:
        raise ValueError(f"--num_images={args.num_images} is less than one step of {args.images_per_step} images.")
    batches = images // (args.per_device_train_batch_size * args.world_size)
    return RunLength(batches, args.gradient_accumulation_steps, args.images_per_batch)
