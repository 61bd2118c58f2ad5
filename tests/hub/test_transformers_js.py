"""The card's code for Transformers.js gives an exported student's embedding, from its folder and without a network.

Needs Node and the package: ``npm install @huggingface/transformers`` in a folder that TRANSFORMERS_JS names.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from coss_hf.hub.snippets import renamed
from tests.helpers.exported import card, code_of_card, export, picture_of
from tests.hub.test_loaders import CASES, MORE, student

NAMES = ("cifar", "vit", "vit, mean", "resnet", "swin", "beit", "siglip", "dinov2")


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("node") and os.environ.get("TRANSFORMERS_JS")), reason="needs Node and TRANSFORMERS_JS"
)
@pytest.mark.parametrize("name", NAMES)
def test_the_cards_code_gives_the_embedding(tmp_path, name):
    made = student((CASES | MORE)[name], tmp_path)
    folder = tmp_path / "student"
    export(made, folder)
    picture = picture_of(made)
    picture.save(tmp_path / "photo.jpg", format="PNG")
    expected = made.encode([picture])
    given = expected.new_tensor([run(code_of_card("Transformers.js", made, folder), tmp_path)])
    cosine = (expected * given).sum() / expected.norm() / given.norm()
    print(name, cosine.item())
    assert given.shape == expected.shape and cosine >= 0.9999


def test_the_card_names_the_readers_that_were_tried(tmp_path):
    for name in ("vit", "cifar", "timm resnet"):
        made = student(CASES[name], tmp_path / name)
        export(made, tmp_path / name / "student", lambda _, path: path.write_text("graph"))
        shown = card(made, tmp_path / name / "student")
        assert ("### Optimum" in shown) == (name == "vit")
        assert ("### Transformers.js" in shown) == (name != "timm resnet")
        if name == "vit":
            there = renamed(shown, "me/it")
            assert 'const name = "me/it";' in there and 'const name = "student"' not in there
        refused = "* Transformers.js: it prepares images as `preprocessor_config.json` says, which students of timm do"
        assert (refused in shown) == (name == "timm resnet")


def run(code: str, folder: Path) -> list[float]:
    """Return the embedding that the card's code leaves, with the folder named and the network shut off."""
    imports, rest = code.replace("{ pipeline }", "{ env, pipeline }", 1).split("\n", 1)
    local = f"env.allowRemoteModels = false;\nenv.localModelPath = {json.dumps(f'{folder}/')};"
    program = folder / "program.mjs"
    program.write_text("\n".join([imports, local, rest, "console.log(JSON.stringify(Array.from(embedding.data)));"]))
    (folder / "node_modules").symlink_to(Path(os.environ["TRANSFORMERS_JS"]).resolve() / "node_modules")
    done = subprocess.run(["node", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
