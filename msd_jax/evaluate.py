"""Generate, judge, tabulate: safety and utility in every language (`python -m msd_jax.evaluate`).

    python -m msd_jax.evaluate --config configs/NAME.py --checkpoint DIR --out DIR

--checkpoint is a Hugging Face directory, or a step of a run (WORKDIR/checkpoints/STEP); without it the model of the
config is evaluated as it comes. --preflight asks whether training is worth it, see evaluation/preflight.py.
"""

from msd_jax import cli, report
from msd_jax.errors import UserError
from msd_jax.evaluation import evaluator, preflight
from msd_jax.generation import rollout
from msd_jax.io import program_cache, provenance, stores
from msd_jax.io.console import log
from msd_jax.models import pretrained, trained
from msd_jax.parallel import distributed, sharding


def main(argv: list[str]) -> None:
    del argv
    with cli.clear_errors():
        config = cli.config()
        program_cache.keep(config.compilation_cache)
        out = stores.own("--out", cli.FLAGS.out)
        result = out / ("preflight.json" if cli.FLAGS.preflight else "summary.json")
        if distributed.from_first(result.exists):
            raise UserError(f"--out={cli.FLAGS.out} holds results already ({result.name}); name another directory")
        mesh = sharding.make_mesh(**config.mesh)
        model = pretrained.load(**config.model, chat_template=config.prompts.chat_template, mesh=mesh)
        if cli.FLAGS.preflight:
            preflight.show(preflight.run(config, model, mesh, out))
            log(f"responses of both roles: {stores.told(out)}")
            stores.close(out)
            return
        if not evaluator.wanted(config):
            raise UserError("there is nothing to evaluate: set config.eval.path or config.eval.benchmarks")
        evaluation = evaluator.Evaluator(config, model, mesh)
        params = trained.load_params(cli.checkpoint(), model, mesh)
        provenance.record(out, config.seed, {})  # each response is stored with the hash of weights and prompts
    layout = model.shardings(mesh, sharding.ROLLOUT)
    summary = evaluation.run(lambda: rollout.reshard(params, model.dtype, layout), out)
    report.print_summary(summary, cli.FLAGS.wide)
    log(f"responses and verdicts: {stores.told(out / 'responses.jsonl')}")
    stores.close(out)
    cli.require_verdicts(summary)


if __name__ == "__main__":
    cli.flags.DEFINE_string("checkpoint", "", "What to evaluate; without it, the model of the config.")
    cli.flags.DEFINE_string("out", None, "New directory for the results, or an interrupted one's.", required=True)
    cli.flags.DEFINE_bool("preflight", False, "Ask what training can gain at most.")
    cli.flags.DEFINE_bool("wide", False, "Print every column.")
    cli.run(main)
