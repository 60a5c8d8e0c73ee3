"""Metadata and extras of mmrecoder_jax; build system and tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """`__version__` of the package, read as text: a build environment has none of our libraries."""
    source = (ROOT / "mmrecoder_jax" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+?)"', source, re.M)
    assert found, "mmrecoder_jax/__init__.py has no line __version__ = ..."
    return found.group(1)


setup(
    name="mmrecoder_jax",
    version=version(),
    description=(
        "MM-ReCoder in JAX: chart images to code with reinforcement learning and self-correction"
    ),
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # configs/ is at the root of a checkout and inside the installed package.
    packages=[
        *find_packages(include=["mmrecoder_jax", "mmrecoder_jax.*"]),
        "mmrecoder_jax.configs",
    ],
    package_dir={"mmrecoder_jax.configs": "configs"},
    package_data={
        "mmrecoder_jax": ["py.typed", "boxed/*"],
        "mmrecoder_jax.env": ["official_requirements.txt"],
        "mmrecoder_jax.reporting": ["page.css", "page.js"],
    },
    install_requires=[
        "absl-py>=2.1",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "huggingface_hub>=1.3",
        "jax>=0.10.1,<0.13",
        "jaxtyping>=0.3.7",
        "matplotlib>=3.8.4",  # of scripts; published numbers need one of `env.setup`'s environments
        "ml_collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.36",
        "pillow>=10.3",
        "pyyaml>=6.0.1",
        "scipy>=1.14",
        "sentencepiece>=0.2.3",  # earlier ones abort the process where a tokenizer is trained
        "transformers>=5.0",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.1,<0.13"],
        "cuda": ["jax[cuda12]>=0.10.1,<0.13"],
        "charts": [
            "pandas>=2.2.2",
            "seaborn>=0.13.2",
            "networkx>=3.2",
            "squarify>=0.4.3",
            "matplotlib-venn>=0.11.10",
        ],
        "gcs": ["gcsfs>=2025.2", "google-cloud-storage>=2.18"],  # addresses in buckets (`places`)
        "ui": ["gradio>=6.0"],  # the page of `mmrecoder_jax.demo`
        "test": [
            "gcsfs>=2025.2",  # reads the stand-in for a bucket (`tests/buckets.py`)
            "google-cloud-storage>=2.18",
            "beartype>=0.22.1",  # executes the shape annotations while tests run
            "jinja2>=3.1",  # renders the published chat template
            "mypy>=1.19",
            "pytest>=8",
            "pytest-cov>=6",
            "pytest-xdist>=3.6.1",
            "ruff>=0.8",
            "setuptools>=77",  # builds the wheel that a test looks into
        ],
        "browser": ["playwright>=1.49"],  # visits the demo in tests; Chromium is the system's
        "dev": ["pre-commit>=4"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6"],
        "parity": ["torch>=2.6", "safetensors>=0.5"],
    },
)
