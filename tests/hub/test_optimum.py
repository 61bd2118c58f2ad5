"""The card's code for Optimum gives an exported student's embedding.

optimum-onnx 0.1.0 needs an earlier Transformers than this package: OPTIMUM names the Python of an environment that has
``optimum-onnx[onnxruntime]``, torch, torchvision and Pillow.
"""

import os
import re
import subprocess

import numpy as np
import pytest

from tests.helpers.exported import code_of_card, export, picture_of
from tests.hub.test_loaders import CASES, MORE, student

NAMES = ("vit", "vit, mean", "resnet", "swin", "beit", "siglip", "dinov2")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("OPTIMUM"), reason="needs OPTIMUM")
@pytest.mark.parametrize("name", NAMES)
def test_the_cards_code_gives_the_embedding(tmp_path, name):
    made = student((CASES | MORE)[name], tmp_path)
    export(made, tmp_path / "student")
    code = code_of_card("Optimum", made, tmp_path / "student")
    assert "import coss_hf" not in code
    picture = picture_of(made)
    picture.save(tmp_path / "photo.png")
    opened = re.sub(r"(?m)^image = .*", 'image = Image.open("photo.png").convert("RGB")', code)
    program = f'{opened}\nimport numpy\nnumpy.save("embedding.npy", embedding)'
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [os.environ["OPTIMUM"], "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    given = np.load(tmp_path / "embedding.npy")
    expected = made.encode([picture]).numpy()
    cosine = float((expected * given).sum() / np.linalg.norm(expected) / np.linalg.norm(given))
    print(name, cosine)
    assert given.shape == expected.shape and cosine >= 0.9999
