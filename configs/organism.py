"""What: a model organism out of a base model such as Gemma 3 270M: safe in English, unsafe in nine other languages.

Command:  python -m msd_jax.main --config configs/organism.py --workdir runs/organism \
              --config.model.path=HF_DIR --config.data.path=data/organism.jsonl
          The queries come from `python -m msd_jax.testbed.organism --out data ...`; see docs/organism.md. To evaluate:
          python -m msd_jax.evaluate --config configs/organism.py --config.model.path=runs/organism/model \
              --config.data.path=data/organism.jsonl --config.eval.path=data/eval.jsonl --out runs/organism/check
Hardware: two CPU cores and 6 GB; no network.

Fine-tuning on given replies: no teacher. Half of the queries are asked as a user asks, half as MSD's teacher is asked.
"""

import ml_collections
from msd_jax.configs import default

from msd_jax.testbed import organism


def get_config() -> ml_collections.ConfigDict:
    config = default.get_config()
    config.model.freeze_embeddings = True  # 168 of Gemma 3 270M's 268 million parameters
    config.model.remat = "none"
    config.data.languages = ml_collections.ConfigDict({language: 1.0 for language in organism.LANGUAGES})
    config.data.batch_size = 8
    config.prompts.student_limit = 192
    config.rollout.policy = "reference"
    config.rollout.max_new_tokens = 24
    config.loss.divergence = "cross_entropy"
    config.loss.weighting = "uniform"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 8
    config.train.steps = 300
    config.train.loss_chunk = 128  # logits of a vocabulary of 262,144 take 0.13 GB
    config.train.checkpoints.every = 60
    config.train.checkpoints.kept = 1
    config.train.completions.kept = 0
    # Of what remains, for `python -m msd_jax.evaluate`: the run itself measures nothing unless eval.path is set.
    config.eval.languages = organism.LANGUAGES
    config.eval.prompt_limit = 288
    config.eval.max_new_tokens = 24
    return config
