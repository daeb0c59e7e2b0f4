"""Packaging of megalong: the framework, its Triton kernels and the checkpoint tools."""

from setuptools import find_packages, setup

setup(
    name="megalong",
    version="0.1.0",
    description="Parallelism-first reinforcement learning on hour-long video, on Megatron-core.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["megalong", "megalong.*", "checkpoints_tools", "checkpoints_tools.*"]),
        "megalong_kernels",
    ],
    # kernels/ itself is no package: one of that name would shadow Hugging Face's.
    package_dir={"megalong_kernels": "kernels/megalong_kernels"},
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.5,<6",
        "safetensors",
        "omegaconf>=2.3",
        "av>=17,<20",
        "triton>=3.4; platform_system == 'Linux'",
        "einops",
        "numpy",
        "packaging",
        "psutil",  # megatron dist_checkpointing hangs in save without it
        "tqdm",
        "matplotlib",
        "tensorboard",
    ],
    extras_require={
        "gpu": [
            "transformer-engine[pytorch]",
            "vllm>=0.25,<0.26",
            "PyNvVideoCodec>=2.2",
            "flash-attn-4[cu13]>=4.0.0b16,<4.0.0b20",  # later ones need other CuTe packages than vLLM 0.25 pins
        ],
        "wandb": ["wandb"],
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "pillow", "ruff", "wandb"],
    },
    entry_points={
        "console_scripts": [
            "megalong=megalong.__main__:main",
            "megalong-convert=checkpoints_tools.cli:main",
        ]
    },
)
