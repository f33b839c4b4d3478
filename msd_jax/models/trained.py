"""Trained weights, from a Hugging Face directory or a step of a run."""

import pathlib

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from msd_jax.errors import UserError, UserFileError
from msd_jax.io import seals
from msd_jax.models import decoder, pretrained, weights
from msd_jax.parallel import distributed


def load_params(path: str, model: pretrained.Pretrained, mesh: Mesh) -> decoder.Params:
    """The student's weights, in the training layout.

    Args:
      path: a Hugging Face directory, a step of a run (WORKDIR/checkpoints/STEP, also as an address that epath reads),
        or "": the model's own directory.
      model: the model that the weights belong to.
      mesh: from sharding.make_mesh.

    Raises:
      UserError: `path` is none of these, or does not fit the model.
    """
    directory = epath.Path(path) if "://" in path else pathlib.Path(path).resolve() if path else model.directory
    if any(directory.glob("*.safetensors")):  # config.json would not tell: a run's workdir has one too
        weights.check(directory, model.config)
        if model.config.tied_embeddings and weights.has_own_head(directory):
            raise UserError(
                f"--checkpoint={path} has an lm_head.weight of its own, and the model of config.model.path has none; "
                "set config.model.path to the checkpoint's directory"
            )
        return model.params(mesh, directory)
    saved = directory / "state"
    if not saved.is_dir():
        raise UserFileError(f"--checkpoint={path} is neither a Hugging Face directory nor WORKDIR/checkpoints/STEP")
    damaged = distributed.from_all(lambda: seals.damage(directory, jax.process_index(), jax.process_count()))
    if any(damaged):
        raise UserError(f"--checkpoint={path} is damaged: {next(filter(None, damaged))}; take another step")
    trained, _ = model.split(model.target(mesh))
    args = ocp.args.PyTreeRestore(
        item={"params": trained},
        restore_args=ocp.checkpoint_utils.construct_restore_args({"params": trained}),
        partial_restore=True,
    )
    restored = ocp.PyTreeCheckpointer().restore(saved, args=args)["params"]
    return decoder.join(restored, model.frozen_params(mesh))
