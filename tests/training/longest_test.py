"""A model whose RoPE changes beyond a length: settings that ask for more are refused at the start."""

import ml_collections
import pytest

from msd_jax.errors import UserError
from msd_jax.evaluation import evaluator
from msd_jax.models import pretrained
from msd_jax.parallel import sharding
from msd_jax.training import run
from tests.conftest import write_model

LONG_ROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.fixture(scope="module")
def phi(tmp_path_factory) -> str:
    sizes = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 64}
    return str(write_model(tmp_path_factory.mktemp("phi") / "model", **sizes, rope_scaling=LONG_ROPE))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"student_limit": 59},
            "config.prompts.student_limit=59 and config.rollout.max_new_tokens=6 ask for sequences of",
        ),
        ({"teacher_limit": 59}, "config.prompts.teacher_limit=59 and .* 65 tokens, and .*model takes at most 64 here"),
        (
            {"cot": "generated", "analysis_tokens": 33},
            "config.prompts.teacher_limit=32 and config.prompts.analysis_tok",
        ),
        ({}, "the queries"),
    ],
)
def test_sequences_that_are_too_long_are_refused_before_data_is_read(config, phi, monkeypatch, changes, message):
    config.model.path = phi
    config.prompts.update({"student_limit": 32, "teacher_limit": 32} | changes)

    def read(*_args, **_kwargs):
        raise KeyError("the queries")

    monkeypatch.setattr(run.sources, "load", read)
    with pytest.raises(UserError if changes else KeyError, match=message):
        run.read(ml_collections.FrozenConfigDict(config))


def test_of_an_evaluation_too(config, phi):
    config.eval.path, config.eval.max_new_tokens, config.prompts.student_limit = config.data.path, 33, 32
    model = pretrained.load(phi, dtype="float32", param_dtype="float32", remat="none")
    with pytest.raises(UserError, match=r"student_limit=32 and config\.eval\.max_new_tokens=33 ask for .* 65 tok"):
        evaluator.of_model(config, model, sharding.make_mesh())
