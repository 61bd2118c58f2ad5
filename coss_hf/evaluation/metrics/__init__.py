"""A folder for each metric, to be given to ``evaluate.load`` by its path; see ``coss_hf.evaluation.hf_metrics``."""
