"""Writes a trained model as a Hugging Face directory, and to the hub (`python -m msd_jax.export`).

    python -m msd_jax.export --config configs/NAME.py --checkpoint WORKDIR/checkpoints/STEP --out DIR
    ... --push_to_hub=OWNER/NAME

A run exports its last step by itself, with a model card; here the card is written where the run has evaluated STEP.
Adapters go to DIR/adapter, in PEFT's layout.
"""

from msd_jax import cli, report
from msd_jax.errors import UserError
from msd_jax.io import program_cache, stores, uploads
from msd_jax.io.console import log
from msd_jax.models import export, pretrained, trained
from msd_jax.parallel import distributed, sharding


def main(argv: list[str]) -> None:
    del argv
    flags = cli.FLAGS
    with cli.clear_errors():
        config = cli.config()
        program_cache.keep(config.compilation_cache)
        out = stores.own("--out", flags.out)
        if distributed.from_first(lambda: out.exists() and any(out.iterdir())):
            raise UserError(f"--out={flags.out} is there already; name a new directory")
        if flags.push_to_hub and distributed.is_first():
            uploads.claim(flags.push_to_hub, private=not flags.public)
        mesh = sharding.train_mesh(config.mesh)
        model = pretrained.load(**config.model, chat_template=config.prompts.chat_template)
        step = cli.checkpoint()
        params = trained.load_params(step, model, mesh)
    export.save(out, params, model.directory, lora=model.lora, companions=model.companions())
    if model.lora:
        export.save_adapter(out / "adapter", params, model, config.model.path)
    report.write_card(step, out)
    log(f"exported: {stores.told(out)}")
    if flags.push_to_hub and distributed.is_first():
        uploads.upload(flags.push_to_hub, out, "Exported by msd_jax")
        log(f"uploaded: {flags.push_to_hub}")
    stores.close(out)


if __name__ == "__main__":
    cli.flags.DEFINE_string("checkpoint", None, "Step of a run, WORKDIR/checkpoints/STEP.", required=True)
    cli.flags.DEFINE_string("out", None, "New directory for the model.", required=True)
    cli.flags.DEFINE_string("push_to_hub", "", "OWNER/NAME on the Hugging Face hub to upload it to.")
    cli.flags.DEFINE_bool("public", False, "Make a new repository there public; else it is private.")
    cli.run(main)
