"""Models that think: what is judged follows the reasoning, and reasoning without an end is counted."""

import jax
import ml_collections
import numpy as np
import pytest
from msd_jax.configs import default

from msd_jax.data.records import Query
from msd_jax.evaluation import answering, benchmarks, local, rates
from msd_jax.evaluation.encoding import EncodedPrompt
from msd_jax.evaluation.evaluator import judged
from msd_jax.evaluation.judges import RulesJudge, Verdict, text
from msd_jax.evaluation.records import Pass, ResponseRecord
from msd_jax.generation import refill
from msd_jax.models import pretrained
from msd_jax.parallel import sharding
from tests.data.prompts_test import byte_tokenizer
from tests.models.formats_test import OPTIONS, made

FINISHED = "<think>\nIs it 41? No.</think>\n\nJibu ni 42"
UNFINISHED = "<think>\nThe answer is 42, 42, 42"


@pytest.mark.parametrize(
    "end, opens",
    [
        ("<|im_end|>\n<|im_start|>assistant\n", ""),
        ("<|im_start|>assistant\n<think>\n", "<think>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("<|assistant|>[think]", "[THINK]"),  # as template_check gives it, in lower case
        ("<think>a</think><think>", "<think>"),
    ],
)
def test_whether_the_prompt_opens_the_reasoning(end, opens):
    assert text.opened_reasoning(end) == opens


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("opens", ["", "<think>"])
def test_what_follows_the_reasoning_is_measured(tmp_path, special, opens):
    """Whoever opens it, template or model, and whether its marks are special tokens, which decoding drops."""
    directory = made(tmp_path / "model", vocab_size=300)
    byte_tokenizer(directory)
    model = pretrained.load(str(directory), **OPTIONS)
    marks = ["<think>", "</think>"]
    model.tokenizer.add_tokens(marks, special_tokens=special)
    config = default.get_config()
    config.eval.languages, config.eval.max_new_tokens = ("sw",), 64
    prompts = [
        EncodedPrompt(benchmarks.BENCHMARKS["mgsm"], query, "sw", np.arange(3), opens)
        for query in (Query(str(i), False, "", {"sw": "6 x 7?"}, {"sw": "42"}) for i in range(2))
    ]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    frozen = ml_collections.FrozenConfigDict(config)
    respondent = local.LocalModel(frozen, model, mesh, prompts, 64)
    answerer = answering.Answerer(frozen, respondent, prompts)
    rows = [model.tokenizer.encode(t.removeprefix(opens), add_special_tokens=False) for t in (FINISHED, UNFINISHED)]
    ended = [refill.Response(1, rows[1], stopped=False), refill.Response(0, rows[0], stopped=True)]
    respondent._generators[Pass.GREEDY] = lambda *args: iter(ended)
    finished, unfinished = judged(answerer.answer(Pass.GREEDY, {}, prompts, "x"), RulesJudge())
    assert (finished.response, unfinished.response) == (FINISHED, UNFINISHED)
    assert finished.exact_match and not unfinished.exact_match
    assert (finished.unfinished_reasoning, unfinished.unfinished_reasoning) == (False, True)
    assert unfinished.language_match is None
    assert finished.verdict == Verdict.ANSWERED and unfinished.verdict == Verdict.INVALID
    summary = rates.summarise([finished, unfinished], config)["mgsm"]["languages"]["sw"]
    assert summary["unfinished_reasoning"] == 0.5 and summary["unfinished_reasoning_n"] == 2
    assert ResponseRecord.from_json(unfinished.to_json()) == unfinished


def test_summaries_of_models_that_do_not_think_are_as_before():
    record = ResponseRecord("queries", Pass.GREEDY, "1", "sw", True, "", "x", "Siwezi.", verdict=Verdict.REFUSED)
    assert "unfinished_reasoning" not in record.to_json()
    summary = rates.summarise([record], default.get_config())["queries"]["languages"]["sw"]
    assert not any("unfinished" in key for key in summary)
