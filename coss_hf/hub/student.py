"""A student with its head: images to embeddings in its teacher's space, where it can replace the teacher."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import CommitInfo
from PIL import Image
from torch import Tensor, nn

from coss_hf.hub.export_folders import copy_exports, warn_of_stale_exports
from coss_hf.hub.push import COMPANIONS, PushFailed, push
from coss_hf.hub.snippets import Subject, renewed
from coss_hf.hub.student_folder import write_student
from coss_hf.models.backbone import Backbone
from coss_hf.models.embedding import as_image, check_batch_size, embed, naming_image
from coss_hf.models.files import find_file
from coss_hf.models.heads import HEAD_FILE, load_head
from coss_hf.models.loading import load_backbone
from coss_hf.utils.messages import get_logger
from coss_hf.utils.vectors import l2_normalize

logger = get_logger(__name__)


class Student(nn.Module):
    """A backbone with its projection head, where it has one, in evaluation mode.

    ``from_pretrained`` freezes it; a network that is made a student stays as trainable as it was.

    Args:
        backbone: the network with its pooling and pre-processing.
        head: the projection head from its embeddings to the teacher's space.

    Attributes:
        backbone: the network with its pooling and pre-processing.
        model: the network alone, ``backbone.model``.
        head: the projection head, or None.
        dim: dimension of the embeddings.

    Raises:
        ValueError: a head that does not fit the backbone's embeddings.

    Example::

        student = Student.from_pretrained("my-student")
        photos = student.encode(["a.jpg", "b.jpg"], normalize=True)
        student.similarity(photos, photos)  # cosines, (2, 2)
    """

    def __init__(self, backbone: Backbone, head: nn.Module | None = None):
        super().__init__()
        if head is not None and next(head.parameters()).shape[1] != backbone.dim:
            raise ValueError(
                f"--pooling={backbone.pooling}: embeddings of {backbone.dim} dimensions do not fit the head of "
                f"{backbone.name}; use the pooling that it was trained with."
            )
        self.backbone = backbone
        self.model = backbone.model
        self.head = head
        self.dim = backbone.dim if head is None else [*head.parameters()][-1].shape[0]
        self._source: tuple[str, str | None] | None = None  # name and revision, for the files next to the weights
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        revision: str | None = None,
        *,
        module: nn.Module | Callable[[], nn.Module] | Backbone | None = None,
        trust_remote_code: bool = False,
    ) -> "Student":
        """Load student and head of a run of ``recipes/distill.py``.

        Its embeddings can be compared with those of the teacher (``student.backbone.model.config.teacher_space``
        names it), for instance searched in a gallery that the teacher has embedded.

        Args:
            name: folder, or name on the Hub.
            revision: branch, tag or commit on the Hub.
            module: for a student that was trained from a plain ``nn.Module``: a network that is built as that was,
                whose weights are replaced; its constructor, such as ``torchvision.models.resnet18``; or a ``Backbone``
                of it.
            trust_remote_code: whether the student may run code of its own, as one that was trained with
                ``--trust_remote_code`` needs it.

        Raises:
            ValueError: an unknown network, one that was not trained into a teacher's space, or a missing head.
        """
        name = str(name)
        options = {"revision": revision, "module": module, "trust_remote_code": trust_remote_code}
        backbone = load_backbone(name, argument="student", **options).freeze()
        space = getattr(backbone.model.config, "teacher_space", None)
        if space is None:
            raise ValueError(
                f"student={name} was not trained into a teacher's space (no teacher_space in its config.json); embed "
                f"in its own with coss_hf.embed."
            )
        head = load_head(name, revision)
        if (head is None) == space["head"]:
            state = "of another run"
            if head is None:
                state = "missing, so that the teacher's space cannot be reached"
            raise ValueError(f"student={name}: {HEAD_FILE} is {state}; take the folder as the run left it.")
        student = cls(backbone, head).requires_grad_(False)
        student._source = (name, revision)
        return student

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed processed images ``(b, 3, h, w)``: ``(b, dim)``."""
        embedding = self.backbone.features(pixel_values).embedding
        return embedding if self.head is None else self.head(embedding)

    @torch.no_grad()
    def embed(self, images, batch_size: int = 64) -> Tensor:
        """Embed images: ``(b, dim)``. Arguments and errors are those of ``coss_hf.embed``."""
        embedding = embed(self.backbone, images, batch_size=batch_size)
        return embedding if self.head is None else self.head(embedding)

    @torch.no_grad()
    def encode(
        self,
        images,
        batch_size: int = 64,
        *,
        device: torch.device | str | None = None,
        normalize: bool = False,
    ) -> Tensor:
        """Embed many images, read and processed one batch at a time.

        Args:
            images: one image or several: PIL images, paths, uint8 arrays ``(h, w, 3)``, uint8 tensors ``(3, h, w)``,
                or a column of a dataset, such as ``dataset["image"]``; or pixel values ``(b, 3, h, w)``, a float
                tensor.
            batch_size: number of images per forward pass.
            device: the device that the student is moved to; by default the one it is on.
            normalize: whether each embedding is scaled to length 1.

        Returns:
            The embeddings ``(n, dim)``, float32 on the CPU, in the order of the images.

        Raises:
            ValueError: an image that cannot be read, named by its path or position; no images; a row of a dataset.
        """
        check_batch_size(batch_size)
        if device is not None:
            self.to(device)
        images = _several(images)
        rows = torch.empty(len(images), self.dim)
        for start in range(0, len(images), batch_size):
            if _are_pixels(images):
                batch = images[start : start + batch_size]
            else:
                batch = [_image_at(images, i) for i in range(start, min(start + batch_size, len(images)))]
            rows[start : start + len(batch)] = self.embed(batch, batch_size)
        return l2_normalize(rows) if normalize else rows

    @staticmethod
    def similarity(a: Tensor, b: Tensor) -> Tensor:
        """Compute the cosine of each row of ``a`` ``(n, d)`` with each row of ``b`` ``(m, d)``: ``(n, m)``.

        Raises:
            ValueError: embeddings of different dimensions, or not ``(n, d)``.

        Example:
            >>> import torch
            >>> Student.similarity(torch.eye(2), torch.tensor([[3.0, 0.0]]))
            tensor([[1.],
                    [0.]])
        """
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
            raise ValueError(
                f"a {tuple(a.shape)} and b {tuple(b.shape)} cannot be compared; give embeddings (n, d) and (m, d) of "
                f"one dimension d."
            )
        return l2_normalize(a.float()) @ l2_normalize(b.float()).T

    def save_pretrained(self, folder: str | Path) -> None:
        """Write network, image processor and head to a folder that ``AutoModel``, ``Student`` and others load.

        Card, record and pictures of the run are written next to them where the student was loaded with them. So are
        files of ``coss-hf export``, if they are of the weights that are written. Where a student from another folder is
        written into that of a run, the card, record and pictures of that run are removed.

        Raises:
            ValueError: ``folder`` is a file, or the backbone has no image processor.
        """
        self.backbone.required_preprocessing()
        folder = Path(folder)
        if folder.is_file():
            raise ValueError(f"folder={folder} is a file; give the name of a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_student(folder, self.backbone, self.head)
        if self._source is not None:
            self._copy_files_of_source(folder)
        warn_of_stale_exports(folder)
        card = folder / "README.md"
        if self._source and card.is_file():  # code for exported files that stayed behind goes from it
            card.write_text(renewed(card.read_text(), Subject(self._source[0], self.backbone, self.head, folder)))

    def _copy_files_of_source(self, folder: Path) -> None:
        """Copy what lies next to the weights that this student was loaded from, as far as it holds for the new ones."""
        source, revision = self._source

        def find(name: str) -> str | None:
            return find_file(source, name, revision)

        if _has_another_run(folder, source):
            _remove_companions(folder)
        for name in COMPANIONS:
            found = find(name)
            if found is not None and Path(found).resolve() != (folder / name).resolve():
                shutil.copy(found, folder / name)
        copy_exports(find, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> CommitInfo:
        """Push the student to the Hub as one commit: what ``save_pretrained`` writes.

        Exported files that are on the Hub stay there if they are of these weights. The others are deleted, and a
        warning names them.

        Args:
            repo_id: ``USER/NAME``, or ``NAME`` for one of the user's own.
            private: whether a new repository is private; an existing public one is then rejected.
            revision: a branch, created if it does not exist; by default main.
            commit_message: the commit message; by default it names the number of images seen.
            token: access token; by default that of ``HF_TOKEN`` or ``hf auth login``.

        Raises:
            PushFailed: the push failed; nothing was changed here.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            try:
                options = {"token": token, "private": private, "revision": revision, "commit_message": commit_message}
                return push(folder, repo_id, **options)
            except PushFailed as error:
                # The folder that its message names is gone in a moment.
                raise PushFailed(f"Not pushed to {repo_id}: {error.__cause__}; call push_to_hub again.") from error


def _has_another_run(folder: Path, source: str) -> bool:
    """Whether a folder has the record of a run that the student in ``source`` is not from; not where it is in doubt.

    A part of a run, such as its ``best/``, has no record of its own; that of a name on the Hub may not be in the cache.
    """
    source = Path(source).resolve()
    is_part = folder.resolve() in (source, *source.parents)
    return (folder / "run.json").is_file() and source.is_dir() and not is_part


def _remove_companions(folder: Path) -> None:
    """Remove a run's card, record and pictures, which would be taken for those of other weights."""
    found = [name for name in COMPANIONS if (folder / name).is_file()]
    logger.warning("%s: %s of another run are removed.", folder, ", ".join(found))
    for name in found:
        (folder / name).unlink()


def _several(images):
    """The images as a sequence.

    Raises:
        ValueError: no images, or a row of a dataset.
    """
    names = list(images) if isinstance(images, dict) else getattr(images, "column_names", None)
    if names is not None:
        raise ValueError(
            f"images: a {type(images).__name__} of {', '.join(map(str, names))}; give the images in it, such as "
            f"row['image'] or dataset['image']."
        )
    one = isinstance(images, (str, Path, Image.Image)) or getattr(images, "ndim", None) == 3
    images = [images] if one else images if hasattr(images, "__getitem__") else list(images)
    if not len(images):
        raise ValueError("images: got none; give one image or more.")
    return images


def _image_at(images, position: int) -> Image.Image:
    with naming_image(position):
        return as_image(images[position])


def _are_pixels(images) -> bool:
    return isinstance(images, Tensor) and images.is_floating_point()
