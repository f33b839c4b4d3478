"""The model that is planned for: its sizes, found without weights, and its parameters, abstract."""

import json
import pathlib
from importlib import resources
from typing import Any

import ml_collections
from jax.sharding import Mesh

from msd_jax.errors import UserFileError
from msd_jax.models import config as model_config
from msd_jax.models import pretrained


def read_sizes(path: str) -> tuple[model_config.DecoderConfig, str]:
    """The sizes of config.model.path and where they are from: its directory, architectures.json, or the hub.

    Raises:
      UserError: none of them has it, or the decoder does not implement it.
    """
    directory = pathlib.Path(path).expanduser()
    if path and directory.is_dir():
        return model_config.read(directory), str(directory / "config.json")
    published = _published()
    if path in published:
        return model_config.from_dict(published[path]), "its published config.json, kept in msd_jax/planning"
    import huggingface_hub

    try:
        file = huggingface_hub.hf_hub_download(path, "config.json")
    except Exception as error:  # the hub raises errors of many kinds, with one remedy for all of them
        raise UserFileError(
            f"config.model.path={path!r} is not a directory, this package does not have its sizes (it has those of "
            f"{', '.join(published)}), and the hub did not return its config.json ({type(error).__name__}); copy that "
            "file into a directory and give the directory"
        ) from error
    return model_config.read(pathlib.Path(file).parent), f"config.json of {path} on the hub"


def _published() -> dict[str, dict[str, Any]]:
    """hub id -> config.json, as far as the decoder reads it."""
    table = resources.files("msd_jax.planning").joinpath("architectures.json")
    return json.loads(table.read_text(encoding="utf-8"))


def abstract_model(
    config: ml_collections.ConfigDict, sizes: model_config.DecoderConfig, mesh: Mesh
) -> pretrained.Architecture:
    """The model of `config`, without weights."""
    options = {key: value for key, value in config.model.items() if key != "path"}
    return pretrained.architecture(sizes, mesh=mesh, **options)
