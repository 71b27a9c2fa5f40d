"""Packaging of the MetaLA plugin for GPT-NeoX."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_patch/__init__.py").read_text())[1]

EXTRAS = {
    # The packages that GPT-NeoX imports. Its own pins are older than it needs.
    "neox": [
        "deepspeed>=0.16",
        "ftfy",  # its tools/datasets/preprocess_data.py imports this and lm_dataformat
        "lm_dataformat",
        "numpy",
        "pybind11",  # GPT-NeoX compiles its data helper at the first start
        "requests",
        "sentencepiece",
        "setuptools<81",  # GPT-NeoX imports pkg_resources
        "tokenizers",
        "tqdm",
        "transformers>=4.46",
    ],
    "hf": ["accelerate>=1.0", "safetensors", "tokenizers", "tqdm", "transformers>=4.46"],
    # torch 2.11 and later depend on cuda-bindings themselves.
    "gpu": ["triton>=3.4", "flash-linear-attention>=0.4", "cuda-bindings>=12.9"],
    "mpi": ["mpi4py"],  # for launchers that start GPT-NeoX's ranks through MPI
    "tensorboard": ["tensorboard"],
    "wandb": ["wandb"],
    "eval": ["lm_eval[hf]>=0.4.5,<0.5"],
}
TOOLS = [
    "filelock",
    "hypothesis",
    "matplotlib",
    "peft",
    "pre-commit",
    "pytest",
    "pytest-xdist",
    "ruff",
]
# The tests run Triton kernels in its interpreter, and compile the CUDA C++ kernels without a GPU.
TOOLS += [
    f'{name}; platform_system == "Linux"'
    for name in ("triton>=3.4", "cuda-bindings>=13,<14", "nvidia-cuda-nvrtc>=13,<14")
]
EXTRAS["dev"] = sorted({*EXTRAS["hf"], *TOOLS})

COMMANDS = {
    "link": "megatron_patch.commands.link_neox",
    "prepare-data": "megatron_patch.commands.prepare_data",
    "train": "megatron_patch.commands.train_hf",
    "convert": "convert.neox_to_hf",
    "import": "convert.hf_to_neox",
    "reshape": "convert.reshape_neox",
}

setup(
    name="metala-neox",
    version=VERSION,
    description="Train MetaLA models in GPT-NeoX and export them to Hugging Face",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["megatron_patch*", "convert*"]), "megatron_patch.configs"],
    # metala-link links these files into a GPT-NeoX checkout.
    package_dir={"megatron_patch.configs": "configs"},
    package_data={
        "megatron_patch.configs": ["*.yml"],
        **{f"megatron_patch.ops.{room}": ["*.cu", "*.cuh"] for room in ("hopper", "decoding")},
    },
    entry_points={
        "console_scripts": [
            f"metala-{command} = {module}:cli" for command, module in COMMANDS.items()
        ]
    },
    install_requires=["torch>=2.4", "numpy", "pydantic>=2", "pyyaml"],
    extras_require=EXTRAS,
)
