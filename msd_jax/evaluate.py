"""Generate, judge, tabulate: safety and utility in every language (`python -m msd_jax.evaluate`).

    python -m msd_jax.evaluate --config configs/NAME.py --checkpoint DIR --out DIR
    python -m msd_jax.evaluate --config configs/NAME.py --server http://HOST/v1 --model NAME --out DIR

--checkpoint is a Hugging Face directory, or a step of a run (WORKDIR/checkpoints/STEP); without it the model of the
config is evaluated as it comes. --server is any OpenAI-compatible one; its key, if any, is in OPENAI_API_KEY.
--preflight asks whether training is worth it (evaluation/preflight.py).
"""

from msd_jax import cli, report
from msd_jax.errors import UserError
from msd_jax.evaluation import evaluator, preflight, served
from msd_jax.io import program_cache, provenance, stores
from msd_jax.io.console import log
from msd_jax.parallel import distributed, sharding


def main(argv: list[str]) -> None:
    del argv
    flags = cli.FLAGS
    with cli.clear_errors():
        config = cli.config()
        program_cache.keep(config.compilation_cache)
        out = stores.own("--out", flags.out)
        result = out / ("preflight.json" if flags.preflight else "summary.json")
        if distributed.from_first(result.exists):
            raise UserError(f"--out={flags.out} holds results already ({result.name}); name another directory")
        if flags.server and (flags.checkpoint or flags.preflight):
            raise UserError("--server takes neither --checkpoint nor --preflight: the weights are the server's")
        mesh = sharding.train_mesh(config.mesh)
        if flags.preflight:
            preflight.show(preflight.run(config, evaluator.load(config, mesh), mesh, out))
            log(f"responses of both roles: {stores.told(out)}")
            stores.close(out)
            return
        if flags.server:
            run = served.evaluation(config, flags.server, flags.model, sharding.rollout_mesh(mesh))
        else:
            run = evaluator.of_checkpoint(config, cli.checkpoint(), mesh)
        provenance.record(out, config.seed, {})  # each response is stored with the hash of weights and prompts
    summary = run(out)
    report.print_summary(summary, flags.wide)
    log(f"responses and verdicts: {stores.told(out / 'responses.jsonl')}")
    stores.close(out)
    cli.require_verdicts(summary)


if __name__ == "__main__":
    cli.flags.DEFINE_string("checkpoint", "", "What to evaluate; without it, the model of the config.")
    cli.flags.DEFINE_string("server", "", "Address of a server whose model is evaluated, http://HOST/v1.")
    cli.flags.DEFINE_string("model", "", "Its name there.")
    cli.flags.DEFINE_string("out", None, "New directory for the results, or an interrupted one's.", required=True)
    cli.flags.DEFINE_bool("preflight", False, "Ask what training can gain at most.")
    cli.flags.DEFINE_bool("wide", False, "Print every column.")
    cli.run(main)
