"""What the recipes for the paper's models share: languages, lengths, precision, optimizer. Not a recipe by itself.

Bring your own queries, in the languages below, harmful and harmless ones mixed: harmful ones alone teach a model to
refuse everything. The hyperparameters are our choice; the paper's were not available. Each recipe has a variant
`--config configs/NAME.py:smoke`: two steps of a tiny random model of the same family, on any machine, without network.
"""

import ml_collections
from msd_jax.configs import default

from msd_jax import testbed
from msd_jax.errors import UserError


def shared() -> ml_collections.ConfigDict:
    config = default.get_config()
    config.model.dtype = "bfloat16"
    config.data.languages = ml_collections.ConfigDict(dict.fromkeys(("zh", "ar", "bn", "sw", "jv"), 1.0))
    config.data.batch_size = 64
    config.prompts.student_limit = 512
    config.prompts.teacher_limit = 768
    config.rollout.max_new_tokens = 512
    config.optimizer.learning_rate = 2e-6
    config.train.steps = 200
    config.eval.languages = ("en", "zh", "ar", "bn", "sw", "jv", "it", "vi", "ko", "th")
    config.eval.batch_size = 64
    config.eval.max_new_tokens = 512
    config.launch.topology = "v5e:8x8"
    return config


def lora(config: ml_collections.ConfigDict, rank: int = 16) -> ml_collections.ConfigDict:
    """The recipe with adapters: a hundredth of the optimizer's memory, and no second copy of the weights."""
    config.model.lora.rank = rank
    config.model.lora.alpha = 2.0 * rank
    config.optimizer.learning_rate = 1e-4
    return config


def variant(config: ml_collections.ConfigDict, name: str, which: str) -> ml_collections.ConfigDict:
    """The variant that the colon of --config names: none, lora or smoke."""
    if which == "lora":
        return lora(config)
    if which == "smoke":
        return smoke(config, name)
    if which:
        raise UserError(f"unknown variant {which!r}; choose lora or smoke")
    return config


def smoke(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """Two steps of the recipe on a tiny random model of its family, on the testbed's queries."""
    from msd_jax.testbed import tiny  # here, so that importing a recipe stays cheap

    config.model.path = str(tiny.model(name))
    config.data.path = config.eval.path = str(testbed.EVAL_QUERIES)
    config.data.languages = ml_collections.ConfigDict({"sw": 1.0, "bn": 1.0})
    config.data.batch_size = config.eval.batch_size = 8
    config.prompts.teacher_template = testbed.TEACHER_TEMPLATE
    config.prompts.student_limit = 64
    config.prompts.teacher_limit = 96
    config.rollout.max_new_tokens = config.eval.max_new_tokens = 8
    config.train.steps = 2
    config.eval.languages = ("en", "sw", "yo")
    config.eval.limit = 8
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, -1, 1
    config.mesh.rollout_tensor = config.mesh.rollout_ffw = 0
    return config
