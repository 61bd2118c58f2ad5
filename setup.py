from setuptools import find_packages, setup

EXPORT = ["onnx", "onnxruntime", "onnxscript"]

setup(
    name="coss-hf",
    version="0.1.0",
    description="Unsupervised knowledge distillation of vision backbones in the Hugging Face ecosystem",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["coss_hf", "coss_hf.*"]),
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
        "matplotlib",
        "pillow",
        "pyyaml",
        "safetensors",
        "tqdm",
        "wandb>=0.30",  # login without a prompt
    ],
    extras_require={
        "timm": ["timm"],
        "tensorboard": ["tensorboard"],
        "quickstart": ["scikit-learn"],
        "export": EXPORT,
        "dev": [*EXPORT, "psutil", "pytest", "pytest-xdist>=3.7", "ruff", "scikit-learn", "tensorboard", "timm"],
    },
)
