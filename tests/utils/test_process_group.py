"""What processes find out together."""

import re
from pathlib import Path

import numpy as np
import torch

from coss_hf import DistillationArguments
from coss_hf.neighbors.embedding_store import embed_shards
from coss_hf.trainer.checkpoint_files import enter_output_dir
from coss_hf.utils import process_group
from tests.helpers.processes import spawn


class NotToBeUsed:
    """In place of a backbone: nothing is embedded."""

    dim = 4


def look(rank: int, folder: Path) -> None:
    """Each process with a folder of its own for the same name, as on two machines, and with a shared one."""
    process_group.SEEN_WITHIN = 0.5
    (folder / str(rank)).mkdir()
    (folder / "shared").mkdir(exist_ok=True)

    def enter(name: str) -> None:
        enter_output_dir(DistillationArguments(output_dir=str(folder / name), use_cpu=True), None)

    tries = {
        "cache": lambda: embed_shards(NotToBeUsed(), np.zeros(9), folder / str(rank) / "shards"),
        "output": lambda: enter(str(rank)),
        "shared": lambda: enter("shared"),
    }
    found = {}
    for name, run in tries.items():
        try:
            run()
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    torch.save(found, folder / f"{rank}.pt")


def test_a_folder_that_machines_do_not_share_is_refused_before_the_work(tmp_path):
    """It was found out once everything was embedded, or trained."""
    spawn(look, tmp_path, tmp_path, processes=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["shared"] == ""
        for name, given in (("cache", "--neighbors_cache "), ("output", "--output_dir=")):
            assert re.match(f"{given}.*: process 1 does not see .*; give a folder that all machines share", found[name])
    assert not list(tmp_path.glob("*/.seen-*"))
