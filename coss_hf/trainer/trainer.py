"""The trainer of every method."""

import time

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.integrations import WandbCallback
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy

from coss_hf.data.views import ViewDataset, collate_views
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.features import Features
from coss_hf.losses.registry import OF_EMBEDDINGS
from coss_hf.models.backbone import Backbone
from coss_hf.reporting.run_record import to_dict
from coss_hf.reporting.wandb_tracker import WandbTracker
from coss_hf.trainer.assembly import build_model
from coss_hf.trainer.callbacks.diagnostics import Watch
from coss_hf.trainer.callbacks.epoch import EpochCallback
from coss_hf.trainer.distillation_model import DistillationModel
from coss_hf.trainer.engine import synchronise_batch_norm, use_channels_last
from coss_hf.trainer.fsdp import gather, is_sharded, name_blocks, same_buffers, standby
from coss_hf.trainer.gradient_accumulation import add_rests, refuse_randomness, with_gradient_times
from coss_hf.trainer.pretraining import pretrain
from coss_hf.trainer.publishing import PublishingTrainer
from coss_hf.trainer.schedule import milestone_schedule
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.distributed import all_reduce_sum
from coss_hf.utils.errors import NonFiniteLoss


class DistillationTrainer(PublishingTrainer):
    """Distils a frozen teacher into a student without labels.

    Args:
        student: the network to train.
        teacher: the network to learn from; frozen, never saved.
        args: ``DistillationArguments``.
        train_dataset: groups of views.
        evaluator: what ``evaluate`` measures; None for no evaluation.
        criterion: the loss; by default ``args.method``.
        callbacks, optimizers: as in ``transformers.Trainer``.

    Attributes:
        arguments: what the run was given, for its record; a recipe adds what it was given beside ``args``.

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
        self.length = args.run_length(len(train_dataset))
        if args.num_images is not None:
            args.max_steps = self.length.steps_for(args.num_images)
        self.teacher = teacher.freeze()
        model = build_model(student, self.teacher, args, len(train_dataset), criterion)
        if args.exact_accumulation:
            refuse_randomness(student.model, student.size)
        if args.sync_batch_norm:
            synchronise_batch_norm(student.model, model.criterion)
        if args.channels_last:
            use_channels_last(student.model)
            use_channels_last(teacher.model)
        self.evaluator = evaluator
        if evaluator is None and args.watched:
            args.eval_strategy = IntervalStrategy.NO
        watch = [] if evaluator is None else [Watch(len(evaluator.test_images), last_step=args.watched)]
        self.forget()
        super().__init__(
            model,
            args,
            data_collator=collate_views,
            train_dataset=train_dataset,
            eval_dataset=None if evaluator is None else evaluator.test_images,
            processing_class=student.processor,
            callbacks=[EpochCallback(train_dataset), *watch, *(callbacks or [])],
            optimizers=optimizers,
        )
        self.arguments: dict = to_dict(args)
        if self.pop_callback(WandbCallback) is not None:
            self.add_callback(WandbTracker(self))
        self.teacher.model.to(args.device)
        if args.torch_compile:
            for backbone in (student, teacher):
                backbone.normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=args.device))  # not compiled twice
            options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
            self._teacher_features = torch.compile(self._teacher_features, **options)
        if self.is_fsdp_enabled:
            # Autocast does mixed precision, as without FSDP: its own would round the loss as well.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
            name_blocks(model, student.model)
            self._standby = standby(model).to(args.device)

    @property
    def _whole(self) -> DistillationModel:
        """What is trained, with ordinary parameters: under FSDP a copy, as of the last ``collect``."""
        return self._standby if is_sharded(self.model) else self._unwrapped

    def collect(self) -> None:
        """Makes ``student`` and ``project`` the same on every process; all of them must call."""
        same_buffers(self._unwrapped.student)
        if is_sharded(self.model):
            gather(self._unwrapped, self._standby)

    @property
    def student(self) -> Backbone:
        """The student, without its head. Under FSDP as it was at the last evaluation or at the end of training."""
        return self._whole.backbone

    @torch.no_grad()
    def project(self, embedding: Tensor) -> Tensor:
        """Student embeddings ``(n, d_s)`` in the teacher's space ``(n, d_t)``, on the CPU."""
        return self._whole.project(embedding.to(self.args.device)).cpu()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        fresh = self.find_checkpoint(resume_from_checkpoint) is None
        if fresh:
            pretrain(self)
        if self.args.watched and self.evaluator is not None:
            self.args.eval_on_start = fresh  # what training is compared with
        result = super().train(resume_from_checkpoint, **kwargs)
        self.collect()
        return result

    def forget(self) -> None:
        """Starts the running means, the clock and the watch over losses anew."""
        self._parts: dict[str, Tensor] = {}
        self._parts_steps = 0
        self._suspects: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self._clock = None

    # ---- a step ----

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """accelerate puts autocast around every forward pass but those of FSDP2."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().autocast_smart_context_manager()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        views = inputs["pixel_values"]
        if self._clock is None:
            self._clock = time.perf_counter(), self.images_seen
        if self.args.torch_compile:
            torch.compiler.cudagraph_mark_step_begin()  # else the student's graph takes the teacher's memory
        exact = "rest" in inputs
        teacher = Features(inputs["teacher"]) if exact else self.embed_teacher(views)
        outputs = model(pixel_values=views, teacher=teacher, index=inputs["index"], rest=inputs.get("rest"))
        loss, finite = outputs["loss"], outputs.pop("finite")
        for name, value in outputs.items():
            if name != "loss":
                self._parts[name] = self._parts.get(name, 0) + value.detach()
        self._parts_steps += 1
        # Copies: a graph on a GPU writes its output into the same memory at each step.
        self._suspects.append((self.state.global_step + 1, loss.detach().clone(), inputs["index"], finite.clone()))
        if loss.device.type == "cpu":
            self._stop_if_not_finite()
        if exact and model.training:
            loss = with_gradient_times(loss, self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def embed_teacher(self, views: Tensor) -> Features:
        """Its features of ``views`` ``(b, 3, H, W)``, uint8, as a step takes them."""
        with self.accelerator.autocast():
            return self._teacher_features(views)

    def _teacher_features(self, views: Tensor) -> Features:
        dtype = next(self.teacher.model.parameters()).dtype
        return self.teacher.features(self.teacher.normalize(views).to(dtype))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.exact_accumulation:
            with self.accelerator.autocast():
                add_rests(self.model_wrapped, batches, self.embed_teacher, all_reduce_sum)
        return batches, count

    def _stop_if_not_finite(self) -> None:
        """Reads the losses since the last look; on a GPU only when logging or saving, since a look waits for it."""
        suspects, self._suspects = self._suspects, []
        if not suspects or torch.stack([loss for _, loss, *_ in suspects]).isfinite().all():
            return
        step, loss = next((step, loss) for step, loss, *_ in suspects if not loss.isfinite())
        # The loss is that of all micro-batches and processes: only an image's own features say whether it is to blame.
        batches = [(index, finite) for other, _, index, finite in suspects if other == step]
        index, finite = (torch.cat(parts) for parts in zip(*batches))
        blamed = index[~finite].tolist()
        names = self.train_dataset.names((blamed or index.tolist())[:8])
        whose = "whose features are not finite" if blamed else "of that step (features of all of them are finite)"
        raise NonFiniteLoss(
            f"The loss is {loss.item()} at step {step}; nothing was saved after it. Images {whose}: "
            f"{', '.join(names)}{', ...' if len(blamed or index) > 8 else ''}. Lower --learning_rate or --beta, or use "
            f"float32.",
            found=bool(blamed),
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

    def _get_grad_norm(self, model, grad_norm=None):
        """Only where it is logged: it is a pass over all parameters."""
        step, every = self.state.global_step + 1, self.args.logging_strategy == IntervalStrategy.STEPS
        if every and step % self.state.logging_steps and not (step == 1 and self.args.logging_first_step):
            return grad_norm
        return super()._get_grad_norm(model, grad_norm)

    # ---- logs ----

    @property
    def images_seen(self) -> int:
        """Images of all optimiser steps so far, anchors and neighbours alike."""
        return self.length.images_after(self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._stop_if_not_finite()
        if "loss" in logs and self._parts_steps:
            names = list(self._parts)
            if names:  # a loss of one part has none to name
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
        self.collect()
        metrics, projected = self.evaluator(self.student, self.project)
        if all(method.name in OF_EMBEDDINGS for method in self.args.methods):
            metrics["loss"] = self._eval_loss(projected)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items() if value is not None}
        self._clock = None  # evaluation is no training time
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=named, num_samples=len(self.evaluator.test_images)
        )

    @torch.no_grad()
    def _eval_loss(self, projected: Tensor) -> float:
        """Mean loss over held-out batches of the training size, un-augmented."""
        size, criterion = min(self.args.images_per_batch, len(projected)), self._whole.criterion
        training = criterion.training
        rows = torch.arange(len(projected))
        parts = [x.to(self.args.device).split(size) for x in (projected, self.evaluator.teacher_test_features, rows)]
        criterion.eval()
        losses = [
            criterion(Features(s), Features(t), index)["loss"] for s, t, index in zip(*parts) if len(index) == size
        ]
        criterion.train(training)
        return torch.stack(losses).mean().item()
