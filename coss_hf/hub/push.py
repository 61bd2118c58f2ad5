"""Students and neighbour datasets on the Hub: the check whether they may be pushed, the push, and its errors."""

import contextlib
import json
import shlex
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

try:  # the library that this version of huggingface_hub speaks through: httpx, or httpx2
    from huggingface_hub.utils import httpx
except ImportError:  # versions that do not say
    import httpx

from coss_hf.hub import sentence_modules
from coss_hf.hub.export_folders import exported_folders, replaced_exports
from coss_hf.hub.snippets import renamed
from coss_hf.models.heads import HEAD_FILE
from coss_hf.utils.errors import RunStopped
from coss_hf.utils.messages import command_to, first_line, get_logger

logger = get_logger(__name__)

PROCESSOR = "preprocessor_config.json"
# The code of a network outside Transformers, by the usual names of its files; a handler.py is its owner's.
CODE = ["configuration_*.py", "modeling_*.py", "image_processing_*.py"]
WEIGHTS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json", HEAD_FILE]
# Card, record, page and pictures of the run, next to the student.
COMPANIONS = ["README.md", "run.json", "report.html", "loss.png", "neighbors.png", "panel.png", "projection.png"]
# What an earlier push may have left, where this one has none of that name.
REPLACED = [PROCESSOR, *CODE, *WEIGHTS]
# Nothing else of a run's folder: training_args.bin, checkpoints and the loss's weights are not published.
PUBLISHED = ["config.json", PROCESSOR, *WEIGHTS, *COMPANIONS, *sentence_modules.FILES]
# Transport errors of the library, and what sockets raise below it.
NETWORK_ERRORS = (httpx.TransportError, ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


class PushFailed(RunStopped):
    """Nothing was pushed; the folder is complete on disk, and the message tells how to push it again."""


class _Problem(Exception):
    """Why the Hub rejects a request; ``refused`` where asking again would not help."""

    def __init__(self, reason: str, refused: bool = True):
        super().__init__(reason)
        self.refused = refused


def check_name(repo_id: str, argument: str) -> None:
    """Check that ``repo_id``, given as ``argument``, can be a name on the Hub.

    Raises:
        ValueError: it cannot.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{argument}={repo_id!r} is an invalid name on the Hub ({first_line(error)}); give USER/NAME, of letters, "
            f"digits, '-', '_' and '.'."
        ) from error


def check_repo(
    repo_id: str,
    argument: str,
    *,
    repo_type: str = "model",
    token: str | None = None,
    private: bool | None = None,
    create: bool = True,
) -> str:
    """Check whether ``repo_id`` can be pushed to, as far as can be known before anything is computed.

    Args:
        repo_id: ``USER/NAME``, or ``NAME`` for one of the user's own.
        argument: the command-line flag that errors name.
        repo_type: ``model`` or ``dataset``.
        token: access token; by default that of ``HF_TOKEN`` or ``hf auth login``.
        private: whether a new repository is private; an existing public one is then refused.
        create: whether to create the repository, if it does not exist.

    Returns:
        The full name; without network, after a warning, the name as it was given.

    Raises:
        ValueError: an invalid name, no token or a wrong one, a repository of somebody else.
    """
    check_name(repo_id, argument)
    try:
        return _open_repo(HfApi(token=token), repo_id, repo_type, private, create)
    except _Problem as problem:
        if problem.refused:
            raise ValueError(f"{argument}={repo_id}: {problem}.") from problem
        logger.warning("The Hub cannot be asked about %s now (%s): it is asked again at the push.", repo_id, problem)
        return repo_id


def push(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Push a student's folder as one commit: the student, its head, its card, its figures and pictures.

    Exported files in the repository that the folder does not have stay there if they are of the same weights. Those of
    other weights are deleted, and a warning names them.

    Args:
        folder: the output folder of ``recipes/distill.py``.
        repo_id: ``USER/NAME``, or ``NAME`` for one of the user's own.
        token: access token; by default that of ``HF_TOKEN`` or ``hf auth login``.
        private: whether a new repository is private; an existing public one is then refused.
        revision: a branch, created if it does not exist; by default main.
        commit_message: the commit message; by default it names the number of images seen.

    Raises:
        PushFailed: the push failed; the folder is unchanged.
    """
    folder = Path(folder)
    with _problems_as_push_failed(folder, repo_id, private, revision):
        api = HfApi(token=token)
        repo_id = _open_repo(api, repo_id, "model", private)
        card = folder / "README.md"
        text = new = None
        if card.is_file():  # its snippet loads the student by name
            text = card.read_text()
            new = renamed(text, repo_id, on_hub=True, revision=revision)
        with _errors_as_problems(repo_id), _with_card(folder, new) as place:
            if revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            code = ["*.py"] if _brings_code(folder) else []
            folders = published_folders(folder)
            replaced = _replaced_exports(api, repo_id, revision, folder, folders)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=place,
                commit_message=commit_message or f"Student{_images_seen(folder)}",
                revision=revision,
                allow_patterns=[*PUBLISHED, *code, *(f"{name}/*" for name in folders)],
                ignore_patterns=[f"{path.name}/*" for path in folder.iterdir() if path.name not in folders],
                delete_patterns=[*REPLACED, *replaced, *sentence_modules.FILES, *sentence_modules.FOLDERS],
            )
    if replaced:
        logger.warning(
            "%s: this push deleted %s, since nothing tells that they are of the weights that it pushed. Earlier "
            "revisions have them. Run %s and push again for files of these weights.",
            *(repo_id, ", ".join(replaced), command_to("export")),
        )
    if new != text:
        with contextlib.suppress(OSError):  # of a folder that can only be read
            card.write_text(new)
    print(f"Pushed: {commit.repo_url}, revision {commit.oid}", flush=True)
    return commit


def _replaced_exports(api: HfApi, repo_id: str, revision: str | None, folder: Path, pushed: list[str]) -> list[str]:
    """Names of the exported files in a repository that a push of this folder deletes."""
    return replaced_exports(
        api.list_repo_files(repo_id, revision=revision),
        folder,
        pushed,
        find=lambda name: api.hf_hub_download(repo_id, name, revision=revision),
    )


@contextlib.contextmanager
def _with_card(folder: Path, card: str | None) -> Iterator[Path]:
    """The folder with another card, as links: the folder may be read-only, and stays as it is if the push fails."""
    if card is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        for path in folder.rglob("*"):
            link = place / path.relative_to(folder)
            if path.is_file() and path != folder / "README.md":
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
        (place / "README.md").write_text(card)
        yield place


def published_folders(folder: Path) -> list[str]:
    """Names of the folders inside a student's folder that are pushed with it.

    They hold modules of sentence-transformers, and files exported from its present weights.
    """
    names, stale = exported_folders(folder)
    for name in stale:
        logger.warning(
            "%s is not pushed: nothing tells that its files are of the student's present weights. %s writes them.",
            *(folder / name, command_to("export")),
        )
    return [*names, *sentence_modules.module_folders(folder)]


def push_dataset(folder: str | Path, repo_id: str, *, private: bool | None = None) -> CommitInfo:
    """Push a folder of ``recipes/neighbors.py``, images included; ``--dataset REPO_ID`` loads it.

    Args:
        folder: the output folder of ``recipes/neighbors.py``.
        repo_id: ``USER/NAME``, or ``NAME`` for one of the user's own.
        private: whether a new repository is private; an existing public one is then refused.

    Raises:
        PushFailed: the push failed; the folder is unchanged.
    """
    import datasets  # a student is pushed without it

    folder = Path(folder)
    with _problems_as_push_failed(folder, repo_id, private):
        api = HfApi()
        repo_id = _open_repo(api, repo_id, "dataset", private)
        with _errors_as_problems(repo_id):
            found = folder / "neighbors.json"
            if found.is_file():  # first, so that the dataset's revision has it
                api.upload_file(path_or_fileobj=found, path_in_repo=found.name, repo_id=repo_id, repo_type="dataset")
            commit = datasets.load_from_disk(str(folder)).push_to_hub(repo_id, commit_message="Images and neighbours")
    print(f"Pushed: {commit.repo_url}, revision {commit.oid}", flush=True)
    return commit


def _open_repo(api: HfApi, repo_id: str, repo_type: str, private: bool | None, create: bool = True) -> str:
    """The full name of a repository that the token may write to; with ``create`` it then exists."""
    with _errors_as_problems(repo_id):
        me = api.whoami()
        given, _, name = repo_id.rpartition("/")
        owner = given or me["name"]
        mine = [me["name"], *(organisation["name"] for organisation in me.get("orgs") or [])]
        if owner.lower() not in [other.lower() for other in mine]:
            raise _Problem(
                f"{owner} is neither you ({me['name']}) nor an organisation of yours; give {me['name']}/{name}, or "
                f"log in as somebody who may write there"
            )
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise _Problem(f"the token may only read; {LOG_IN}")
        repo_id = f"{owner}/{name}"
        if create:
            repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        elif not api.repo_exists(repo_id, repo_type=repo_type):
            return repo_id
        if private and api.repo_info(repo_id, repo_type=repo_type).private is False:
            raise _Problem(f"{repo_id} exists and is public; make it private in its settings, or give another name")
    return repo_id


@contextlib.contextmanager
def _errors_as_problems(repo_id: str):
    """Turn errors of ``huggingface_hub`` and its HTTP library into a ``_Problem`` with reason and remedy."""
    try:
        yield
    except _Problem:
        raise
    except LocalTokenNotFoundError as error:
        raise _Problem(f"there is no token; {LOG_IN}") from error
    except Exception as error:
        raise _described(error, repo_id) from error


def _described(error: Exception, repo_id: str) -> _Problem:
    """What an error is about: an answer of the Hub, the network, a file of the folder, or something else.

    An upload's errors come wrapped in others, and only the innermost knows what the Hub answered.
    """
    errors = [error]
    while (inner := errors[-1].__cause__ or errors[-1].__context__) is not None:
        errors.append(inner)
    for one in errors:
        status = getattr(getattr(one, "response", None), "status_code", None)
        if status is not None:
            return _answered(status, one, repo_id)
    for one in errors:
        if isinstance(one, OfflineModeIsEnabled):
            return _Problem("HF_HUB_OFFLINE=1 keeps the Hub out of reach; unset it to push", False)
        if isinstance(one, NETWORK_ERRORS):
            return _Problem(f"the Hub cannot be reached, or the connection broke ({first_line(one)})", False)
    for one in errors:
        if isinstance(one, OSError) and one.filename:
            return _Problem(f"{one.filename} cannot be read ({one.strerror})")
    # Uploads by Xet have no class of their own for an answer of the server.
    return _Problem(f"the push fails ({first_line(errors[-1])}: {first_line(error)})", False)


def _answered(status: int, error: Exception, repo_id: str) -> _Problem:
    """What an answer of the Hub means; the Hub's own trouble passes, and asking again may help."""
    reasons = {
        401: f"the token is wrong or out of date; {LOG_IN}",
        403: f"the token may not write to {repo_id}; {LOG_IN} there, or give another name",
        404: f"there is no {repo_id} that this token can see; {LOG_IN} there, or give another name",
    }
    if status >= 500:
        return _Problem(f"the Hub answers with an error of its own, {status} ({first_line(error)}); try again", False)
    refused = status not in (408, 429)
    return _Problem(reasons.get(status, f"the Hub answers {first_line(error)}"), refused)


@contextlib.contextmanager
def _problems_as_push_failed(folder: Path, repo_id: str, private: bool | None, revision: str | None = None):
    """Turn a ``_Problem`` or Ctrl-C into a ``PushFailed`` that tells how to push again."""
    try:
        yield
    except (_Problem, KeyboardInterrupt) as problem:
        words = [str(folder), "--repo_id", repo_id]
        if private:
            words.append("--private")
        if revision:
            words += ["--revision", revision]
        why = f"Not pushed to {repo_id}: {str(problem) or 'interrupted'}"
        raise PushFailed(
            f"{why}. {folder} is complete; push it with: {command_to('push')} {shlex.join(words)}"
        ) from problem


def _brings_code(folder: Path) -> bool:
    """Whether the network or its image processor is loaded by code in the folder."""
    processor = folder / PROCESSOR
    described = [_read(folder / "config.json"), _read(processor) if processor.is_file() else {}]
    return any("auto_map" in one for one in described)


def _images_seen(folder: Path) -> str:
    record = folder / "run.json"
    if not record.is_file():
        return ""
    seen = _read(record).get("images_seen")  # a supervised teacher's record has none
    return "" if seen is None else f", {seen:,} images seen"


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _Problem(f"{path} cannot be read ({first_line(error)}); correct it") from error
