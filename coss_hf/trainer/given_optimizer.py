"""An optimizer of the user's own, completed by what the trainer builds: the projection head, and what a loss learns."""

import torch
from torch import nn

from coss_hf.trainer.distillation_model import DistillationModel
from coss_hf.utils.messages import first_line, first_names, get_logger

logger = get_logger(__name__)

_ADDED = "added_by_trainer"  # entry of the parameter group


def complete_optimizer(optimizer: torch.optim.Optimizer | None, scheduler, model: DistillationModel) -> None:
    """Add the parameters that the user could not know to an optimizer that was given, in place.

    Of the student's own parameters those that it lacks are left out of it: that was the user's choice.

    Args:
        optimizer: that was given; None for none.
        scheduler: that was given together with it; None for none.
        model: what is trained.

    Raises:
        ValueError: an optimizer of another network, or one that no training step can use; or parameters that cannot be
            added to it, by their names.
    """
    if optimizer is None:
        return
    if isinstance(optimizer, torch.optim.LBFGS):
        # It takes further groups without an error, and steps by the first alone.
        raise ValueError(
            f"--optimizers: {type(optimizer).__name__} computes the loss several times in a step, and of one parameter "
            f"group, which no training step does; give another, such as torch.optim.AdamW."
        )
    _remove_added(optimizer)
    present = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {id(parameter) for parameter in model.network.parameters() if parameter.requires_grad}
    if trained and not trained & present:
        raise ValueError(
            "--optimizers: the optimizer has none of the student's parameters that are trained; make it of the "
            "network that you give as student."
        )
    missing = _missing(model, trained | present)
    if not missing:
        return
    if scheduler is not None:
        raise _not_added(missing, "a schedule was given, too, which knows other parameter groups")
    try:
        optimizer.add_param_group({"params": [*missing.values()], _ADDED: True})
    except Exception as error:  # of any optimizer: it has no default rate, or takes one group or matrices alone
        raise _not_added(missing, first_line(error)) from error
    logger.info("The optimizer that was given trains %s, too, with its defaults.", first_names([*missing]))


def _missing(model: DistillationModel, known: set[int]) -> dict[str, nn.Parameter]:
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return {name: value for name, value in found.items() if id(value) not in known}


def _remove_added(optimizer: torch.optim.Optimizer) -> None:
    """What an earlier trainer, or this one before it was set up again, has added: heads that are trained no more."""
    for group in optimizer.param_groups:
        if _ADDED in group:
            for parameter in group["params"]:
                optimizer.state.pop(parameter, None)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if _ADDED not in group]


def _not_added(missing: dict[str, nn.Parameter], why: str) -> ValueError:
    return ValueError(
        f"--optimizers: the optimizer lacks parameters that the trainer builds ({first_names([*missing])}), and they "
        f"cannot be added to it: {why}. Make optimizer and schedule of trainer.model.parameters(), and set "
        f"trainer.optimizer and trainer.lr_scheduler."
    )
