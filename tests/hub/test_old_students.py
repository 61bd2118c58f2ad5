"""Students that were saved before the package was laid out in packages: published folders must keep loading.

`old_students/NAME/` is a folder as `recipes/distill.py` of commit ca5c395 left it, less
pictures, card and trainer state;
`old_students/NAME.safetensors` has two images, uint8 (2, h, w, 3), before and after the processor's resize, and their
embeddings by the code of that commit. The tests of embeddings start from the resized ones: versions of torchvision
differ by one grey level in their resize, which is tested by itself.
"""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import coss_hf
from coss_hf.models.loading import load_backbone
from tests.helpers.processes import run as run_program

OLD_STUDENTS = Path(__file__).parent / "old_students"


@pytest.fixture(params=["cifar-resnet", "vit"])
def old_student(request):
    """The folder, its two images, and a dictionary of expected embeddings."""
    expected = load_file(OLD_STUDENTS / f"{request.param}.safetensors")
    del expected["images_before_resize"]
    images = [Image.fromarray(pixels.numpy()) for pixels in expected.pop("images")]
    return str(OLD_STUDENTS / request.param), images, expected


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_embed_loads_students_of_earlier_versions(old_student):
    folder, images, expected = old_student
    assert_same(coss_hf.embed(folder, images), expected["embeddings"])


@pytest.mark.parametrize("name", ["cifar-resnet", "vit"])
def test_resize_of_earlier_versions(name):
    """Up to one grey level, the difference between versions of torchvision on some CPUs."""
    kept = load_file(OLD_STUDENTS / f"{name}.safetensors")
    backbone = load_backbone(str(OLD_STUDENTS / name))
    resized = backbone.preprocess([Image.fromarray(pixels.numpy()) for pixels in kept["images_before_resize"]])
    expected = backbone.preprocess([Image.fromarray(pixels.numpy()) for pixels in kept["images"]])
    levels = (resized - expected).abs() * 255 * backbone.processor.image_std[0]
    assert levels.max() < 1.001


def test_load_backbone_loads_students_of_earlier_versions(old_student):
    folder, images, expected = old_student
    backbone = load_backbone(folder).freeze()
    assert_same(backbone.features(backbone.preprocess(images)).embedding, expected["embeddings"])


def test_student_with_its_head(old_student):
    folder, images, expected = old_student
    student = coss_hf.Student.from_pretrained(folder)
    assert (student.head is not None) == ("cifar" in folder)
    assert_same(student.embed(images), expected["student_embeddings"])


LOAD_WITH_TRANSFORMERS = """
import sys
sys.modules["coss_hf"] = None
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel
folder = sys.argv[1]
expected = load_file(f"{folder}.safetensors")
images = [Image.fromarray(pixels.numpy()) for pixels in expected["images"]]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    output = model(**AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt"))
is_cifar = model.config.embedding_pooling == "pooler"
embeddings = output.pooler_output.flatten(1) if is_cifar else output.last_hidden_state[:, 0]
torch.testing.assert_close(embeddings, expected["embeddings"], rtol=0, atol=1e-6)
assert is_cifar == type(model).__module__.startswith("transformers_modules")
assert not [name for name in sys.modules if name.startswith("coss_hf.")]
"""


def test_transformers_loads_students_of_earlier_versions(old_student, tmp_path):
    folder, _, _ = old_student
    done = run_program(["-c", LOAD_WITH_TRANSFORMERS, folder], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
