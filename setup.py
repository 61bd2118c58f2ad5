import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "coss_hf" / "__init__.py").read_text())[1]
TIMM = "timm>=1.0.16"  # the first that loads a folder
SENTENCES = "sentence-transformers>=6.2"
EXPORT = ["onnx", "onnxruntime", "onnxscript"]
DOCS = ["furo", "myst-parser", "sphinx"]
PLOTS = ["matplotlib"]

setup(
    name="coss-hf",
    version=VERSION,
    description="Unsupervised knowledge distillation of vision backbones in the Hugging Face ecosystem",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    project_urls={"Paper": "https://arxiv.org/abs/2409.13939"},
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="knowledge distillation, unsupervised, vision, backbone, transformers, embeddings",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # The scripts and configurations of a clone are part of the package: one source, two places.
    packages=[*find_packages(include=["coss_hf", "coss_hf.*"]), "coss_hf.recipes", "coss_hf.accelerate_configs"],
    package_dir={"coss_hf.recipes": "recipes", "coss_hf.accelerate_configs": "accelerate_configs"},
    package_data={
        "coss_hf": ["py.typed"],
        "coss_hf.cli": ["help_texts/*.txt"],
        "coss_hf.recipes": ["configs/*.yaml"],
        "coss_hf.accelerate_configs": ["*.yaml"],
    },
    entry_points={"console_scripts": ["coss-hf = coss_hf.cli.main:main"]},
    install_requires=[
        "torch>=2.8",
        "torchvision",
        "transformers>=5.10.2",
        "accelerate>=1.1",
        "datasets>=4.0",
        "evaluate>=0.4",
        "faiss-cpu",
        "filelock",
        "huggingface_hub",
        "pillow",
        "pyyaml",
        "psutil",
        "safetensors",
        "tqdm",
        "wandb>=0.30",  # login without a prompt
    ],
    extras_require={
        "timm": [TIMM],
        "sentence-transformers": [SENTENCES],
        "plots": PLOTS,
        "tensorboard": ["tensorboard"],
        "trackio": ["trackio"],
        "quickstart": [*PLOTS, "scikit-learn"],
        "export": EXPORT,
        "openvino": [*EXPORT, "openvino"],
        "executorch": ["executorch"],
        "docs": DOCS,
        "dev": [
            *EXPORT,
            *DOCS,
            *PLOTS,
            "psutil",
            "pytest",
            "pytest-xdist>=3.7",
            "ruff",
            "scikit-learn",
            SENTENCES,
            "tensorboard",
            TIMM,
            "trackio",
        ],
    },
)
