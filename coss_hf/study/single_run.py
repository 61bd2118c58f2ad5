"""Options of a single run that a study neither reads nor takes. Needs the standard library alone, for pages of help."""

# A study has its own length, measures at the end of its runs, publishes nothing, and resumes by itself.
OF_ONE_RUN = (
    "num_train_epochs",
    "max_steps",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "eval_sample_size",
    "eval_train_size",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "dry_run",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "hub_always_push",
)


def refusal(name: str) -> str:
    """Return why a study does not take an option of ``OF_ONE_RUN``."""
    return f"--{name}: it is for a single run, and this command makes many; leave it out."
