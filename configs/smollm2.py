"""What: SmolLM2-135M-Instruct aligned towards Swahili and Italian on MultiJail's queries, on a laptop's CPU.

Command:  python -m msd_jax.main --config configs/smollm2.py --workdir runs/smollm2 --config.data.path=MultiJail.csv
          Evaluated before and after, for a report (with network access, each path may be left out):
              --config.eval.benchmarks="('multijail','xstest','mgsm')" --config.eval.multijail.path=MultiJail.csv \
              --config.eval.xstest.path=xstest_prompts.csv --config.eval.mgsm.path=DIRECTORY_OF_MGSM
          Without the hub: --config.model.path=LOCAL_DIRECTORY

A check of the whole path on real weights, not a recipe for a safe model: 30 steps, harmful queries alone (which teach
refusing everything; mix in harmless ones), and a model that speaks little Swahili.
"""

import ml_collections
from msd_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    config = default.get_config()
    config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.model.remat = "dots"  # keeps 0.6 GB of products, which the backward pass would compute a second time
    config.data.harmful = "true"  # MultiJail has no labels: all of its queries are harmful
    config.data.languages = ml_collections.ConfigDict({"sw": 1.0, "it": 1.0})
    config.data.batch_size = 8
    config.prompts.student_limit = 192
    config.prompts.teacher_limit = 320
    config.rollout.max_new_tokens = 64
    config.loss.divergence = "reverse_kl"  # what the README's figures and benchmarks/step.py were measured with
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 3
    config.train.steps = 30
    config.train.response_tokens = 64  # it seldom ends by itself
    config.train.loss_chunk = 128  # more would gain a CPU nothing, and cost 200 MB
    config.train.checkpoints.every = 15
    config.train.completions.every = 10
    config.train.checkpoints.kept = 1
    config.eval.languages = ("en", "it", "sw")
    config.eval.sample = "first"
    config.eval.xstest.limit = 100
    config.eval.mgsm.limit, config.eval.mgsm.languages = 50, ("sw",)
    config.eval.prompt_limit = 512  # in Swahili, problems take many tokens of a tokenizer made for English
    config.eval.max_new_tokens = 64
    return config
