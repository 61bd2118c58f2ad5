"""Which options `--help` shows, in which group, and which are never offered. Needs the standard library alone."""

from coss_hf.study.single_run import OF_ONE_RUN

# Shown by --help, in this order. Everything else is behind --help_all.
GROUPS = {
    "Teacher, student and images": (
        "teacher",
        "student",
        "student_init",
        "dataset",
        "train_split",
        "image_column",
        "validation_size",
        "max_train_samples",
        "on_bad_image",
        "config",
    ),
    "Method and neighbours": (
        "method",
        "lambda_ss",
        "head",
        "augmentation",
        "neighbors_k",
        "neighbors_pool",
    ),
    "Length and batch": (
        "num_train_epochs",
        "num_images",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    ),
    "Optimizer": (
        "settings",
        "optim",
        "learning_rate",
        "weight_decay",
        "lr_scheduler_type",
        "warmup_steps",
        "max_grad_norm",
        "seed",
    ),
    "Speed and precision": (
        "bf16",
        "torch_compile",
        "dataloader_num_workers",
        "use_cpu",
        "num_processes",
        "accelerate_config",
    ),
    "Evaluation and tracking": (
        "label_column",
        "eval_strategy",
        "eval_steps",
        "logging_steps",
        "report_to",
    ),
    "Output and Hub": (
        "output_dir",
        "resume_from_checkpoint",
        "overwrite_output_dir",
        "dry_run",
        "push_to_hub",
        "hub_model_id",
    ),
}

# Commands that `coss-hf` starts in several processes on request, and the options that ask for it, with their values.
LAUNCHED = ("distill", "neighbors", "train-teacher")
LAUNCH_OPTIONS = {"num_processes": "N", "accelerate_config": "FILE"}
# Those that train several students, in processes of their own.
STUDIES = ("compare", "report", "reproduce")

# Options that a command shares with others, but does not read, or refuses.
_REFUSED = (
    "auto_find_batch_size",
    "bf16_full_eval",
    "enable_jit_checkpoint",
    "eval_accumulation_steps",
    "fp16_full_eval",
    "save_on_each_node",
)
_NOT_OF_STUDIES = ("method", "beta", "seed", *OF_ONE_RUN, *_REFUSED)
NOT_READ = {
    "distill": _REFUSED,
    "neighbors": (
        "student",
        "student_config_overrides",
        "student_dtype",
        "student_init",
        "student_pooling",
        "student_revision",
        "student_size",
        "shuffle_buffer_size",
        "streaming",
    ),
    "compare": _NOT_OF_STUDIES,
    "report": _NOT_OF_STUDIES,
}

# Sentences for options that are inherited from transformers.TrainingArguments as they are.
SENTENCES = {
    "accelerate_config": "File of `accelerate config`, or the name of one that comes with the package (multi_gpu, "
    "fsdp, ...).",
    "bf16": "Train under bfloat16 autocast; weights and loss stay float32.",
    "config": "YAML file with any of these options; the command line overrides it.",
    "dataloader_num_workers": "Number of processes that load and augment images, for each training process.",
    "eval_steps": "Number of optimizer steps between two evaluations. Default: that of --logging_steps.",
    "fp16": "Train under float16 autocast with loss scaling; needs a GPU.",
    "gradient_accumulation_steps": "Number of batches whose gradients are added up before each optimizer step.",
    "hub_model_id": "Repository on the Hub to push to, as USER/NAME.",
    "logging_steps": "Number of optimizer steps between two log lines.",
    "num_processes": "Number of processes on this machine: one for each GPU.",
    "num_train_epochs": "Number of passes over the training images.",
    "push_to_hub": "Push the finished network to the Hub.",
    "resume_from_checkpoint": "Resume from the last checkpoint in --output_dir, or from the folder given here.",
    "run_name": "Name of the run in the tracker.",
    "seed": "Seed of initial weights, views and batches.",
    "torch_compile": "Compile all networks of the run with torch.compile.",
    "use_cpu": "Run on the CPU, even where there is a GPU.",
    "warmup_steps": "Number of steps during which the learning rate rises from 0; below 1, a share of all steps.",
}

# Defaults of one command that are not those of the others.
DEFAULTS = {"compare": {"output_dir": "compared"}, "report": {"output_dir": "report"}}

_HELD_OUT = "Number of images held out of train before anything else, or their share, below 1. Default: "
_DAMAGED = "What to do with images that cannot be decoded. error: end and name them. skip: "
_RESULTS = "Folder of the tables, the plots and the finished trials. Default: "
_BY_COMMAND = {
    "validation_size": {
        ("distill", "neighbors"): f"{_HELD_OUT}2,000, a tenth of train at most; none below 200 images, or where the "
        "dataset has a validation split next to its test split, or a column of neighbours.",
        ("compare",): f"{_HELD_OUT}2,000, a tenth of train at most; none where the dataset has a validation split next "
        "to its test split.",
        ("report",): f"{_HELD_OUT}2,000, a tenth of train at most; none where the dataset brings images to measure on.",
        ("evaluate", "export"): f"{_HELD_OUT}those that the student's own run held out, else none.",
        ("reproduce",): f"{_HELD_OUT}none; needed where scales are chosen or --eval_at is given.",
        ("train-teacher", "embed"): f"{_HELD_OUT}none.",
    },
    "on_bad_image": {
        ("distill",): f"{_DAMAGED}leave out those that are found at the start, and take another image in the place of "
        "one that cannot be decoded during the training. At the start a sample is read, with --neighbors_k or "
        "--teacher_cache all images. Default: error.",
        ("train-teacher",): f"{_DAMAGED}leave out those that are found at the start, where a sample is read, and take "
        "another image in the place of one that cannot be decoded during the training. Default: error.",
        ("neighbors", "compare", "report", "reproduce", "evaluate", "embed", "export"): f"{_DAMAGED}leave them out. "
        "All images are read at the start. Default: error.",
    },
    "output_dir": {
        ("distill",): "Folder of the student, its checkpoints and its report.",
        ("compare",): f"{_RESULTS}compared.",
        ("report",): f"{_RESULTS}report.",
    },
}
# The same by command and option.
COMMAND_SENTENCES = {
    (command, option): text
    for option, texts in _BY_COMMAND.items()
    for names, text in texts.items()
    for command in names
}

# Options of language models, deprecated ones, and those that must keep one value.
NOT_OFFERED = frozenset(
    """
    average_tokens_across_devices batch_eval_metrics dataloader_drop_last ddp_find_unused_parameters do_eval
    do_predict do_train eval_do_concat_batches eval_use_gather_object fp16_backend fp16_opt_level
    group_by_length half_precision_backend include_for_metrics include_inputs_for_metrics
    include_num_input_tokens_seen jit_mode_eval label_names label_smoothing_factor length_column_name
    liger_kernel_config logging_nan_inf_filter mp_parameters neftune_noise_alpha past_index
    per_gpu_eval_batch_size per_gpu_train_batch_size prediction_loss_only push_to_hub_model_id
    push_to_hub_organization push_to_hub_token ray_scope remove_unused_columns torchdynamo
    train_sampling_strategy use_ipex use_legacy_prediction_loop use_liger_kernel
    """.split()
)
