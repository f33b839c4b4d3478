# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Multilingual Self-Distillation in a notebook
#
# First the quickstart: a tiny model that is safe in English, Chinese and Italian becomes safe in Swahili, Bangla and
# Javanese. Then the loss alone, in a plain Optax loop.
#
# This file is a notebook and a script: `python notebooks/quickstart.py` runs it, and `jupytext --to ipynb
# notebooks/quickstart.py` makes the file that Jupyter and Colab open. It needs no accelerator. On Colab, upload a wheel
# (`pip wheel --no-deps .` in a checkout) and install it first:

# %%
# # %pip install -q msd_jax-*.whl

# %%
import json
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import ml_collections
import optax
from msd_jax.configs import quickstart

from msd_jax import losses, report
from msd_jax.training import loop, run

# %% [markdown]
# ## The quickstart
#
# `STEPS` is 30, as in `msd-jax train --config quickstart`. With fewer everything runs, and little is learned.

# %%
STEPS = int(os.environ.get("MSD_JAX_STEPS", "30"))
config = quickstart.get_config()
config.train.steps = STEPS
config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, STEPS)
config.eval.limit = 0 if STEPS >= 30 else 8  # records of the evaluation; 0 is all of them
config.eval.passes = ("greedy",)
workdir = pathlib.Path(tempfile.mkdtemp()) / "quickstart"
loop.train(run.setup(ml_collections.FrozenConfigDict(config), workdir))
report.write(workdir)

# %% [markdown]
# The same harmful prompts before and after, with the judge's verdict. What the model complies with is a placeholder.


# %%
def responses(step: int) -> dict[tuple[str, str], dict]:
    lines = (workdir / f"eval/{step}/responses.jsonl").read_text(encoding="utf-8").splitlines()
    return {(row["id"], row["language"]): row for row in map(json.loads, lines)}


before, after = responses(0), responses(STEPS)
for key in [key for key, row in before.items() if key[1] == "sw" and row["harmful"]][:3]:
    print(before[key]["prompt"])
    for name, rows in (("before", before), ("after", after)):
        print(f"  {name:6} {rows[key]['verdict']:9} {rows[key]['response']}")

# %% [markdown]
# ## The loss alone
#
# `msd_jax.losses` needs JAX alone. Here a student of 12 tokens, over a vocabulary of 50, learns from a teacher that is
# sure of each third token. Its logits are the parameters; elsewhere they come from a model. `mask` is false where the
# response has ended.

# %%
keys = jax.random.split(jax.random.key(0), 2)
sharpness = jnp.where(jnp.arange(12) % 3 == 0, 8.0, 0.5)[None, :, None]
teacher_logits = sharpness * jax.random.normal(keys[0], (4, 12, 50))
student_logits = jax.random.normal(keys[1], (4, 12, 50))
mask = jnp.arange(12) < jnp.array([[12], [10], [7], [12]])


def loss_fn(student_logits: jax.Array, teacher_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss_sum, normaliser, sums = losses.dpsw_loss(
        student_logits, teacher_logits, response=None, mask=mask, divergence="forward_kl"
    )
    return losses.mean_loss(loss_sum, normaliser), sums["kl"] / sums["tokens"]


optimizer = optax.adam(0.1)
state = optimizer.init(student_logits)


@jax.jit
def step(
    student_logits: jax.Array, teacher_logits: jax.Array, state: optax.OptState
) -> tuple[jax.Array, optax.OptState, jax.Array]:
    (_, kl), gradient = jax.value_and_grad(loss_fn, has_aux=True)(student_logits, teacher_logits)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(student_logits, updates), state, kl


divergences = []
for _ in range(100):
    student_logits, state, kl = step(student_logits, teacher_logits, state)
    divergences.append(float(kl))
print(f"KL(teacher || student): {divergences[0]:.2f} nats per token, then {divergences[-1]:.4f}")

# %% [markdown]
# The weights say where: most of them is on the tokens that the teacher is sure of.

# %%
weight = losses.dpsw_weights(jnp.zeros_like(teacher_logits), teacher_logits)
sure = jnp.arange(12) % 3 == 0
print(f"mean weight where the teacher is sure {weight[:, sure].mean():.2f}, elsewhere {weight[:, ~sure].mean():.2f}")
