"""Packaging: three top-level folders become the one import package `lora_fast`.

Nothing is installed as a top-level `kernels` or `profiler`: the first is the name of Hugging Face's package, for which
Transformers probes. Building needs no torch, so the version is read from lora_fast/__init__.py and not imported.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    source = (ROOT / "lora_fast" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if not found:
        raise SystemExit('lora_fast/__init__.py must hold a line of the form __version__ = "1.2.3"')
    return found.group(1)


setup(
    name="lora-fast",
    version=version(),
    description="LoRA layers as fast as the hardware allows, exact spectra of LoRA updates, and which rank to choose",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="lora-fast developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    package_dir={"lora_fast": "lora_fast", "lora_fast.kernels": "kernels", "lora_fast.profiler": "profiler"},
    packages=["lora_fast", "lora_fast.kernels", "lora_fast.profiler"],
    package_data={
        "lora_fast": ["py.typed", "tuned.json"],
        "lora_fast.profiler": ["report.css", "report.js"],
    },
    zip_safe=False,
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        # torch's CUDA builds bring triton themselves; its CPU builds do not, and the interpreter is wanted there too.
        'triton>=3.6; platform_system == "Linux"',
        "transformers>=5.17",
        "huggingface_hub>=1.0",
        "safetensors>=0.5",
        "numpy>=2.0",
        "typer>=0.15",
        "rich>=13",
        "matplotlib>=3.9",
        "plotly>=6",
        "optuna>=4",
        "accelerate>=1.0",  # Trainer, by which a rank search trains, needs it
    ],
    extras_require={
        "peft": ["peft>=0.21"],
        "test": [
            "bitsandbytes>=0.49",
            "peft>=0.21",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "setuptools>=77",  # a test builds the wheel without build isolation, and so without the network
        ],
    },
    entry_points={"console_scripts": ["lora-fast = lora_fast.cli:main"]},
)
