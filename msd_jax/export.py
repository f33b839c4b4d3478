"""Writes a trained model as a Hugging Face directory (`python -m msd_jax.export`).

    python -m msd_jax.export --config configs/NAME.py --checkpoint WORKDIR/checkpoints/STEP --out DIR

A run exports its last step by itself.
"""

from msd_jax import cli
from msd_jax.errors import UserError
from msd_jax.io import program_cache, stores
from msd_jax.io.console import log
from msd_jax.models import export, pretrained, trained
from msd_jax.parallel import distributed, sharding


def main(argv: list[str]) -> None:
    del argv
    with cli.clear_errors():
        config = cli.config()
        program_cache.keep(config.compilation_cache)
        mesh = sharding.make_mesh(**config.mesh)
        model = pretrained.load(**config.model, chat_template=config.prompts.chat_template)
        params = trained.load_params(cli.checkpoint(), model, mesh)
        out = stores.own("--out", cli.FLAGS.out)
        if distributed.from_first(lambda: out.exists() and any(out.iterdir())):
            raise UserError(f"--out={cli.FLAGS.out} is there already; name a new directory")
    export.save(out, params, model.directory, lora=model.lora, companions=model.companions())
    log(f"exported: {stores.told(out)}")
    stores.close(out)


if __name__ == "__main__":
    cli.flags.DEFINE_string("checkpoint", None, "Step of a run, WORKDIR/checkpoints/STEP.", required=True)
    cli.flags.DEFINE_string("out", None, "New directory for the model.", required=True)
    cli.run(main)
