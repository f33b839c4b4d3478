"""What: the embedded tiny model, safe in English and unsafe in Swahili, Bangla and Javanese, aligned in minutes.

Command:  python -m msd_jax.main --config configs/quickstart.py --workdir runs/quickstart
Hardware: any; no network. 36 to 48 s on two CPU cores.
Expected: ASR from 100% to 0% in Swahili, Bangla and Javanese, exact match within a point, over-refusal 0%;
          Yoruba and Zulu, which are not trained, stay at 100%.
"""

import ml_collections
from msd_jax.configs import default

from msd_jax import testbed


def get_config() -> ml_collections.ConfigDict:
    config = default.get_config()
    config.model.path = str(testbed.MODEL_PATH)
    config.data.path = str(testbed.TRAIN_QUERIES)
    config.data.languages = ml_collections.ConfigDict(dict.fromkeys(testbed.TARGET_LANGUAGES, 1.0))
    config.data.batch_size = 32
    config.data.length_window = 1  # the testbed's lengths hardly differ
    config.prompts.teacher_template = testbed.TEACHER_TEMPLATE
    config.prompts.student_limit = 64
    config.prompts.teacher_limit = 96
    config.rollout.max_new_tokens = 24
    config.loss.divergence = "reverse_kl"  # as summaries of the paper have it; here no student is too certain for it
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 5
    config.train.steps = 30
    config.train.checkpoints.every = 10
    config.train.completions.every = 10
    config.eval.path = str(testbed.EVAL_QUERIES)
    config.eval.languages = (*testbed.SOURCE_LANGUAGES, *testbed.TARGET_LANGUAGES, *testbed.UNSEEN_LANGUAGES)
    config.eval.source_languages = testbed.SOURCE_LANGUAGES
    config.eval.passes = ("greedy", "t1")
    config.eval.batch_size = 256
    config.eval.max_new_tokens = 24
    config.mesh.data, config.mesh.fsdp = -1, 1
    return config
