"""Whether the Hub has a dataset, before `datasets` loads it; similar names of datasets and models."""

from difflib import SequenceMatcher
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from coss_hf.utils.messages import did_you_mean, get_logger

logger = get_logger(__name__)


def find_dataset(dataset: str, revision: str | None) -> list[str]:
    """Ask the Hub for a dataset once, where `load_dataset` retries for 20 seconds; without network the cache suffices.

    Args:
        dataset: the name of the dataset on the Hub.
        revision: the branch, tag or commit.

    Returns:
        The names of the dataset's files; empty where they are not known.

    Raises:
        ValueError: an unknown dataset (similar names from its folder, the cache and the Hub are given), or no network.
    """
    cached = cached_names("datasets")
    parent = Path(dataset).expanduser().parent
    names = list(cached)
    if parent.is_dir():
        names += [str(parent / file.name) for file in parent.iterdir()]
    try:
        info = HfApi().dataset_info(dataset, revision=revision, timeout=10)
    except RevisionNotFoundError as error:
        raise ValueError(
            f"--dataset_revision {revision}: unknown to the Hub for --dataset {dataset}; leave it out for main."
        ) from error
    except GatedRepoError as error:
        raise ValueError(f"--dataset {dataset} is gated: ask for access on its page, then `hf auth login`.") from error
    except HFValidationError as error:
        raise _unknown(dataset, "no such file or folder", names) from error
    except RepositoryNotFoundError as error:
        reason = "no such file or folder, nor a dataset on the Hub (if it is private: `hf auth login`)"
        raise _unknown(dataset, reason, names + search("datasets", dataset)) from error
    except Exception as error:  # no network, in the words of whichever HTTP library huggingface_hub uses
        if dataset not in cached:
            reason = f"no such file or folder, and the Hub cannot be asked for it ({str(error).splitlines()[0]})"
            raise _unknown(dataset, reason, names) from error
        logger.warning("The Hub is out of reach: loading %s from the cache (sooner with HF_HUB_OFFLINE=1).", dataset)
        return []
    return [file.rfilename for file in getattr(info, "siblings", None) or []]


def cached_names(kind: str) -> list[str]:
    """Names of what is in the caches.

    Args:
        kind: ``models`` or ``datasets``.
    """
    folders = Path(constants.HF_HUB_CACHE).glob(f"{kind}--*")
    names = [folder.name.removeprefix(f"{kind}--").replace("--", "/") for folder in folders]
    if kind == "datasets":
        import datasets  # takes a second

        prepared = Path(datasets.config.HF_DATASETS_CACHE).glob("*___*")
        names += [folder.name.replace("___", "/") for folder in prepared]
    return names


def search(kind: str, name: str) -> list[str]:
    """Names that the Hub's search finds for the last part of a name; none where it does not answer.

    Args:
        kind: ``models`` or ``datasets``.
        name: the name that is not there.
    """
    try:
        api = HfApi()
        ask = api.list_models if kind == "models" else api.list_datasets
        return [found.id for found in ask(search=Path(name).name, limit=20)]
    except Exception as error:  # a suggestion is not worth another error
        logger.debug("No suggestions from the Hub: %s", error)
        return []


def _unknown(dataset: str, reason: str, names: list[str]) -> ValueError:
    return ValueError(f"--dataset {dataset}: {reason}.{did_you_mean(similar_names(dataset, names))}")


def similar_names(wanted: str, names: list[str], count: int = 3) -> list[str]:
    """Names (or paths) whose last part is most like the last part of ``wanted``; the full names break ties."""

    def likeness(name):
        pairs = ((wanted.rstrip("/").split("/")[-1], name.split("/")[-1]), (wanted, name))
        return [SequenceMatcher(None, a.lower(), b.lower()).ratio() for a, b in pairs]

    ranked = sorted(((likeness(name), name) for name in set(names)), reverse=True)
    return [name for (last_part, _), name in ranked[:count] if last_part > 0.6]
