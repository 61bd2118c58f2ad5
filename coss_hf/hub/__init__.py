"""Students and datasets on the Hub."""

from coss_hf.hub.push import PushFailed, check_repo, push, push_dataset

__all__ = ["PushFailed", "check_repo", "push", "push_dataset"]
