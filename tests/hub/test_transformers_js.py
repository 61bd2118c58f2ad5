"""Transformers.js reads an exported student from its folder, without a network, and gives the embedding.

Needs Node and the package: ``npm install @huggingface/transformers`` in a folder that TRANSFORMERS_JS names.
"""

import json
import os
import shutil
import subprocess

import pytest
from PIL import Image

from coss_hf.hub.export import write_graph
from coss_hf.models.image_processor import noise_image
from tests.hub.test_loaders import CASES, MORE, Case, student

NAMES = ("cifar", "vit", "vit, mean", "resnet", "swin", "beit", "siglip", "dinov2")
PROGRAM = """
const { createRequire } = require("module");
const folder = require("path").resolve(process.env.TRANSFORMERS_JS) + "/";
const { pipeline, env } = createRequire(folder)("@huggingface/transformers");
env.allowRemoteModels = false;
env.localModelPath = process.argv[1] + "/";
(async () => {
  const found = {};
  for (const name of process.argv.slice(2)) {
    const extractor = await pipeline("image-feature-extraction", name, { dtype: "fp32", device: "cpu" });
    const embedding = await extractor(`${process.argv[1]}/${name}/picture.png`);
    found[name] = { dims: embedding.dims, data: Array.from(embedding.data) };
  }
  console.log("FOUND" + JSON.stringify(found));
})();
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("node") and os.environ.get("TRANSFORMERS_JS")), reason="needs Node and TRANSFORMERS_JS"
)
def test_transformers_js_gives_the_embedding(tmp_path):
    """Pictures of the student's own size: a resized one differs a little, since it resizes in another way."""
    cases: dict[str, Case] = CASES | MORE
    expected = {}
    for name in NAMES:
        made = student(cases[name], tmp_path / name)
        folder = tmp_path / "saved" / name.replace(", ", "-")
        made.save_pretrained(folder)
        (folder / "onnx").mkdir()
        write_graph(made, folder / "onnx" / "model.onnx")
        picture = noise_image(10, 8).resize(made.backbone.size[::-1], Image.Resampling.BICUBIC)
        picture.save(folder / "picture.png")
        expected[folder.name] = made.encode([picture])
    done = subprocess.run(
        ["node", "-e", PROGRAM, str(tmp_path / "saved"), *expected], capture_output=True, text=True, check=False
    )
    assert "FOUND" in done.stdout, done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND")[1])
    for name, embedding in expected.items():
        assert found[name]["dims"] == list(embedding.shape), name
        given = embedding.new_tensor([found[name]["data"]])
        cosine = (embedding * given).sum() / embedding.norm() / given.norm()
        print(name, cosine.item())
        assert cosine >= 0.9999, name
