"""The values that each key may take: one of a few, some of a few, or a range of numbers."""

import math
from typing import Any, NamedTuple

from msd_jax import losses
from msd_jax.data import near_duplicates, prompts, records
from msd_jax.evaluation import benchmarks, endpoint, judges, respondents
from msd_jax.evaluation.judges import formats, guard
from msd_jax.generation import responses
from msd_jax.models import attention, decoder, int8, lora
from msd_jax.planning import launch
from msd_jax.training import optimizer, trackers, train_step

# Mappings whose keys are the user's own, and the type of their values (None: any).
FREE = {
    "ablation.variants": None,
    "data.languages": float,
    "data.sources": None,
    "prompts.student_template_kwargs": None,
    "prompts.teacher_template_kwargs": None,
    "judge.openai.request": None,
    "eval.server.request": None,
}
_COUNTED = ("prompt", "completion")
_ASKED = ("judge.openai", "eval.server")  # sections on servers

_DTYPES = ("float32", "bfloat16")
CHOICES = {
    "model.param_dtype": _DTYPES,
    "model.dtype": _DTYPES,
    "model.attention": attention.CHOICES,
    "model.remat": tuple(decoder.REMAT_POLICIES),
    "data.harmful": tuple(records.LABELS),
    "data.near_duplicates": near_duplicates.ACTIONS,
    "prompts.cot": prompts.COT,
    "teacher.kind": train_step.TEACHERS,
    "rollout.policy": responses.POLICIES,
    "rollout.weights": int8.WEIGHTS,
    "loss.divergence": ("auto", *losses.OBJECTIVES),
    "loss.weighting": tuple(losses.WEIGHTINGS),
    "loss.entropy_scale": tuple(losses.ENTROPY_SCALES),
    "loss.student_token": losses.STUDENT_TOKENS,
    "loss.normalize": losses.NORMALIZATIONS,
    "optimizer.name": optimizer.RULES,
    "optimizer.moments_dtype": _DTYPES,
    "optimizer.schedule": optimizer.SCHEDULES,
    "eval.harmful": tuple(records.LABELS),
    "eval.sample": benchmarks.SAMPLES,
    "eval.weights": int8.WEIGHTS,
    "launch.accelerator": launch.ACCELERATORS,
    "judge.kind": judges.KINDS,
    "judge.translate": judges.TRANSLATORS,
    "judge.guard.format": guard.FORMATS,
    "judge.guard.dtype": _DTYPES,
    "judge.openai.format": tuple(formats.FORMATS),
    **{f"{section}.addresses": endpoint.ADDRESSES for section in _ASKED},
}
# Tuples of choices, each at most once: what they are chosen from, and the fewest.
SELECTIONS = {
    "model.lora.targets": (tuple(lora.ADAPTABLE), 1),
    "train.trackers": (tuple(trackers.KINDS), 0),
    "eval.benchmarks": (benchmarks.NAMES, 0),
    "eval.passes": (tuple(respondents.TEMPERATURES), 1),
}


class Range(NamedTuple):
    """The numbers from `low` to `high`, `low` itself only if not `above`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: Any) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'greater than' if self.above else 'at least'} {self.low}" + (
            f" and at most {self.high}" if self.high < math.inf else ""
        )


_MOST = 10_000_000  # more steps, rows or tokens than any run has: what is larger is a slip of the keyboard
_COUNT, _COUNT_OR_NONE = Range(1, _MOST), Range(0, _MOST)
SHARE, _AMOUNT, _POSITIVE = Range(0, 1), Range(0), Range(0, above=True)
_AXIS = Range(-1, _MOST)
RANGES = {
    "seed": Range(0, 2**32 - 1),
    "model.lora.rank": _COUNT_OR_NONE,
    "model.lora.alpha": _POSITIVE,
    "data.batch_size": _COUNT,
    "data.length_window": Range(1, 64),
    "data.retain_fraction": SHARE,
    "prompts.student_limit": _COUNT,
    "prompts.teacher_limit": _COUNT,
    "prompts.analysis_tokens": _COUNT,
    "teacher.ema_decay": SHARE,
    "teacher.period": _COUNT,
    "rollout.on_policy_fraction": SHARE,
    "rollout.max_new_tokens": _COUNT,
    "rollout.rows": _COUNT_OR_NONE,
    "rollout.temperature": _AMOUNT,
    "rollout.top_k": _COUNT_OR_NONE,
    "rollout.top_p": Range(0, 1, above=True),
    "loss.beta": SHARE,
    "loss.beta_ramp": SHARE,
    "loss.token_cap": _AMOUNT,
    "loss.top_k": _COUNT_OR_NONE,
    "loss.temperature": _POSITIVE,
    "loss.weight_top_k": Range(2, _MOST),
    "optimizer.learning_rate": Range(0, 1),  # of an update whose entries are about 1
    "optimizer.warmup_steps": _COUNT_OR_NONE,
    "optimizer.adamw.b1": SHARE,
    "optimizer.adamw.b2": SHARE,
    "optimizer.adamw.eps": _POSITIVE,
    "optimizer.weight_decay": _AMOUNT,
    "optimizer.clip_norm": _POSITIVE,
    "train.steps": _COUNT_OR_NONE,
    "train.micro_batches": _COUNT,
    "train.response_tokens": _COUNT_OR_NONE,
    "train.loss_chunk": _COUNT,
    "train.max_skipped": _COUNT,
    "train.skip_spikes": _AMOUNT,
    "train.stall_limit": _AMOUNT,
    "train.checkpoints.every": _COUNT,
    "train.checkpoints.kept": _COUNT,
    "train.log_every": _COUNT,
    "train.profile_steps": _COUNT_OR_NONE,
    "train.completions.every": _COUNT,
    "train.completions.kept": _COUNT_OR_NONE,
    "eval.limit": _COUNT_OR_NONE,
    "eval.monitor.every": _COUNT_OR_NONE,
    "eval.monitor.slice": _COUNT,
    "eval.monitor.utility_floor": SHARE,
    "eval.monitor.over_refusal_ceiling": SHARE,
    "eval.prompt_limit": _COUNT_OR_NONE,
    "eval.batch_size": _COUNT,
    "eval.max_new_tokens": _COUNT,
    **{f"eval.{name}.limit": _COUNT_OR_NONE for name in benchmarks.NAMES},
    "preflight.min_flip": SHARE,
    "preflight.min_language_match": SHARE,
    "preflight.max_over_refusal_rise": SHARE,
    "judge.translation_tokens": _COUNT,
    "judge.guard.threshold": SHARE,
    "judge.guard.limit": _COUNT,
    "judge.guard.batch_size": _COUNT,
    **{f"{section}.concurrency": Range(1, 256) for section in _ASKED},
    **{f"{section}.timeout": _POSITIVE for section in _ASKED},
    **{f"{section}.retries": Range(0, 100) for section in _ASKED},
    **{f"{section}.price_per_million_{kind}_tokens": _AMOUNT for section in _ASKED for kind in _COUNTED},
    "ablation.seeds": _COUNT,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
    "mesh.rollout_tensor": _COUNT_OR_NONE,
    "mesh.rollout_ffw": _COUNT_OR_NONE,
    "launch.slices": _COUNT,
    "launch.nodes": _COUNT,
    "launch.gpus_per_node": _COUNT_OR_NONE,
}
