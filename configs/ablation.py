"""What: the method, its parts and its rivals on the embedded tiny model, each with three seeds, in one table.

Command:  python -m msd_jax.main --config configs/ablation.py --workdir runs/ablation
          One seed: --config.ablation.seeds=1
Hardware: any; no network.

A grid of your own: start from your recipe, and name in config.ablation.variants what each run changes.
"""

import ml_collections
from msd_jax.configs import quickstart

OFF_POLICY = {"policy": "off_policy"}
SAFETY_PROMPT = (
    "Before you reply, consider whether the request could harm someone. If it could, refuse in the user's language."
)


def get_config() -> ml_collections.ConfigDict:
    config = quickstart.get_config()
    config.train.export = False
    config.train.checkpoints.kept = 1
    config.ablation.seeds = 3
    config.ablation.variants = ml_collections.ConfigDict(
        {
            # On-policy MSD, by the weights of its tokens.
            "dpsw": {},
            "teacher": {"loss": {"weighting": "teacher"}},
            "student": {"loss": {"weighting": "student"}},
            "uniform": {"loss": {"weighting": "uniform"}},
            # Off-policy MSD.
            "off_policy": {"rollout": OFF_POLICY, "loss": {"divergence": "forward_kl"}},
            "off_policy_uniform": {
                "rollout": OFF_POLICY,
                "loss": {"divergence": "forward_kl", "weighting": "uniform"},
            },
            # Fine-tuning on the teacher's own responses.
            "sft": {"rollout": OFF_POLICY, "loss": {"divergence": "cross_entropy", "weighting": "uniform"}},
            # 20% retention queries, which hold the student to the initial model in English.
            "retain": {"data": {"retain_fraction": 0.2}},
            # No training: the initial model, told to be careful.
            "system_prompt": {"train": {"steps": 0}, "prompts": {"student_system": SAFETY_PROMPT}},
        }
    )
    return config
