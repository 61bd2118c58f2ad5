"""Measure a teacher, a student, and the same student at random weights, on images that neither was trained on.

    python recipes/evaluate.py --teacher google/vit-base-patch16-224 --student my-student --dataset path/to/images \
        --output results.json

Test features come from the test split (without one, from images held out of train), train features from the train
split without augmentation. Unless --validation_size is given, the images that the student's own run held out of this
dataset are held out again; sizes, poolings and the seed of the random row are those of that run, too, unless they are
given. Without labels only the agreement with the teacher is measured. A head that recipes/distill.py left in the
student's folder maps its embeddings to the teacher's space, for the cosine. recipes/distill.py does the same at its
end.
"""

from coss_hf.cli.help import show_help

show_help(__name__, "evaluate")

from dataclasses import dataclass, field, replace

from coss_hf.utils.ending import ENDING

if __name__ == "__main__":
    ENDING.install()  # before the imports that take seconds

from accelerate import PartialState

from coss_hf.cli import bad_input_exits, log_to_console, parse
from coss_hf.data.loading import ImageSplits
from coss_hf.data.run_images import RunImages
from coss_hf.evaluation.diagnostics import overlap_on
from coss_hf.evaluation.evaluator import Evaluator, compare
from coss_hf.evaluation.tables import table
from coss_hf.models.heads import load_head
from coss_hf.reporting.run_record import command, versions, write_json
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.utils.messages import check_present, get_logger
from coss_hf.utils.paths import check_output_file

logger = get_logger(__name__)


@dataclass
class EvaluationArguments:
    """Where the result goes, and how it is computed."""

    output: str | None = field(default=None, metadata={"help": "JSON file to which the results are written. Required."})
    seed: int | None = field(
        default=None, metadata={"help": "Seed of the random weights; default: that of the student's run, else 0."}
    )
    batch_size: int = field(default=256, metadata={"help": "Number of images per forward pass."})
    num_workers: int = field(default=0, metadata={"help": "Number of processes that decode images."})
    linear: bool = field(
        default=False,
        metadata={"help": "With labels also measure the paper's linear evaluation, which takes minutes."},
    )


def evaluate(models: ModelArguments, data: DataArguments, args: EvaluationArguments) -> tuple[dict[str, dict], int]:
    """Return name, parameters and metrics of ``teacher``, ``student`` and ``random``, and the number of images.

    Raises:
        ValueError: any input that cannot be used.
    """
    check_present(teacher=models.teacher, student=models.student, dataset=data.dataset, output=args.output)
    check_output_file(args.output, "--output")
    data = data.follow(models.student, models.student_revision)
    splits = data.load()
    test_images = splits.test or splits.validation
    if test_images is None:
        raise ValueError(
            f"--dataset {data.dataset} has no test split: give images that the student was not trained on, with "
            f"--test_split or another --dataset; or hold some of train out with --validation_size: as many as the "
            f"student's run held out, or any number where it was not trained on these images."
        )
    if splits.test is None and data.holds_out_by_default:
        _warn_of_changed_images(models.student, splits)
    teacher = models.load_teacher()
    student = models.load_student(teacher).freeze()
    head = load_head(models.student, models.student_revision)
    if head is not None and next(head.parameters()).shape[1] != student.dim:
        raise ValueError(
            f"--student_pooling={student.pooling}: embeddings of {student.dim} dimensions do not fit the head of "
            f"--student={models.student}; use the pooling that it was trained with."
        )
    for network in (teacher, student):
        network.model.to(PartialState().device)
    evaluator = Evaluator(
        teacher,
        test_images,
        splits.image_column,
        label_column=splits.label_column,
        train_images=splits.train,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        linear=args.linear,
        retrieval=True,
        on_bad_image=splits.on_bad_image,
    )
    return compare(evaluator, student, head, seed=args.seed or 0), len(test_images)


def _warn_of_changed_images(student: str, splits: ImageSplits) -> None:
    """Warn where what is held out of train is another part than in the run that left ``student``."""
    try:
        recorded = RunImages.load(student)  # None of a student on the Hub, where it is not kept
    except ValueError:  # damaged, which only a resume need refuse
        recorded = None
    if recorded is not None and not recorded.same_places(splits.run_images):
        logger.warning(
            "The images have changed since the run that left %s (other paths or another number): what is held out of "
            "train now is another part, perhaps trained on. Evaluate with the images of that run, or on a test split: "
            "--test_split.",
            student,
        )


def as_in_its_run(models: ModelArguments, args: EvaluationArguments) -> tuple[ModelArguments, EvaluationArguments]:
    """Return both with what the student's run used where nothing else is given, so that both tables agree."""
    if not models.student:
        return models, args
    models, run = models.follow()
    return models, replace(args, seed=run.get("seed", 0) if args.seed is None else args.seed)


ARGUMENTS = (ModelArguments, DataArguments, EvaluationArguments)


def main() -> None:
    log_to_console()
    with bad_input_exits():
        models, data, args = parse(ARGUMENTS)
        models, args = as_in_its_run(models, args)
        results, images = evaluate(models, data, args)
    facts = {"images": images, "command": command(), "seed": args.seed, "versions": versions()}
    print(table(results))
    print(overlap_on(images))
    write_json(args.output, {**results, **facts})
    print(f"Written to {args.output}.")


if __name__ == "__main__":
    main()
