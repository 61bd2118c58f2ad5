"""Arguments of a run about its networks and images, with their defaults, and what they load."""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from datasets import IterableDataset, IterableDatasetDict

from coss_hf.data.checking import SAMPLE
from coss_hf.data.loading import ImageSplits, load_images
from coss_hf.data.run_images import RunImages
from coss_hf.data.streams import load_stream
from coss_hf.models.backbone import Backbone
from coss_hf.models.files import find_file
from coss_hf.models.loading import DTYPES, INITS, load_backbone
from coss_hf.models.towers import SPACES
from coss_hf.neighbors.options import SearchOptions
from coss_hf.reporting.run_record import read_json
from coss_hf.utils.messages import first_line, get_logger
from coss_hf.utils.paths import same_place

logger = get_logger(__name__)


@dataclass
class ModelArguments:
    """Teacher and student."""

    teacher: str | None = field(default=None, metadata={"help": "Hub name or folder of the frozen network."})
    student: str | None = field(
        default=None,
        metadata={
            "help": "Hub name or folder of the small network; with --student_init random also a CIFAR network "
            "(resnet20, vgg8, wrn_16_2, ...) or a model type of Transformers (vit, resnet, timm_wrapper, ...)."
        },
    )
    teacher_pooling: str = field(
        default="auto",
        metadata={
            "help": "How the teacher's features become one embedding: cls, mean, pooler, gap, or auto (by its "
            "architecture)."
        },
    )
    teacher_space: str = field(
        default="tower",
        metadata={
            "help": "What a teacher of images and text, such as CLIP or SigLIP, embeds images in: the space of its "
            "vision tower, or the one that it projects images and texts into (projected), so that its text tower "
            "searches images that the student has embedded.",
            "choices": list(SPACES),
        },
    )
    student_pooling: str = field(
        default="auto",
        metadata={
            "help": "How the student's features become one embedding: cls, mean, pooler, gap, or auto (by its "
            "architecture)."
        },
    )
    teacher_size: int | None = field(
        default=None, metadata={"help": "Side of the teacher's input in pixels. Default: that of its image processor."}
    )
    student_size: int | None = field(
        default=None, metadata={"help": "Side of the student's input in pixels. Default: that of its image processor."}
    )
    interpolate_pos_encoding: bool = field(
        default=False, metadata={"help": "Stretch position embeddings of transformers whose input size was changed."}
    )
    teacher_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher on the Hub."}
    )
    student_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the student on the Hub."}
    )
    teacher_dtype: str = field(
        default="float32", metadata={"help": "Data type of the teacher's weights.", "choices": list(DTYPES)}
    )
    student_dtype: str = field(
        default="float32", metadata={"help": "Data type of the student's weights.", "choices": list(DTYPES)}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let checkpoints of teacher and student run code of their own."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Implementation of attention in both networks: eager, sdpa or flash_attention_2."},
    )
    student_init: str = field(
        default="pretrained",
        metadata={
            "help": "Initial weights of the student: those of its checkpoint, random ones, or every n-th "
            "layer of a transformer teacher.",
            "choices": list(INITS),
        },
    )
    student_config_overrides: list[str] = field(
        default_factory=list, metadata={"help": "Entries of the student's configuration to change, as key=value."}
    )

    def overrides(self) -> dict:
        """``student_config_overrides`` as a dictionary, values read as YAML."""
        pairs = [entry.partition("=") for entry in self.student_config_overrides]
        for key, equals, _ in pairs:
            if not equals:
                raise ValueError(f"--student_config_overrides={key!r} must be of the form key=value.")
        return {key.strip(): self._override(key, value) for key, _, value in pairs}

    @staticmethod
    def _override(key: str, value: str):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(
                f"--student_config_overrides {key}={value}: the value cannot be read ({first_line(error)}); write a "
                f"number, a word, or a list such as [1, 2]."
            ) from error

    def follow(self) -> tuple["ModelArguments", dict]:
        """Return a copy that loads both networks as the run that left the student did, and that run's arguments.

        What was given stands, and of the teacher nothing is taken over where it is another one.
        """
        record = find_file(self.student, "run.json", self.student_revision)
        run = read_json(record).get("arguments", {}) if record else {}
        names = ["student_size", "student_pooling", "student_dtype", "interpolate_pos_encoding"]
        if same_place(run.get("teacher"), self.teacher):
            names += ["teacher_size", "teacher_pooling", "teacher_space", "teacher_dtype", "teacher_revision"]
        defaults = ModelArguments()
        changes = {}
        for name in names:
            default = getattr(defaults, name)
            if getattr(self, name) == default != run.get(name, default):
                changes[name] = run[name]
        if changes:
            summary = ", ".join(f"--{name} {value}" for name, value in changes.items())
            logger.info("As in the run that left %s: %s.", self.student, summary)
        return replace(self, **changes), run

    def load_teacher(self) -> Backbone:
        """The frozen network."""
        return self._load("teacher", space=self.teacher_space).freeze()

    def load_student(self, teacher: Backbone) -> Backbone:
        """The network to train; random weights are drawn from torch's global generator."""
        options = {"init": self.student_init, "config_overrides": self.overrides(), "teacher": teacher}
        student = self._load("student", **options)
        if self.interpolate_pos_encoding and not (teacher.can_interpolate or student.can_interpolate):
            raise ValueError(
                f"--interpolate_pos_encoding: neither {teacher.name} nor {student.name} has position embeddings that "
                f"it can stretch; leave it out."
            )
        return student

    def _load(self, role: str, **options) -> Backbone:
        name = getattr(self, role)
        if not name and options.get("init") != "teacher_layers":
            raise ValueError(f"--{role} is missing; see --help.")
        shared = ("trust_remote_code", "attn_implementation", "interpolate_pos_encoding")
        options |= {key: getattr(self, key) for key in shared}
        options |= {key: getattr(self, f"{role}_{key}") for key in ("pooling", "size", "revision", "dtype")}
        return load_backbone(name, argument=role, **options)


@dataclass
class DataArguments(SearchOptions):
    """Images, which need no labels, and the search for neighbours among them."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "Images to read: a Hub name, a folder of images, parquet files or a save_to_disk folder."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Name of the configuration of a Hub dataset that has several."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the dataset on the Hub."}
    )
    train_split: str | None = field(
        default=None,
        metadata={"help": "Name of the split that holds the training images. Default: train, or the only split."},
    )
    test_split: str | None = field(
        default=None,
        metadata={
            "help": "Split of test images, which are read once, at the end. Default: test, else validation, "
            "where there is one."
        },
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Name of the column of the images. Default: the one that holds images."}
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Name of the column of the labels, which only evaluation reads. Default: the one that holds "
            "labels, if any."
        },
    )
    validation_size: float | None = field(
        default=None,
        metadata={
            "help": "Number of images held out of train before anything else, or their share, below 1. Default of "
            "distill, neighbors, compare and report, where the dataset brings no images to measure on: 2,000, a tenth "
            "of train at most (distill and neighbors: none below 200 images). Default of evaluate and export: "
            "those that the student's own run held out, else none. Default of other commands: none."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Largest number of images of the training split that are used. Default: all."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training images as a stream, from the Hub, or from tar (WebDataset) or parquet files, "
            "instead of downloading and counting them first. Needs --max_steps or --num_images, and --neighbors_k 0."
        },
    )
    shuffle_buffer_size: int = field(
        default=1_000,
        metadata={
            "help": "Number of images of a stream that are shuffled at a time, in each process and loader worker. 0: "
            "the order of the stream."
        },
    )
    on_bad_image: str = field(
        default="error",
        metadata={
            "help": "What to do with images that cannot be decoded. error: the command ends and names them. skip: "
            "those that are found at the start are left out, and during a training another image takes the place of "
            "one that cannot be decoded or was deleted. At the start distill reads a sample (with --neighbors_k or "
            "--teacher_cache all images), train-teacher a sample, and other commands all images.",
            "choices": ["error", "skip"],
        },
    )
    preprocessing_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Number of processes that read and check every image before the training, where neighbours are "
            "searched. Default: one per processor, 8 at most."
        },
    )
    neighbors_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which embeddings and neighbours are kept. Default: a folder in the cache of datasets."
        },
    )

    # Whether images are held out where `validation_size` is not given, as a training does.
    holds_out_by_default = False
    loaded = None  # `id` of what `load` returned last; arguments are sent to the processes of a study without images
    maybe_trained_on = ""  # why images that are held out of train now are perhaps no test of a student

    def follow(self, student: str, revision: str | None = None) -> "DataArguments":
        """Return a copy that holds out of train what the run that left ``student`` held out of this dataset.

        So that it is not measured on what it was trained on; a ``validation_size`` that was given stands. Another
        ``dataset_revision`` than the run's is another dataset; without one it is the run's.

        Args:
            student: folder, or name on the Hub.
            revision: branch, tag or commit on the Hub.

        Raises:
            ValueError: the run's record is there and cannot be read.
        """
        record = find_file(student, "run.json", revision)
        run = read_json(record) if record else {}
        given = run.get("arguments", {})
        followed = copy.copy(self)
        other = any(given.get(key) != getattr(self, key) for key in ("dataset_name", "train_split"))
        other |= self.dataset_revision not in (None, given.get("dataset_revision"))
        if other or not same_place(given.get("dataset"), self.dataset):
            return followed
        for key in ("dataset_revision", "test_split", "image_column", "label_column", "max_train_samples"):
            if getattr(self, key) is None and given.get(key) is not None:
                setattr(followed, key, given[key])
                logger.info("As in the run that left %s: --%s %s.", student, key, given[key])
        if given.get("streaming"):
            logger.warning("%s was trained on a stream, perhaps on some of the images measured on now.", student)
            return followed
        followed.holds_out_by_default = True
        if self.validation_size is None:
            followed.validation_size = given.get("validation_size")
        elif self.validation_size and "evaluated_on" in run and not run["evaluated_on"]:
            followed.maybe_trained_on = (
                f"--validation_size {self.validation_size:g}: {student} was trained on all images of "
                f"{self.dataset}, those that are held out now among them: they do not show what it does on other "
                f"images. Give images of a test split."
            )
        elif self.validation_size and self.validation_size != given.get("validation_size"):
            followed.maybe_trained_on = (
                f"--validation_size {self.validation_size:g}: {student} was trained with "
                f"{given.get('validation_size') or 'the default'}, perhaps on some of what is held out now."
            )
        return followed

    def load(
        self,
        images=None,
        *,
        hold_out_by_default: bool = False,
        recorded: RunImages | None = None,
        streams: bool = False,
        evaluated: bool = False,
        by_content: bool = True,
        sample: int = SAMPLE,
    ) -> ImageSplits:
        """Load and check the images.

        Args:
            images: a ``Dataset``, ``DatasetDict`` or name to load instead of ``dataset``.
            hold_out_by_default: hold some out of train where ``validation_size`` is not given, as a training does.
            recorded: the images of the run that is to be resumed.
            streams: whether the images may be a stream.
            evaluated: of a stream: whether images are held out elsewhere.
            by_content: see ``load_images``.
            sample: see ``load_images``.

        Raises:
            ValueError: see ``load_images``.
        """
        if images is None:
            images = self.dataset
        if images is None:
            raise ValueError("--dataset is missing; see --help.")
        if self.streaming or isinstance(images, (IterableDataset, IterableDatasetDict)):
            if not streams:
                raise ValueError("--streaming: only a distillation reads a stream; leave it out.")
            return self._load_stream(images, evaluated)
        validation_size = self.validation_size
        if validation_size is None and not (hold_out_by_default or self.holds_out_by_default):
            validation_size = 0
        splits = load_images(
            images,
            name=self.dataset_name,
            revision=self.dataset_revision,
            train_split=self.train_split,
            test_split=self.test_split,
            image_column=self.image_column,
            label_column=self.label_column,
            validation_size=validation_size,
            max_train_samples=self.max_train_samples,
            on_bad_image=self.on_bad_image,
            num_proc=self.preprocessing_num_workers,
            recorded=recorded,
            by_content=by_content,
            sample=sample,
        )
        if self.maybe_trained_on and splits.test is None:
            logger.warning("%s", self.maybe_trained_on)
        self.loaded = id(splits)
        return splits

    def _load_stream(self, images, evaluated: bool) -> ImageSplits:
        if not isinstance(images, (str, Path, IterableDataset, IterableDatasetDict)):
            raise ValueError(f"--streaming: a {type(images).__name__} is in memory already; leave it out.")
        if self.shuffle_buffer_size < 0:
            raise ValueError(f"--shuffle_buffer_size {self.shuffle_buffer_size}: give 0 or more.")
        parts = load_stream(
            images,
            name=self.dataset_name,
            revision=self.dataset_revision,
            train_split=self.train_split,
            test_split=self.test_split,
            image_column=self.image_column,
            label_column=self.label_column,
            validation_size=self.validation_size,
            max_train_samples=self.max_train_samples,
            on_bad_image=self.on_bad_image,
            evaluated=evaluated,
        )
        return ImageSplits(
            parts.first,
            parts.validation,
            None,
            parts.image_column,
            parts.label_column,
            parts.bad_images,
            self.on_bad_image,
            stream=parts.stream,
        )
