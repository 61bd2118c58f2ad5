"""Where the images of a run come from: a folder of images, tables, a saved dataset, or the Hub."""

import glob
import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import datasets
from datasets import Dataset, DatasetInfo
from huggingface_hub import DatasetCard

from coss_hf.data.folder_files import SUFFIXES, FolderFiles
from coss_hf.data.image_folder import holds_images, load_image_folder, split_name
from coss_hf.utils.hub_lookup import find_dataset
from coss_hf.utils.messages import first_names, get_logger

logger = get_logger(__name__)

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")


class Source(NamedTuple):
    """Rows as they were found.

    Attributes:
        splits: the rows by split.
        folders: the folders of the tables that the rows come from; what the rows call by a relative path lies there.
        image_folder: the path of the folder, where it is one of images.
    """

    splits: dict[str, Dataset]
    folders: list[str]
    image_folder: str | None = None


def load_source(dataset: str, name: str | None, revision: str | None) -> Source:
    """Load the splits of a dataset.

    Args:
        dataset: see `load_images`.
        name: the name of the dataset's configuration.
        revision: the revision on the Hub.

    Raises:
        ValueError: there is no such dataset, or it cannot be loaded; the message says why.
    """
    if "://" in dataset:
        raise ValueError(_url_message(dataset))
    path = Path(dataset).expanduser()
    on_disk = path.exists() or glob.has_magic(dataset)
    files = [] if on_disk else find_dataset(dataset, revision)
    try:
        if path.is_dir():
            return _load_folder(path, name)
        if on_disk:
            return _load_matching(path)
        splits = dict(datasets.load_dataset(dataset, name=name, revision=revision))
    except Exception as error:  # `datasets` lets through the errors of every format and file system beneath it
        if isinstance(error, ValueError) and str(error).startswith("--dataset"):
            raise
        raise ValueError(
            f"--dataset {dataset} cannot be loaded: {_reason(error)}. Give a Hub name (and its --dataset_name where "
            f"it has several), a folder of images, parquet files, or a save_to_disk folder."
        ) from error
    _compare_with_hub(dataset, splits, files)
    return Source(splits, [])


def _compare_with_hub(dataset: str, splits: dict[str, Dataset], files: list[str]) -> None:
    """Compare the images of a repository with those that `datasets` loaded: it guesses splits from names."""
    if not files or any(file.endswith(ARCHIVES) for file in files):
        return
    if any(rows.info.builder_name != "imagefolder" for rows in splits.values()):
        return
    images = sum(os.path.splitext(file)[1].lower() in SUFFIXES for file in files)
    loaded = sum(len(rows) for rows in splits.values())
    counts = ", ".join(f"{split} {len(rows)}" for split, rows in splits.items())
    remedy = (
        f"hf download --repo-type dataset {dataset} --local-dir FOLDER, and give the folder, to load each of them once"
    )
    if loaded > images:
        raise ValueError(
            f"--dataset {dataset} has {images} images, and {loaded} were loaded ({counts}): some stand in two splits, "
            f"which were guessed from names. Use {remedy}."
        )
    if loaded < images:
        logger.warning(
            "--dataset %s: %d of %d images were loaded (%s); splits were guessed from names, or a table names part of "
            "the images. Use %s.",
            *(dataset, loaded, images, counts, remedy),
        )


def _url_message(dataset: str) -> str:
    hub = f"{datasets.config.HF_ENDPOINT}/datasets/"
    if dataset.startswith(hub):
        return f"--dataset {dataset} is a URL; give the name {'/'.join(dataset.removeprefix(hub).split('/')[:2])}."
    return f"--dataset {dataset} is a URL; download it, and give the folder or the parquet files."


def _reason(error: Exception) -> str:
    reason = str(error.__cause__ or error)
    if "corresponds to no data" in reason or "BatchSize must be greater than 0" in reason:
        return f"a split is empty ({reason})"
    if "scripts are no longer supported" in reason:
        return f"{reason}; the Hub often has it without: try --dataset_revision refs/convert/parquet"
    return reason


def _load_folder(path: Path, name: str | None) -> Source:
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return Source({split: _load_saved(path / split) for split in names}, [str(path)])
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return Source({"train": _load_saved(path)}, [str(path)])
    files = FolderFiles(os.path.abspath(path))
    configured = bool(name) or _has_configurations(path)
    if holds_images(files) and not configured:
        return Source(load_image_folder(files), [], files.root)
    return _load_tables(files, name, configured)


def _load_saved(folder: Path) -> Dataset:
    if json.loads((folder / "state.json").read_text())["_data_files"]:
        return datasets.load_from_disk(str(folder))
    features = DatasetInfo.from_directory(str(folder)).features  # load_from_disk fails on a split without rows
    return Dataset.from_dict({key: [] for key in features}, features=features)


def _has_configurations(path: Path) -> bool:
    """Whether a dataset card says which files belong to which split."""
    card = path / "README.md"
    return card.is_file() and bool(DatasetCard.load(card, ignore_metadata_errors=True).data.get("configs"))


def _load_tables(files: FolderFiles, name: str | None, configured: bool) -> Source:
    """The rows of the tables or archives of a folder."""
    present = [*files.images, *files.tables, *files.others]
    if not present:
        raise ValueError(f"--dataset {files.root} cannot be loaded: the folder holds no files.")
    parquet = [path for path in present if path.endswith(".parquet")]
    # `datasets` would go by the most frequent suffix, and load nothing but files of splits where there are any.
    if parquet and not configured:
        _log_left_out(files, files.images)
        return _load_parquet(parquet, files.root)
    script = os.path.join(files.root, f"{os.path.basename(files.root)}.py")
    if os.path.isfile(script):
        raise ValueError(
            f"--dataset {files.root}: {script} is taken for a loading script, because of its name, and these are no "
            f"longer run; rename it."
        )
    if glob.has_magic(files.root) or "::" in files.root:
        raise ValueError("its path holds characters that stand for patterns; rename it")
    builder = datasets.load_dataset_builder(files.root, name=name)
    used = [path for paths in (builder.config.data_files or {}).values() for path in paths]
    twice = [path for path, count in Counter(used).items() if count > 1]
    if twice:
        raise ValueError(f"--dataset {files.root}: its README.md names files more than once: {files.names(twice)}.")
    suffixes = tuple({os.path.splitext(path)[1] for path in used})
    unused = set(present) - set(used)
    _log_left_out(files, [path for path in present if path in unused and path.endswith(suffixes)])
    builder.download_and_prepare()
    return Source(dict(builder.as_dataset()), _folders(used))


def _log_left_out(files: FolderFiles, left_out: list[str]) -> None:
    if left_out:
        logger.warning("--dataset %s: left out: %s.", files.root, files.count(left_out))


def _load_matching(path: Path) -> Source:
    """The rows of a parquet file, or of all that a pattern stands for."""
    files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    if not files:
        raise ValueError("no file matches")
    for file in files:
        suffix = os.path.splitext(file)[1].lower()
        if suffix in ARCHIVES:
            raise ValueError(f"{file} is an archive; unpack it and give the folder")
        if suffix in SUFFIXES:
            raise ValueError(f"{file} is one image; give the folder of the images")
        if suffix != ".parquet":
            into = "into the folder of its images, and give that"
            hints = {suffix: f"; put it as metadata{suffix} {into}" for suffix in (".csv", ".jsonl")}
            hints[".json"] = f"; write it as metadata.jsonl, one JSON object per line, {into}"
            raise ValueError(f"{file} is not a parquet file{hints.get(suffix, '')}")
    return _load_parquet(files, str(path))


def _load_parquet(files: list[str], dataset: str) -> Source:
    """The rows of parquet files by their split, which is read off the names of the files and of their folders."""
    if "::" in "".join(files):
        raise ValueError("'::' in a path joins two paths; rename it")
    by_split: dict[str, list[str]] = {}
    for file in files:
        split = split_of_file(os.path.relpath(file, dataset)) if len(files) > 1 else "train"
        by_split.setdefault(split, []).append(file)
    if len(by_split) > 1:
        shown = "; ".join(f"{split}: {first_names(names)}" for split, names in by_split.items())
        logger.info("--dataset %s: splits by the names of the files: %s.", dataset, shown)
    escaped = {split: [glob.escape(name) for name in names] for split, names in by_split.items()}
    return Source(dict(datasets.load_dataset("parquet", data_files=escaped)), _folders(files))


def split_of_file(path: str) -> str:
    """The split that the name of a file, or of a folder that it lies in, stands for; else train."""
    *folders, file = Path(path).parts
    words = "".join(c if c.isalpha() else " " for c in Path(file).stem.lower()).split()
    found = (split_name(word) for word in [*words, *reversed(folders)])
    return next((split for split in found if split), "train")


def _folders(files: list[str]) -> list[str]:
    return sorted({os.path.dirname(os.path.abspath(file)) for file in files})
