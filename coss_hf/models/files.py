"""Files of a network: in its folder, or in its repository on the Hub."""

from pathlib import Path

from huggingface_hub import constants
from transformers.utils import cached_file

from coss_hf.utils.messages import first_line


def find_file(
    name: str | Path, file: str, revision: str | None = None, *, local_files_only: bool = False, given: str = ""
) -> str | None:
    """Path of a file in a folder or a repository on the Hub; None where there is none.

    Args:
        name: folder, or name on the Hub.
        file: name of the file.
        revision: branch, tag or commit on the Hub.
        local_files_only: whether to look in the cache alone.
        given: what errors name; default: ``name``.

    Raises:
        ValueError: whether there is one cannot be found out: the Hub does not answer, or refuses.
    """
    try:
        return cached_file(
            str(name),
            file,
            revision=revision,
            local_files_only=local_files_only,
            _raise_exceptions_for_missing_entries=False,
            # Who works without network means the cache.
            _raise_exceptions_for_connection_errors=not constants.HF_HUB_OFFLINE,
        )
    except OSError as error:
        raise ValueError(
            f"{given or name}: whether it has a {file} cannot be found out ({first_line(error)}); try again, or set "
            f"HF_HUB_OFFLINE=1 to use what is in the cache."
        ) from error
