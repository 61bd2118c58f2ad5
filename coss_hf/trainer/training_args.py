"""Arguments of training, with the method's defaults."""

import copy
import inspect
import sys
from dataclasses import InitVar, dataclass, field

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType

from coss_hf.data.teacher_cache import DTYPES
from coss_hf.data.transforms import AUGMENTATIONS
from coss_hf.losses.combination import Method, parse_methods
from coss_hf.losses.registry import LOSSES, summands
from coss_hf.models.heads import HEADS
from coss_hf.trainer.default_settings import PAPER, SETTINGS
from coss_hf.trainer.engine import check_engine
from coss_hf.trainer.given_arguments import (
    ENGINE,
    UNUSED,
    check_numbers,
    check_order_of_images,
    check_unused,
    given,
    plain,
    recording_derived,
    refused,
    resolve_saving,
)
from coss_hf.trainer.schedule import RunLength
from coss_hf.utils.messages import parameter_names

# Seen between two looks at held-out images.
EVAL_IMAGES = 50_000


# Metrics of which less is better; of all others, more.
LESS_IS_BETTER = ("loss", "duplicates", "dead_dimensions")
# Schedules that evaluations drive, and how many of these without progress they wait for.
BY_METRIC = {SchedulerType.REDUCE_ON_PLATEAU: 10, SchedulerType.GREEDY: 10}

# Arguments that Transformers makes members of enumerations of.
ENUMERATIONS = {
    "lr_scheduler_type": SchedulerType,
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "hub_strategy": HubStrategy,
}

# Not the others of transformers: they publish the state of the optimizer.
HUB_STRATEGIES = ["end", "every_save"]


@dataclass
class DistillationArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with the method's own defaults, and what distillation adds.

    Arguments that are None are left out: the trainer fills them, in its own copy, as ``settings`` says; see
    ``coss_hf.trainer.settings``.

    ``dataclasses.replace`` derives again what was derived. It cannot tell True, False, None and members of enumerations
    that it is given from the same ones that were derived: where you change, by the same call, what these follow from,
    assign them to the new arguments instead, such as ``args.bf16 = False`` where ``settings="paper"`` becomes auto.
    """

    output_dir: str = field(
        default="student",
        metadata={"help": "Folder of the student, its checkpoints and its report."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew where --output_dir already holds a run, and replace it."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print what the run would do, with an estimate of time and memory, and stop."}
    )

    settings: str = field(
        default="auto",
        metadata={
            "help": "Values of what is left out among optimizer, learning rate, weight decay, warm-up, clipping, "
            "epochs, precision and loader workers. auto: by student, images and machine, each printed with its reason; "
            "paper: those of the paper's CIFAR recipe, for 3 epochs.",
            "choices": list(SETTINGS),
        },
    )

    method: str = field(
        default="coss",
        metadata={
            "help": f"Method: {', '.join(LOSSES)}; or a sum of several, with options: "
            "'coss(lambda_ss=0.5, beta=50) + rkd'."
        },
    )
    beta: float | None = field(default=None, metadata={"help": "Scale of the loss. Default: the method's own."})
    lambda_ss: float = field(default=1.0, metadata={"help": "Weight of the space similarity of CoSS."})
    head: str = field(
        default="auto",
        metadata={
            "help": "Projection from the student's to the teacher's dimension. auto: an mlp where they "
            "differ, else none.",
            "choices": list(HEADS),
        },
    )
    head_hidden_size: int = field(default=2048, metadata={"help": "Width of the hidden layer of an mlp head."})

    augmentation: str = field(
        default="imagenet",
        metadata={"help": "Random augmentation of the training images.", "choices": list(AUGMENTATIONS)},
    )
    view_size: int | None = field(
        default=None, metadata={"help": "Side of a view in pixels. Default: the larger of both networks' inputs."}
    )
    reduced_decoding: bool = field(
        default=True,
        metadata={
            "help": "Decode JPEG photographs at the smallest scale (1/2, 1/4, 1/8) that has all pixels which a view "
            "needs, which is faster and changes pixels slightly. If False, decode them at full size."
        },
    )
    view_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of the views and of the draw of neighbours. Default: --seed. Runs that share it can share a "
            "--teacher_cache."
        },
    )
    view_epochs: int = field(
        default=0,
        metadata={
            "help": "Number of epochs after which the same views come back, neighbours included. 0: never, each epoch "
            "has new ones."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which the teacher's embeddings of the views are kept, so that each view is embedded "
            "once; auto: one in the cache of datasets. Needs --view_epochs, and a method of embeddings or logits."
        },
    )
    teacher_cache_dtype: str = field(
        default="float32",
        metadata={
            "help": "Data type of the embeddings in --teacher_cache. float16 takes half the space.",
            "choices": list(DTYPES),
        },
    )
    neighbors_k: int = field(
        default=0,
        metadata={"help": "Number of nearest neighbours that are drawn into the batch with each image. 0: none."},
    )
    neighbors_pool: int = field(
        default=31, metadata={"help": "Number of nearest neighbours of each image to draw from."}
    )
    num_images: int | None = field(
        default=None, metadata={"help": "Length of the run in images seen, neighbours included, instead of epochs."}
    )

    exact_accumulation: bool = field(
        default=False,
        metadata={
            "help": "Compute the loss over all accumulated micro-batches as one batch, at the cost of a second forward "
            "pass of the student. If False, average their losses."
        },
    )

    channels_last: bool = field(
        default=False,
        metadata={
            "help": "Keep images and convolutions of both networks in channels-last memory, which is often faster."
        },
    )
    sync_batch_norm: bool = field(
        default=False, metadata={"help": "Compute the student's batch statistics over all processes. Needs GPUs."}
    )

    optim: str | None = field(
        default=None,
        metadata={"help": "Optimizer: sgd, or any other of transformers.TrainingArguments. Default: see --settings."},
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Largest learning rate of the schedule. Default: see --settings; with auto it depends on the views "
            "per step."
        },
    )
    momentum: float = field(
        default=0.9, metadata={"help": "Momentum of the SGD optimizer; other optimizers ignore it."}
    )
    weight_decay: float | None = field(
        default=None,
        metadata={"help": "Weight decay of the parameters that --weight_decay_on names. Default: see --settings."},
    )
    weight_decay_on: str | None = field(
        default=None,
        metadata={
            "help": "Parameters with weight decay: all, as in the paper, or matrices, without biases, norms, position "
            "and class tokens. Default: see --settings.",
            "choices": ["all", "matrices"],
        },
    )
    warmup_steps: float | None = field(
        default=None,
        metadata={
            "help": "Number of steps during which the learning rate rises from 0; below 1, a share of all steps. "
            "Default: see --settings."
        },
    )
    num_train_epochs: float | None = field(
        default=None,
        metadata={"help": "Number of passes over the training images. Default: by their number, see --settings."},
    )
    # `nargs` and `const` let the bare flag stand for True, as that of any other switch.
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Train under bfloat16 autocast; weights and loss stay float32. Default: on GPUs that compute in "
            "it, see --settings. Give false to train in float32.",
            "nargs": "?",
            "const": True,
        },
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Number of processes that load and augment images, for each training process. Default: by the "
            "free cores, see --settings; 0 for a stream."
        },
    )
    dataloader_persistent_workers: bool | None = field(
        default=None,
        metadata={
            "help": "Keep loader workers from epoch to epoch. Default: where there are any.",
            "nargs": "?",
            "const": True,
        },
    )
    lr_scheduler_type: str = field(
        default="cosine",
        metadata={
            "help": "Schedule of the learning rate, as of transformers.TrainingArguments. See also --lr_milestones."
        },
    )
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={
            "help": "Epochs after which the learning rate is multiplied by --lr_gamma, instead of --lr_scheduler_type."
        },
    )
    lr_gamma: float = field(default=0.1, metadata={"help": "Factor of the learning rate at each of --lr_milestones."})
    max_grad_norm: float | None = field(
        default=None,
        metadata={
            "help": "Largest norm of the gradient; longer gradients are scaled to it. 0: no clipping, as in the paper. "
            "Default: see --settings."
        },
    )
    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Number of images per device and batch, their neighbours not counted."}
    )
    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Number of images per device and forward pass in evaluation."}
    )
    eval_strategy: str = field(
        default="steps",
        metadata={
            "help": "When held-out images are evaluated: before training and then every --eval_steps steps "
            "(steps), after each epoch (epoch), or never (no)."
        },
    )
    eval_steps: float | None = field(
        default=None,
        metadata={
            "help": "Number of optimizer steps between two evaluations. Default: the number that sees 50,000 images; "
            "--save_steps where --load_best_model_at_end is given."
        },
    )
    eval_sample_size: int = field(
        default=2_000, metadata={"help": "Largest number of held-out images of an evaluation during training."}
    )
    eval_train_size: int = field(
        default=2_000,
        metadata={"help": "Number of training images whose labels k-NN votes with in evaluations during training."},
    )
    metric_for_best_model: str | None = field(
        default="overlap10",
        metadata={"help": "Metric of evaluations during training by which the best student is kept in best/."},
    )
    logging_steps: float = field(default=50, metadata={"help": "Number of optimizer steps between two log lines."})
    log_format: str = field(
        default="text",
        metadata={
            "help": "Log lines for people (text), or one JSON object per log step (json).",
            "choices": ["text", "json"],
        },
    )
    # Hides a loss that is not finite; here it stops the run.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite. Must be False: they stop the run."}
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Trackers: wandb, trackio, tensorboard, several of them, all or none."},
    )
    project: str = field(default="coss_hf", metadata={"help": "Name of the project of the run in Trackio."})
    save_strategy: str | None = field(
        default=None,
        metadata={
            "help": "When checkpoints are written: steps, epoch, best or no. Default: epoch, or steps where "
            "--save_steps is given."
        },
    )
    save_steps: float | None = field(
        default=None, metadata={"help": "Number of optimizer steps between two checkpoints. Default: 500."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Number of newest checkpoints that are kept."})
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "When the student is pushed to the Hub: once at the end, or with every checkpoint, too "
            "(every_save).",
            "choices": HUB_STRATEGIES,
        },
    )
    dataloader_drop_last: bool = field(
        default=True,
        metadata={"help": "Drop the last incomplete batch. Must be True: the loss is a statistic of the full batch."},
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Drop columns that the model does not read. Must be False: rows hold views and row numbers."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "Search for parameters without gradient at each step, with several processes. Set where "
            "the method needs it."
        },
    )

    # What was derived, by name: what was given, and what took its place. ``dataclasses.replace`` hands it on.
    derived: InitVar[dict[str, tuple] | None] = None
    _steps_of_images = None  # of `num_images`, once they are known: a trainer's arguments may go to another trainer

    @parameter_names()
    def __post_init__(self, derived):
        with recording_derived(self, derived):
            self._derive()

    def _derive(self) -> None:
        """Check what was given, and fill what follows from it."""
        if self.report_to is None:
            self.report_to = ["none"]
        self.given = given(self)
        check_unused(self.given)
        check_numbers(self)
        self._check_settings()
        ratio = getattr(self, "warmup_ratio", None)  # the former name, which Trainer still reads
        if ratio is not None and self.warmup_steps is None:
            self.warmup_steps = ratio
        left_out = self.stood_in = self.left_out
        self._stand_in(left_out)
        resolve_saving(self, "epoch")
        strategy = str(plain(self.eval_strategy))
        # How often is decided where the images are known; without held-out images there is no evaluation.
        self.evaluates_by_default = strategy == "steps" and not self.eval_steps
        if self.evaluates_by_default and self.load_best_model_at_end:
            self.eval_steps = self.save_steps  # only a student that was saved can be loaded
        if self.accelerator_config is None and torch.cuda.is_available() and not self.use_cpu:
            self.accelerator_config = {"non_blocking": True}  # else each step waits for the one before
        self._resolve_metric()
        try:
            super().__post_init__()
        except Exception as error:  # values of all kinds, packages that are not installed, files that cannot be read
            raise refused(self.given, ENGINE, "Trainer does not take this", error) from error
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"--train_sampling_strategy={self.train_sampling_strategy}: views have no lengths; leave it out."
            )
        self._resolve_schedule()
        self._evaluate_by_default()
        if self.resume_from_checkpoint in ("false", "False", "none", "None"):
            self.resume_from_checkpoint = None
        self._check_all()
        if self.settings == "auto":
            for name in left_out:
                setattr(self, name, None)  # until the student and its images are known

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the settings that were not given, and are not filled yet."""
        return tuple(name for name in PAPER if getattr(self, name) is None)

    def _check_settings(self) -> None:
        if self.settings not in SETTINGS:
            raise ValueError(f"--settings={self.settings!r} is unknown: choose one of {', '.join(SETTINGS)}.")
        self.check_deepspeed()
        optim = self._optimizer()
        if self.settings == "paper" and "sgd" not in optim and self.learning_rate is None:
            raise ValueError(
                f"--settings=paper: its learning rate of {PAPER['learning_rate']:g} is one of SGD, and --optim={optim} "
                f"was given; give --learning_rate, too, or leave --settings out."
            )

    def _optimizer(self) -> str:
        return str(plain(self.optim or PAPER["optim"]))

    def check_deepspeed(self) -> None:
        """Refuse another optimizer than SGD without a rate under DeepSpeed, whoever has asked for that.

        Raises:
            ValueError: the optimizer would train at a rate of SGD.
        """
        by_launcher = getattr(self, "deepspeed_plugin", None) or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
        if not (self.deepspeed or by_launcher) or "sgd" in self._optimizer() or self.learning_rate is not None:
            return
        given = "--deepspeed" if self.deepspeed else "DeepSpeed, of the launcher,"
        raise ValueError(
            f"{given} with --optim={self._optimizer()}: DeepSpeed is set up before the student is known, with a "
            f"learning rate of SGD; give --learning_rate, too."
        )

    def _stand_in(self, left_out: tuple[str, ...]) -> None:
        """Put the paper's values in the place of what was left out: ``Trainer`` checks and derives what it is given."""
        for name in left_out:
            setattr(self, name, PAPER[name])
        needs_workers = self.dataloader_prefetch_factor or self.dataloader_persistent_workers
        if self.settings == "auto" and "dataloader_num_workers" in left_out and needs_workers:
            self.dataloader_num_workers = 1

    def _resolve_metric(self) -> None:
        """Decide whether more of ``metric_for_best_model`` is better, unless it was given."""
        if self.greater_is_better is None:
            metric = (self.metric_for_best_model or "loss").removeprefix("eval_")
            self.greater_is_better = metric not in LESS_IS_BETTER

    def _resolve_schedule(self) -> None:
        """Let a schedule that evaluations drive know the direction of its metric."""
        if self.lr_milestones or self.lr_scheduler_type not in BY_METRIC:
            return
        options = self.lr_scheduler_kwargs or {}
        mode = "max" if self.greater_is_better else "min"
        if options.get("mode", mode) != mode:
            raise ValueError(
                f"--lr_scheduler_kwargs mode={options['mode']}: --metric_for_best_model={self.metric_for_best_model} "
                f"needs mode={mode}; leave it out."
            )
        self.lr_scheduler_kwargs = {**options, "mode": mode}
        if self.warmup_steps:
            raise ValueError(
                f"--warmup_steps={self.warmup_steps:g}: --lr_scheduler_type={self.lr_scheduler_type.value} has no "
                f"warm-up; leave one of them out."
            )

    def _check_methods(self) -> None:
        names = [method.name for method in self.methods]
        for name in names:
            if name not in LOSSES:
                raise ValueError(f"--method={name!r} is unknown: choose one of {', '.join(LOSSES)}, or a sum of them.")
        if self.exact_accumulation and (len(names) > 1 or not LOSSES[names[0]].separable):
            raise ValueError(f"--exact_accumulation works with --method {separable_methods()}, not {self.method}.")

    def for_training(self) -> "DistillationArguments":
        """Return a copy for a trainer, checked again: attributes may have been assigned since they were given.

        What distillation asks of them is checked, as when they are made. What was derived from others, such as
        ``mode`` of ``lr_scheduler_kwargs``, and what ``TrainingArguments`` checks by itself, is not done again.

        Raises:
            ValueError: a value that no distillation can use.
        """
        args = copy.copy(self)
        if args.use_cpu or not torch.cuda.is_available():
            args.dataloader_pin_memory = False  # torch warns of memory that is pinned for no device
        for name, kind in ENUMERATIONS.items():
            try:
                setattr(args, name, kind(getattr(args, name)))
            except ValueError as error:
                choices = ", ".join(HUB_STRATEGIES if kind is HubStrategy else [one.value for one in kind])
                raise ValueError(f"--{name}={getattr(args, name)!r} is unknown: choose one of {choices}.") from error
        args._read_accelerator_config()
        check_unused({name: value for name, value in given(args).items() if name in UNUSED})
        check_numbers(args)
        args._check_all()
        return args

    def _read_accelerator_config(self) -> None:
        """What was assigned in one of the forms in which it may be given."""
        value = self.accelerator_config
        if isinstance(value, AcceleratorConfig):
            return
        try:
            read = AcceleratorConfig.from_json_file if isinstance(value, str) else lambda one: AcceleratorConfig(**one)
            self.accelerator_config = read(value or {})
        except Exception as error:  # of a file, or of names that it does not have
            named = {"accelerator_config": value}
            raise refused(named, ("accelerator_config",), "accelerate does not take this", error) from error

    def _check_all(self) -> None:
        """All that can be checked without images and networks, of values that are derived."""
        self._check_methods()
        self._check_fixed_options()
        self._check_lengths()
        self._check_hub()
        check_engine(self)
        self._check_batch()

    def check_criterion(self, criterion: nn.Module) -> None:
        """Check that a loss that is given as a module can do what these arguments ask of it.

        Raises:
            ValueError: exact accumulation of a loss that does not declare itself separable.
        """
        separable = getattr(criterion, "separable", False) and callable(getattr(criterion, "totals", None))
        if self.exact_accumulation and not separable:
            raise ValueError(
                f"--exact_accumulation needs the sums that a loss is made of, and --criterion="
                f"{type(criterion).__name__} does not declare any (separable = True, with a method totals): leave "
                f"--exact_accumulation out, or use --method {separable_methods()}."
            )

    def _check_fixed_options(self) -> None:
        for name in ("logging_nan_inf_filter", "remove_unused_columns"):
            if getattr(self, name):
                raise ValueError(f"--{name} cannot be switched on in distillation; leave it out.")
        if not self.dataloader_drop_last:
            raise ValueError(
                "--dataloader_drop_last cannot be switched off: the loss is a statistic of the full batch; leave it "
                "out, or give set_dataloader drop_last=True."
            )
        if self.accelerator_config.split_batches or self.accelerator_config.dispatch_batches:
            raise ValueError(
                "--accelerator_config: split_batches and dispatch_batches re-cut batches, and the loss is a "
                "statistic of the full "
                "batches; leave both out."
            )
        check_order_of_images(self)

    def _check_lengths(self) -> None:
        if self.num_images is not None and self.max_steps > 0 and self.max_steps != self._steps_of_images:
            raise ValueError(f"--num_images={self.num_images} and --max_steps={self.max_steps}: give one of them.")
        if self.lr_milestones and sorted(self.lr_milestones) != list(self.lr_milestones):
            raise ValueError(f"--lr_milestones={self.lr_milestones} must rise.")

    def _check_hub(self) -> None:
        if self.hub_strategy.value not in HUB_STRATEGIES:
            raise ValueError(
                f"--hub_strategy={self.hub_strategy.value} would publish the optimizer's state with the student; use "
                f"{' or '.join(HUB_STRATEGIES)}."
            )

    def _check_batch(self) -> None:
        if not 0 <= self.neighbors_k <= self.neighbors_pool:
            raise ValueError(
                f"--neighbors_k={self.neighbors_k} must lie between 0 and --neighbors_pool={self.neighbors_pool}."
            )
        if self.images_per_batch < 2:
            raise ValueError(
                f"--per_device_train_batch_size={self.per_device_train_batch_size} with --neighbors_k=0 is a batch of "
                f"one image: space similarity compares dimensions over a batch, use at least 2."
            )

    def resolved(
        self, length: RunLength, *, has_evaluator: bool, has_unused_parameters: bool
    ) -> "DistillationArguments":
        """Return a copy in which everything is decided that depends on images and networks.

        Args:
            length: of an epoch, as of ``run_length``.
            has_evaluator: whether there are images to evaluate on.
            has_unused_parameters: whether trainable parameters get no gradient.
        """
        args = copy.copy(self)
        if args.num_images is not None:
            args.max_steps = args._steps_of_images = length.steps_for(args.num_images)
        if has_evaluator and args.eval_strategy != IntervalStrategy.NO:
            args.eval_on_start = True  # what training is compared with
        elif args.evaluates_by_default:
            args.eval_strategy = IntervalStrategy.NO
        if has_unused_parameters:
            args.ddp_find_unused_parameters = True
        return args

    def for_stream(self, criterion: nn.Module | None = None) -> "DistillationArguments":
        """Return a copy for training images that are read as a stream.

        Args:
            criterion: a loss instead of ``method``.

        Raises:
            ValueError: what needs a number for each image, or the length of a pass over them.
        """
        self.check_stream(criterion)
        args = copy.copy(self)
        args.ignore_data_skip = True  # the stream continues by itself
        if args.save_strategy == SaveStrategy.EPOCH:
            args.save_strategy = SaveStrategy.STEPS
        return args

    def check_stream(self, criterion: nn.Module | None = None) -> None:
        """Check that a stream of images can be trained on.

        Args:
            criterion: a loss instead of ``method``.

        Raises:
            ValueError: an argument that needs a number for each image, or the length of an epoch.
        """
        if self.neighbors_k:
            raise ValueError(
                f"--neighbors_k={self.neighbors_k}: neighbours are searched among all images, and a stream has no "
                f"index of them; set it to 0, or load the images without streaming. For very many images, "
                f"recipes/neighbors.py adds neighbours shard by shard."
            )
        for name in ("view_epochs", "teacher_cache"):
            if getattr(self, name):
                raise ValueError(
                    f"--{name}={getattr(self, name)}: views that come back are numbered by image, and a stream has no "
                    f"numbers of images; leave it out, or load the images without streaming."
                )
        if criterion is not None:
            for part in summands(criterion):
                _check_loss_of_stream(f"--criterion={type(part).__name__}", part)
        else:
            for method in self.methods:
                _check_loss_of_stream(f"--method={method.name}", LOSSES[method.name])
        if self.max_steps <= 0 and self.num_images is None:
            raise ValueError(
                "--max_steps is missing: nobody knows the number of images in a stream; give --max_steps or "
                "--num_images."
            )
        if self.lr_milestones:
            raise ValueError("--lr_milestones are epochs, and a stream's have no known length; leave them out.")
        if self.eval_strategy == IntervalStrategy.EPOCH:
            raise ValueError("--eval_strategy=epoch: the epochs of a stream have no known length; use steps.")

    def drawing(self, neighbors_k: int) -> "DistillationArguments":
        """Return a copy that counts as many neighbours as a dataset of views draws."""
        args = copy.copy(self)
        args.neighbors_k = neighbors_k
        args._evaluate_by_default()
        return args

    def _evaluate_by_default(self) -> None:
        if self.evaluates_by_default and not self.load_best_model_at_end:
            self.eval_steps = max(1, round(EVAL_IMAGES / self.images_per_step))

    def check_evaluations(self, length: RunLength) -> None:
        """Refuse what waits for evaluations that this run does not have.

        Args:
            length: of an epoch.

        Raises:
            ValueError: no evaluation, or too few of them.
        """
        waiting = self.waiting_for_evaluations()
        if waiting and self.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                f"{waiting} needs evaluations during training, and there are none: hold images out with "
                f"--validation_size, and leave --eval_strategy no out."
            )
        if self.lr_milestones or self.lr_scheduler_type not in BY_METRIC:
            return
        steps = self.max_steps if self.max_steps > 0 else round(self.num_train_epochs * length.steps_per_epoch)
        if self.eval_strategy == IntervalStrategy.EPOCH:
            interval = length.steps_per_epoch
        else:
            interval = self.eval_steps if self.eval_steps >= 1 else max(1, round(self.eval_steps * steps))
        count = int(steps // interval)
        patience = self.lr_scheduler_kwargs.get("patience", BY_METRIC[self.lr_scheduler_type])
        if count <= patience:
            raise ValueError(
                f"--lr_scheduler_type={self.lr_scheduler_type.value} would never change the rate: it waits for "
                f"{patience} evaluations without progress, and the run has {count}; evaluate more often "
                f"(--eval_steps), or give a shorter --lr_scheduler_kwargs '{{\"patience\": 1}}'."
            )

    def waiting_for_evaluations(self) -> str:
        """The argument that has an effect through evaluations alone; empty where there is none."""
        if not self.lr_milestones and self.lr_scheduler_type in BY_METRIC:
            return f"--lr_scheduler_type={self.lr_scheduler_type.value}"
        if self.load_best_model_at_end:
            return "--load_best_model_at_end"
        if self.save_strategy == SaveStrategy.BEST:
            return "--save_strategy=best"
        return ""

    @property
    def methods(self) -> list[Method]:
        """What ``method`` names, with ``beta`` and ``lambda_ss`` among the options."""
        methods = parse_methods(self.method)
        if self.beta is not None and len(methods) > 1:
            raise ValueError(f"--beta={self.beta} of which? Write --method 'coss(beta=50) + rkd(beta=1)'.")
        found = []
        for name, options in methods:
            given = {}
            if name in LOSSES and "lambda_ss" in inspect.signature(LOSSES[name]).parameters:
                given["lambda_ss"] = self.lambda_ss
            if self.beta is not None:
                given["beta"] = self.beta
            found.append(Method(name, given | options))
        return found

    @property
    def device(self) -> torch.device:
        """Where this process computes; on a CPU without a number, which torch 2.8 cannot load an optimizer onto."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def images_per_step(self) -> int:
        """Images of one optimizer step over all processes, neighbours included."""
        return self.images_per_batch * self.gradient_accumulation_steps

    @property
    def images_per_batch(self) -> int:
        """Images of one forward pass over all processes, neighbours included."""
        return self.per_device_train_batch_size * self.world_size * (1 + self.neighbors_k)

    def run_length(self, images: int | None) -> RunLength:
        """Length of an epoch over ``images`` training images; None for a stream, which has no end.

        Raises:
            ValueError: fewer images than one step takes, or ``--num_images`` less than one step.
        """
        if images is None:
            images = sys.maxsize
        anchors = self.images_per_step // (1 + self.neighbors_k)
        if images < anchors:
            raise ValueError(
                f"--per_device_train_batch_size={self.per_device_train_batch_size}: a step takes {anchors} anchors, "
                f"the training split has {images} images; use a smaller batch or more images."
            )
        if self.num_images is not None and self.num_images < self.images_per_step:
            raise ValueError(f"--num_images={self.num_images} is less than one step of {self.images_per_step} images.")
        batches = images // (self.per_device_train_batch_size * self.world_size)
        return RunLength(batches, self.gradient_accumulation_steps, self.images_per_batch)


def separable_methods() -> str:
    """Names of the methods that exact accumulation works with, for messages."""
    return ", ".join(name for name, loss in LOSSES.items() if loss.separable)


def _check_loss_of_stream(named: str, loss) -> None:
    """Refuse a loss, or the class of one, that needs images that can be numbered or drawn at random."""
    if getattr(loss, "needs_image_rows", False):
        raise ValueError(
            f"{named} keeps a memory with a row for each training image, and a stream has no numbers of images; choose "
            f"another method, or load the images without streaming."
        )
    is_an_option = inspect.isclass(loss) and "pretraining_steps" in inspect.signature(loss).parameters
    if getattr(loss, "pretraining_steps", 0) or is_an_option:
        raise ValueError(
            f"{named} learns from images in random order before the training, which a stream does not give; choose "
            f"another method, or load the images without streaming."
        )
