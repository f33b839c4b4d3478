"""Evaluation: every prompt answered and judged once, rates with their n, and nothing half-written."""

import collections
import contextlib
import dataclasses
import itertools
import json
import shutil

import jax
import ml_collections
import numpy as np
import pytest
from msd_jax.configs import default

from msd_jax import report
from msd_jax.evaluation import evaluator, fingerprint, judges, records
from msd_jax.evaluation.judges import cache, interface
from msd_jax.generation import rollout
from msd_jax.io import jsonl
from msd_jax.models import int8, pretrained
from msd_jax.parallel import sharding
from tests.conftest import WORDS


@pytest.fixture
def config(model_dir, tmp_path) -> ml_collections.ConfigDict:
    path = tmp_path / "eval.jsonl"
    lines = [
        {"id": str(i), "harmful": [True, False, None][i % 3], "texts": {"en": f"make a {w} ?", "sw": f"vipi {w}"}}
        | ({"answers": {"sw": "yes"}} if i % 3 == 1 else {})
        for i, w in enumerate(WORDS[:11])
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = default.get_config()
    config.model.path = str(model_dir)
    config.eval.path, config.eval.batch_size, config.eval.max_new_tokens = str(path), 4, 5
    config.eval.languages, config.eval.source_languages = ("en", "sw"), ("en",)
    config.eval.passes = ("greedy", "t1")
    return config


def make(config, devices=1):
    model = pretrained.load(**config.model)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    evaluation = evaluator.of_model(ml_collections.FrozenConfigDict(config), model, mesh)
    layout = model.shardings(mesh, sharding.ROLLOUT)
    return evaluation, lambda: rollout.reshard(model.params(mesh), model.dtype, layout)


def test_every_prompt_once_a_pass_with_its_verdict(config, tmp_path):
    evaluation, params = make(config)
    summary = evaluation.run(params, tmp_path / "out")
    rows = jsonl.read(tmp_path / "out" / "responses.jsonl")
    asked = {(row["pass"], row["id"], row["language"]) for row in rows}
    assert len(rows) == len(asked) == 2 * 2 * 11
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    summary = summary["queries"]["languages"]
    assert [summary[code]["group"] for code in ("en", "sw")] == ["source", "trained"]
    for entry in summary.values():
        assert entry["n"] == 11 and entry["asr_n"] == 7 and entry["over_refusal_n"] == 4
        assert entry["asr"] + entry["refused"] + entry["safe"] + entry["invalid"] + entry["unjudged"] == pytest.approx(
            1
        )
    assert summary["en"]["exact_match"] is None and summary["sw"]["exact_match_t1_n"] == 4


def test_greedy_responses_do_not_depend_on_batches_or_devices(config, tmp_path):
    def responses(name, devices, batch_size):
        config.eval.batch_size = batch_size
        evaluation, params = make(config, devices)
        evaluation.run(params, tmp_path / name)
        rows = jsonl.read(tmp_path / name / "responses.jsonl")
        return {(row["pass"], row["id"], row["language"]): row["response"] for row in rows}

    assert responses("a", 1, 4) == responses("b", 8, 16)


def test_a_finished_evaluation_is_read_and_an_unfinished_one_done_anew(config, tmp_path):
    evaluation, params = make(config)
    summary = evaluation.run(params, tmp_path / "out")
    assert evaluation.run(lambda: 1 / 0, tmp_path / "out") == summary
    (tmp_path / "out" / "summary.json").unlink()
    with pytest.raises(ZeroDivisionError):
        evaluation.run(lambda: 1 / 0, tmp_path / "out")


class CountingJudge(judges.RulesJudge):
    """The rules, slow enough to be worth a cache. Interrupted after `limit` judgements."""

    name = "counting"

    def __init__(self, limit=10**6):
        super().__init__()
        self.judged, self._limit = [], limit

    def judge(self, responses, keep=judges.ignore):
        judgements = super().judge(responses)
        for index, (response, judgement) in enumerate(zip(responses, judgements)):
            if len(self.judged) == self._limit:
                raise KeyboardInterrupt
            self.judged.append((response.language, response.prompt, response.text))
            keep(index, judgement)
        return judgements


def cached(judge, path):
    return cache.CachedJudge(judge, path)


@pytest.fixture
def interruptible(config, tmp_path, monkeypatch):
    """interruptible(batches, judgements) -> (batches generated, responses judged); None where it was interrupted."""
    monkeypatch.setattr(judges, "cached", cached)  # RulesJudge, and so its child, is not cached otherwise
    params = {}

    def run(batches=10**6, judgements=10**6, out="out", **options):
        config.eval.update(options)
        evaluation, load = make(config)
        evaluation._judge, generated = CountingJudge(judgements), []
        generate = evaluation.answerer._generate

        def counting(name, weights, prompts, settings):
            for batch in generate(name, weights, prompts, settings):
                if len(generated) == batches:
                    raise KeyboardInterrupt
                generated.append([(name, record.id, record.language) for record in batch])
                yield batch

        monkeypatch.setattr(evaluation.answerer, "_generate", counting)
        summary = None
        with contextlib.suppress(KeyboardInterrupt):
            summary = evaluation.run(lambda: params.setdefault("weights", load()), tmp_path / out)
        return summary, [*itertools.chain(*generated)], evaluation._judge.judged

    return run


def test_an_interrupted_evaluation_repeats_neither_a_generated_nor_a_judged_prompt(interruptible, tmp_path):
    whole, asked, judged = interruptible(out="whole")
    runs = [interruptible(batches=2), interruptible(batches=5), interruptible(judgements=7), interruptible()]
    assert [summary is not None for summary, _, _ in runs] == [False, False, False, True]
    again = [*itertools.chain(*(generated for _, generated, _ in runs))]
    assert [len(generated) for _, generated, _ in runs] == [8, 18, 18, 0]  # a pass of 22 ends in a batch of 2
    assert len(again) == len(set(again)) == len(asked) and set(again) == set(asked)
    assert len(runs[2][2]) == 7 and sorted(set(runs[2][2] + runs[3][2])) == sorted(set(judged))
    assert not set(runs[2][2]) & set(runs[3][2])
    assert runs[3][0] == whole
    rows = [jsonl.read(tmp_path / name / "responses.jsonl") for name in ("whole", "out")]
    assert rows[0] == rows[1] and len(rows[0]) == len(asked)


def test_a_line_cut_short_is_generated_anew(interruptible, tmp_path):
    interruptible(batches=3)
    path = tmp_path / "out" / "responses.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    summary, generated, _ = interruptible()
    assert len(generated) == 2 * 2 * 11 - 11 and summary == interruptible(out="whole")[0]


def test_other_settings_or_weights_are_not_mixed_up(interruptible, config, tmp_path):
    interruptible(batches=3)
    _, generated, _ = interruptible(batches=3, max_new_tokens=6)
    assert len(generated) == 12  # nothing was taken over
    _, generated, _ = interruptible(batches=3, batch_size=8)  # is no such setting
    assert not {key for key in generated if key in set(interruptible(batches=3, batch_size=4)[1])}
    config.eval.max_new_tokens = 5
    evaluation, params = make(config)
    weights = params()
    changed = jax.tree.map(lambda p: p.at[(0,) * p.ndim].multiply(1 + 2**-20), weights)
    one = jax.tree.map(lambda p: p, weights)
    assert fingerprint.weights_checksum(one) == fingerprint.weights_checksum(weights)
    pairs = zip(fingerprint.weights_checksum(changed), fingerprint.weights_checksum(weights))
    assert all(a != b for a, b in pairs)
    quantised = int8.quantised(weights, np.float32)
    assert evaluation.fingerprint(quantised) != evaluation.fingerprint(weights)
    many, load = make(config, 8)
    assert many.fingerprint(load()) == evaluation.fingerprint(weights) != evaluation.fingerprint(changed)


def test_the_judge_is_that_of_the_config(config, tmp_path, monkeypatch):
    config.judge.kind = "guard"
    with pytest.raises(ValueError, match=r"config.judge.guard.path is empty"):
        make(config)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config.judge.kind, config.judge.openai.model = "ensemble", "m"
    config.judge.members = ("rules", "openai")
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        make(config)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    evaluation, _ = make(config)
    assert [member.name for member in evaluation._judge.members] == ["rules", "openai"]


def test_an_ensemble_may_have_the_model_itself_translate(config, tmp_path, monkeypatch):
    """Which weights translate, and so the judge's version, is known only once the evaluation runs."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    config.judge.kind, config.judge.members, config.judge.translate = "ensemble", ("rules", "openai"), "model"
    config.judge.openai.update(model="m", url="http://127.0.0.1:9/v1", addresses="private", retries=0, timeout=1.0)
    config.eval.passes, config.judge.translation_tokens = ("greedy",), 4
    evaluation, params = make(config)
    summary = evaluation.run(params, tmp_path / "out")
    assert summary["queries"]["languages"]["sw"]["n"] == 11 and "+openai-" in evaluation._judge.version


def test_evaluation_prompts_have_a_limit_of_their_own(config, capsys):
    config.prompts.student_limit, config.eval.prompt_limit = 3, 64
    evaluation, _ = make(config)
    assert len(evaluation.prompts) == 22 and "dropped" not in capsys.readouterr().out
    config.eval.prompt_limit = 8
    make(config)
    assert "queries: 11 prompts in en dropped, longer than config.eval.prompt_limit" in capsys.readouterr().out


def test_what_is_unjudged_is_told_beside_the_rates(config, tmp_path, monkeypatch, capsys):
    """Else a judge that fails on everything would show an ASR of 0%."""

    def fail(self, response):
        return judges.Verdict.UNJUDGED, "no judge"

    monkeypatch.setattr(judges.RulesJudge, "_verdict", fail)
    evaluation, params = make(config)
    summary = evaluation.run(params, tmp_path / "out")
    entries = summary["queries"]["languages"]
    shown = capsys.readouterr().out
    assert entries["sw"]["asr"] is None and entries["sw"]["asr_n"] == 0 and entries["sw"]["unjudged"] == 1
    assert "evaluation: 28 of 28 responses to harmful prompts unjudged; each may be unsafe" in shown
    assert "evaluation: 16 of 16 responses to harmless prompts unjudged; each may be an over-refusal" in shown
    report.print_summary(summary)
    assert capsys.readouterr().out.count("100.0%") == 2  # languages
    for entry in entries.values():
        entry["unjudged"] = 0.0
    report.print_summary(summary)
    assert "unjudged" not in capsys.readouterr().out  # the table stays narrow


def test_what_the_judges_endpoints_were_asked_is_kept_per_evaluation(config, tmp_path):
    evaluation, params = make(config)

    class Endpoint:
        usage = interface.Usage()

        def spent(self):
            return {"model": "m", "requests": self.usage.requests}

    class Asking(judges.RulesJudge):
        endpoints = (Endpoint(),)

        def judge(self, responses, keep=judges.ignore):
            self.endpoints[0].usage.requests += len(responses)
            return super().judge(responses, keep)

    evaluation._judge = Asking()
    for name in ("a", "b"):
        evaluation.run(params, tmp_path / name)
        assert jsonl.read(tmp_path / name / "judge_usage.jsonl") == [{"model": "m", "requests": 44}]


def test_questions_of_four_choices_are_scored_and_not_generated(config, tmp_path):
    words = {"en": WORDS[:4], "sw": WORDS[9:13]}
    config.eval.benchmarks, config.eval.mmmlu.path = ("mmmlu",), str(tmp_path / "mmmlu")
    config.eval.languages = ("en", "sw")
    (tmp_path / "mmmlu").mkdir()
    for name, options in (("mmlu_EN-US", words["en"]), ("mmlu_SW-KE", words["sw"])):
        lines = [",Question,A,B,C,D,Answer,Subject"]
        lines += [f"{i},{options[i]} ?,{','.join(options)},{'ABCD'[i]},tests" for i in range(4)]
        (tmp_path / "mmmlu" / f"{name}.csv").write_text("\n".join(lines))
    config.model.path = str(with_letters(tmp_path, config.model.path))
    evaluation, params = make(config)
    summary = evaluation.run(params, tmp_path / "out")
    assert list(summary) == ["queries", "mmmlu"]
    rows = [r for r in jsonl.read(tmp_path / "out" / "responses.jsonl") if r["benchmark"] == "mmmlu"]
    assert len(rows) == 8 and {r["pass"] for r in rows} == {"likelihood"} and {r["verdict"] for r in rows} == {None}
    for code in ("en", "sw"):
        its = [r for r in rows if r["language"] == code]
        assert all(r["response"] == "ABCD"[int(np.argmax(r["log_likelihoods"]))] for r in its)
        assert summary["mmmlu"]["languages"][code]["accuracy"] == sum(r["correct"] for r in its) / 4
    assert "asr" not in summary["mmmlu"]["languages"]["sw"]


def test_a_refused_problem_is_an_over_refusal(config, tmp_path, capsys):
    """MGSM is compared with its answers; the rules, and no judge that costs something, look for refusals."""
    (tmp_path / "mgsm").mkdir()
    for code in ("en", "sw"):
        (tmp_path / "mgsm" / f"mgsm_{code}.tsv").write_text("make a cup ?\t1\nmake a cup a cup ?\t2\n")
    config.eval.path, config.eval.benchmarks, config.eval.mgsm.path = "", ("mgsm",), str(tmp_path / "mgsm")
    config.prompts.student_limit = 256
    evaluation, params = make(config)
    evaluation._judge = judge = CountingJudge()
    generate = evaluation.answerer._generate

    def refusing(*arguments):
        (first, *others), *rest = generate(*arguments)
        refused = dataclasses.replace(first, response="I am sorry, but I cannot help with that.")
        yield from ([refused, *others], *rest)

    evaluation.answerer._generate = refusing
    summary = evaluation.run(params, tmp_path / "out")["mgsm"]
    rows = records.read(tmp_path / "out" / "responses.jsonl")
    assert judge.judged == [] and len(rows) == 8 and all(row.judge.startswith("rules ") for row in rows)
    refused = collections.Counter(
        row.language for row in rows if row.verdict == "refused" and row.pass_name == "greedy"
    )
    assert refused.total() == 1
    for code, entry in summary["languages"].items():
        assert entry["over_refusal"] == refused[code] / 2 and entry["over_refusal_n"] == 2
        assert entry["asr"] is None and entry["exact_match_n"] == 2
    report.print_summary({"mgsm": summary})
    assert "over-refusal" in capsys.readouterr().out


def with_letters(tmp_path, model):
    """The tiny model with the words that a multiple choice needs."""
    directory = tmp_path / "letters"
    shutil.copytree(model, directory)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for word in ("Answer:", "A", "B", "C", "D"):
        vocabulary[word] = len(vocabulary)
    path.write_text(json.dumps(tokenizer))
    return directory


def test_long_prompts_are_counted_or_an_error_if_all_are(config, capsys):
    config.prompts.student_limit = 8
    make(config)
    assert "queries: 11 prompts in en dropped" in capsys.readouterr().out
    config.prompts.student_limit = 3
    with pytest.raises(ValueError, match=r"every prompt is longer than config.prompts.student_limit=3 tokens"):
        make(config)


@pytest.mark.parametrize("limit, ids", [(0, range(11)), (4, (0, 3, 6, 9)), (6, (0, 2, 4, 6, 8, 10)), (20, range(11))])
def test_a_limit_is_spread_over_the_file(config, limit, ids):
    config.eval.limit = limit
    evaluation, _ = make(config)
    assert [p.query.id for p in evaluation.prompts if p.language == "sw"] == [str(i) for i in ids]
