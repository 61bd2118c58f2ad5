"""Code blocks and links of README.md and docs/, and how the tests run what the blocks say."""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.runs import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
# A block that cannot run here has `<!-- needs: the Hub -->` before it, or names what else it needs.
BLOCK = re.compile(r"^(?:<!-- needs: ([^>]+) -->\n)?```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Languages that nothing runs. `pycon`: examples of docstrings, which tests/losses/test_examples.py runs.
SHOWN = ("text", "bibtex", "pycon")

# What the pages name, and the tiny network, images or length that a test takes for it.
REPLACED = {
    "facebook/dinov2-base": "teacher",
    "timm/resnet18.a1_in1k": "cnn",
    "timm/vit_small_patch16_224.augreg_in21k": "vit",
    "openai/clip-vit-base-patch32": "clip",
    "ethz/food101": "photos",
    "path/to/images": "photos",
}
# Short and quiet, on the CPU.
SHORT = {
    "use_cpu": True,
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "augmentation": "none",
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
    "save_strategy": "no",
}


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        page: Path of the page from the root of the repository.
        line: Number of its first line.
        language: What follows the opening fence.
        text: The code.
        needs: What it needs to run; None where a test runs it.
    """

    page: str
    line: int
    language: str
    text: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def replaced(self) -> str:
        """The code with tiny networks and images."""
        text = self.text
        for name, tiny in REPLACED.items():
            text = text.replace(name, tiny)
        return text


def blocks(page: Path) -> list[Block]:
    """Code blocks of a page."""
    text = page.read_text()
    name = str(page.relative_to(ROOT))
    found = [Block(name, text.count("\n", 0, one.start()) + 1, one[2], one[3], one[1]) for one in BLOCK.finditer(text)]
    return [block for block in found if block.language not in SHOWN and not block.language.startswith("{")]


def commands(text: str) -> list[list[str]]:
    """Words of each command of a shell block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


# What each of several machines gives the launcher.
OF_EACH_MACHINE = ("--machine_rank", "--main_process_ip")


def recipe_words(words: list[str]) -> tuple[str, list[str]] | None:
    """The recipe that a command runs and its arguments; None for another program."""
    words = without_options(words, "--num_processes", "--accelerate_config", "--config_file", *OF_EACH_MACHINE)
    if words[0] == "coss-hf":
        return words[1], words[2:]
    if words[:2] == ["accelerate", "launch"]:
        words = words[1:]
    if words[0] in ("python", "launch") and Path(words[1]).parent.name == "recipes":
        return Path(words[1]).stem.replace("_", "-"), words[2:]
    return None


def without_options(words: list[str], *names: str) -> list[str]:
    """Words without these options and their values; another configuration of ``accelerate`` starts a process alone."""
    found = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in names:
            skip = True
        else:
            found.append(word)
    return found


def short_arguments(folder: Path):
    """``DistillationArguments`` of a run that is short; each writes a folder of its own."""
    from coss_hf.trainer.training_args import DistillationArguments

    def make(output_dir: str, **options) -> DistillationArguments:
        number = len(list(folder.glob("python-*")))
        output = folder / f"python-{number}"
        output.mkdir()
        return DistillationArguments(str(output), **(options | SHORT | {"overwrite_output_dir": True}))

    return make


def run_python(block: Block) -> None:
    """Execute a block in this process."""
    exec(compile(block.replaced, str(block), "exec"), {"__name__": "block"})


def run_recipe(command: str, argv: list[str], output: Path, monkeypatch) -> None:
    """Run a recipe in this process; training stops where ``--dry_run`` does."""
    from coss_hf.cli.pages import load_recipe

    if {"--help", "--help_all"} & {*argv}:
        return  # tests/cli/test_help.py
    if command == "distill":
        argv = without_options(argv, "--num_images", "--output_dir")
        argv += ["--dry_run", "--output_dir", str(output)]
        argv += [f"--{name}={value}" for name, value in SHORT.items()]
    if command == "export":
        argv = [*argv, "--num_images=8", "--calibration_images=4", "--timing_rounds=1"]
    if command == "neighbors":
        argv = [*argv, "--use_cpu"]
    monkeypatch.setattr(sys, "argv", [f"{command}.py", *argv])
    load_recipe(command).main()
