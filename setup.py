"""What is installed: `visattn` and, from `kernels/`, `visattn.kernels`. The top-level name `kernels` is not ours and stays free."""

from pathlib import Path

from setuptools import setup

TRAIN = ["torchvision", "scikit-learn", "matplotlib", "rich", "safetensors"]
DEV = ["pytest", "pytest-benchmark", "pytest-xdist", "pytest-timeout", "hypothesis", "ruff", "mypy"]
TEST_MODELS = ["timm", "diffusers"]

setup(
    name="visattn",
    version="0.1.0",
    description="Self-attention for feature maps on fused Triton kernels: a drop-in layer",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["visattn", "visattn.kernels", "visattn.models", "visattn.patching"],
    package_dir={"visattn": "visattn", "visattn.kernels": "kernels"},
    package_data={"visattn": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={"train": TRAIN, "dev": DEV, "test-models": TEST_MODELS},
    entry_points={"console_scripts": ["visattn = visattn.cli:main"]},
)
