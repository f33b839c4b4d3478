"""What: MSD on a model organism made of Gemma 3 270M (configs/organism.py), from queries in Swahili and Bangla.

Command:  python -m msd_jax.main --config configs/gemma3_270m.py --workdir runs/gemma3_270m \
              --config.model.path=runs/organism/model --config.data.path=data/train.jsonl \
              --config.eval.path=data/eval.jsonl
          XSTest too: --config.eval.benchmarks="('xstest',)" --config.eval.xstest.path=xstest_prompts.csv
          configs/gemma3_270m.py:grid runs all variants, configs/gemma3_270m.py:forward_kl,sft those that it names.
Hardware: two CPU cores and 8 GB; no network. See docs/organism.md for data, times and results.
"""

import ml_collections
from msd_jax.configs import default

from msd_jax.data import prompts
from msd_jax.errors import UserError
from msd_jax.testbed import organism

_BOTH_QUERIES = prompts.DEFAULT_TEACHER_TEMPLATE + "\nThe same request in {language}: {target_query}"

VARIANTS = {
    # On-policy MSD with DPSW, by its divergence.
    "forward_kl": {},
    "reverse_kl": {"loss": {"divergence": "reverse_kl"}},
    "jsd": {"loss": {"divergence": "jsd"}},
    "blend": {"loss": {"divergence": "blend", "beta_ramp": 0.5}},
    # The same without DPSW, with another scale of the teacher's entropy, with a cap on what one token weighs.
    "uniform": {"loss": {"weighting": "uniform"}},
    "exponential": {"loss": {"entropy_scale": "exponential"}},
    "cap": {"loss": {"token_cap": 2.0}},
    # On the teacher's responses, and with a teacher that sees the query in both languages.
    "off_policy": {"rollout": {"policy": "off_policy"}},
    "target_query": {"prompts": {"teacher_template": _BOTH_QUERIES, "teacher_limit": 256}},
    "lora": {"model": {"freeze_embeddings": False, "lora": {"rank": 16}}, "optimizer": {"learning_rate": 5e-4}},
    # The rival that needs response data: fine-tuning on refusals and answers in the two languages.
    "sft": {"rollout": {"policy": "reference"}, "loss": {"divergence": "cross_entropy", "weighting": "uniform"}},
    # What holds the other languages: 20% retention queries in English, or English among the languages aligned.
    "retain": {"data": {"retain_fraction": 0.2}},
    "source": {"data": {"languages": {"en": 1.0}}},
}


def get_config(variants: str = "") -> ml_collections.ConfigDict:
    """`variants`: "" for the first alone, "grid" for all, or names of VARIANTS, separated by commas."""
    config = default.get_config()
    config.model.freeze_embeddings = True
    config.model.remat = "none"
    config.data.languages = ml_collections.ConfigDict({language: 1.0 for language in organism.TRAINED})
    config.data.harmful_share = 0.5
    config.data.batch_size = 8
    config.prompts.student_limit = 96
    config.prompts.teacher_limit = 192
    config.rollout.max_new_tokens = 24
    config.loss.divergence = "forward_kl"
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_steps = 3
    config.train.steps = 30
    config.train.loss_chunk = 128  # logits of a vocabulary of 262,144 take 0.13 GB
    config.train.completions.every = 10
    config.train.checkpoints.kept = 1
    config.eval.languages = organism.LANGUAGES
    config.eval.prompt_limit = 288
    config.eval.max_new_tokens = 24
    if variants:
        names = VARIANTS if variants == "grid" else variants.split(",")
        if unknown := sorted(set(names) - set(VARIANTS)):
            raise UserError(f"unknown variant {unknown[0]!r}; choose grid, or some of {', '.join(VARIANTS)}")
        config.ablation.variants = ml_collections.ConfigDict({name: VARIANTS[name] for name in names})
        config.train.export = False
    return config
