"""Every code block of README.md and docs/ runs, or names what it needs; then its options and imports are checked."""

import ast
import importlib
import re
import shutil

import pytest
import yaml

import coss_hf
import tests.helpers.documents as d
import tests.helpers.runs as h
from coss_hf.cli.main import COMMANDS
from coss_hf.cli.pages import load_recipe
from coss_hf.losses.base import REGISTERED
from tests.helpers.loss_registry import losses_of_a_test
from tests.helpers.networks import save_with_tokenizer

BLOCKS = [block for page in d.PAGES for block in d.blocks(page)]
RUN = [block for block in BLOCKS if block.language in ("python", "bash") and not block.needs]
NOT_RUN = [block for block in BLOCKS if block.needs]
YAML = [block for block in BLOCKS if block.language == "yaml"]


@pytest.fixture(scope="module")
def world(saved, tmp_path_factory):
    """A folder with what the pages name: images, a teacher, students, and a student that was trained."""
    folder = tmp_path_factory.mktemp("docs")
    for name, source in {"teacher": "teacher", "cnn": "small", "vit": "vit"}.items():
        shutil.copytree(saved / source, folder / name)
    for split, count, seed in (("train", 200, 0), ("test", 24, 1)):
        images, labels = h.colour_images(count, seed)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = folder / "photos" / split / ("red", "green", "blue", "grey")[label]
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{number}.png")
    for name in ("photo.jpg", "photo2.jpg"):
        images[0].save(folder / name)
    (folder / "my-run.yaml").write_text(next(block for block in YAML).replaced)
    arguments = coss_hf.DistillationArguments(str(folder / "my-student"), **d.SHORT, head_hidden_size=8)
    networks = (str(folder / "teacher"), str(folder / "cnn"))
    trainer = coss_hf.DistillationTrainer(*networks, arguments, str(folder / "photos"))
    trainer.train()
    trainer.save_model()
    save_with_tokenizer(folder / "clip")
    clip = coss_hf.load_backbone(str(folder / "clip"), argument="teacher", space="projected")
    arguments = coss_hf.DistillationArguments(str(folder / "clip-student"), **d.SHORT, head_hidden_size=8)
    trainer = coss_hf.DistillationTrainer(clip, networks[1], arguments, str(folder / "photos"))
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def in_world(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(coss_hf, "DistillationArguments", d.short_arguments(world), raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(world / "cache"))
    with losses_of_a_test():
        yield world


def test_every_block_has_a_language():
    languages = {block.language for block in BLOCKS}
    assert languages == {"python", "bash", "yaml"}, "say `text` for what is only shown"


def test_commands_for_several_machines_say_which_one_each_is():
    """As documented, all waited for a first process at 127.0.0.1."""
    words = [words for block in BLOCKS if block.language == "bash" for words in d.commands(block.text)]
    found = [one for one in words if "accelerate_configs/multi_node.yaml" in one]
    assert found and all(set(d.OF_EACH_MACHINE) <= set(one) for one in found)


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in RUN))
def test_blocks_of_a_page_run(page, in_world, tmp_path, monkeypatch, capsys):
    if "export" in page:
        pytest.importorskip("onnxscript", reason="the export needs onnxscript")
    for number, block in enumerate(block for block in RUN if block.page == page):
        try:
            if block.language == "python":
                d.run_python(block)
            else:
                run_commands(block, tmp_path / f"out{number}", monkeypatch)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{block}: {error!r}\n{capsys.readouterr().err[-2000:]}")


def run_commands(block: d.Block, output, monkeypatch) -> None:
    for words in d.commands(block.replaced):
        recipe = d.recipe_words(words)
        if recipe is None:
            check_program(words)
        elif recipe[0] == "env":
            coss_hf.cli.main.main(["env"])
        else:
            d.run_recipe(*recipe, output, monkeypatch)


@pytest.mark.parametrize("block", [block for block in NOT_RUN if block.language == "python"], ids=str)
def test_python_that_is_not_run_imports_names_that_exist(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("coss_hf", "transformers"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names)


@pytest.mark.parametrize("block", [block for block in NOT_RUN if block.language == "bash"], ids=str)
def test_commands_that_are_not_run_have_options_that_exist(block):
    for words in d.commands(block.text):
        recipe = d.recipe_words(words)
        if recipe is None:
            check_program(words)
        else:
            check_options(*recipe)


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_has_keys_that_exist(block):
    check_options("distill", [f"--{key}" for key in yaml.safe_load(block.text)])


def check_options(command: str, argv: list[str]) -> None:
    assert command in COMMANDS
    recipe = load_recipe(command)
    if hasattr(recipe, "ARGUMENTS"):
        known = {name for kind in recipe.ARGUMENTS for name in kind.__dataclass_fields__} | {"config"}
    else:
        known = {action.dest for action in recipe.build_parser()._actions}
    given = {word[2:].split("=")[0] for word in argv if word.startswith("--")}
    assert given <= known, given - known


def check_program(words: list[str]) -> None:
    """Other programs: their targets, extras and options exist."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (h.ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[:2] == ["pip", "install"]:
        extras = re.search(r"\[(.+)\]", words[-1])
        setup = (h.ROOT / "setup.py").read_text()
        assert all(f'"{extra}":' in setup for extra in (extras[1].split(",") if extras else ()))
    elif words[0] == "python":
        script = (h.ROOT / words[1]).read_text()
        given = [word for word in words[2:] if word.startswith("--")]
        others = [word for word in given if f'"{word}"' not in script]
        if "parse_known_args" in script:  # the others are those of a training
            check_options("distill", others)
        else:
            assert not others
    else:
        assert words[0] in ("cd", "export", "for", "done") or words[:2] in (["git", "clone"], ["hf", "auth"]), words


def test_the_method_of_the_guide_is_registered_when_its_block_runs(in_world):
    (block,) = [block for block in RUN if "(DistillationLoss)" in block.text]
    d.run_python(block)
    assert "mse" in REGISTERED
