"""The folder of a run: who may write it."""

import pytest
from filelock import FileLock

from coss_hf.trainer.checkpoint_files import lock_output_dir


@pytest.mark.parametrize("kind", [PermissionError, OSError])
def test_a_folder_that_cannot_be_written_is_bad_input(kind, tmp_path, monkeypatch):
    """Of a folder that was there already it was a traceback."""

    def acquire(self, timeout):
        raise kind(30, "Read-only file system", self.lock_file)

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(
        ValueError, match="^--output_dir=.* cannot be written .*Read-only.*; give a folder that you may"
    ):
        lock_output_dir(tmp_path)
