"""params -> a Hugging Face directory that transformers, vLLM and the like load.

A run exports its last step; `python -m msd_jax.export --config configs/NAME.py --checkpoint WORKDIR/checkpoints/STEP
--out DIR` does so for another.
"""

import json
import pathlib
import shutil

import jax

from msd_jax.models import config as model_config
from msd_jax.models import decoder, weights


def save(
    directory: pathlib.Path,
    params: decoder.Params,
    source: pathlib.Path,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `params` to `directory` in the layout of the model that they came from.

    Args:
      directory: replaced as a whole, and only when everything is written.
      params: of the decoder that SOURCE/config.json describes.
      source: the Hugging Face directory whose config.json and tokenizer go along.
      dtype: of the tensors; None takes the one that SOURCE/config.json names.
      max_shard_bytes: above this size the weights are split over several files with an index.
    """
    config = model_config.read(source)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    dtype = dtype or values.get("dtype") or values.get("torch_dtype") or "float32"
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    weights.write(unfinished, params, config, jax.numpy.dtype(dtype), max_shard_bytes)
    weights.copy_tokenizer(source, unfinished)
    values.pop("torch_dtype", None)
    (unfinished / "config.json").write_text(json.dumps(values | {"dtype": dtype}, indent=2) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.rename(directory)


def main(argv: list[str]) -> None:
    del argv
    from msd_jax import checkpoint, cli, sharding
    from msd_jax.console import say
    from msd_jax.models import pretrained

    with cli.clear_errors():
        config = cli.config()
        model, mesh = pretrained.load(**config.model), sharding.make_mesh(**config.mesh)
        params = checkpoint.load_params(cli.FLAGS.checkpoint, model, mesh)
        out = pathlib.Path(cli.FLAGS.out)
        if out.exists():
            raise ValueError(f"--out={out} is there already; name a new directory")
    save(out, params, model.directory)
    say(f"exported: {out}")


if __name__ == "__main__":
    from msd_jax import cli

    cli.run(main, checkpoint=None, out=None)
