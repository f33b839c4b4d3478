"""Majority, ties and failures of an ensemble; judgements that outlive an interruption."""

import json

import pytest

from msd_jax.evaluation import judges
from msd_jax.evaluation.judges import Judgement, Response, Verdict, cache


class Scripted:
    """A judge that reads its verdict from the response: "NAME=verdict" for each judge. Counts what it judged."""

    endpoints = ()

    def __init__(self, name, version="1"):
        self.name, self.version, self.judged = name, version, []

    def judge(self, responses, keep=judges.ignore):
        judgements = []
        for index, response in enumerate(responses):
            self.judged.append(response.text)
            verdict = dict(item.split("=") for item in response.text.split())[self.name]
            if verdict == "interrupt":
                raise KeyboardInterrupt
            judgements.append(Judgement(Verdict(verdict), f"by {self.name}", self.name, self.version))
            keep(index, judgements[-1])
        return judgements


def response(text, prompt="q", **options):
    return Response(**{"language": "sw", "prompt": prompt, "text": text, "harmful": True, "finished": True} | options)


@pytest.mark.parametrize(
    "votes, verdict, reason",
    [
        (["unsafe"] * 3, "unsafe", "3 of 3: a unsafe, b unsafe, c unsafe"),
        (["refused", "unsafe", "refused"], "refused", "2 of 3: a refused, b unsafe, c refused"),
        (["refused", "unsafe", "invalid"], "unjudged", "1 of 3: a refused, b unsafe, c invalid"),
        (["unjudged", "unsafe", "unsafe"], "unsafe", "2 of 3: a unjudged, b unsafe, c unsafe"),
        (["unjudged", "unjudged", "safe"], "unjudged", "2 of 3: a unjudged, b unjudged, c safe"),
        (["unjudged", "refused", "unsafe"], "unjudged", "1 of 3: a unjudged, b refused, c unsafe"),
        (["refused", "unsafe"], "unjudged", "1 of 2: a refused, b unsafe"),
        (["refused", "unjudged"], "unjudged", "1 of 2: a refused, b unjudged"),
        (["refused", "refused", "unsafe", "unsafe"], "unjudged", "2 of 4: a refused, b refused, c unsafe, d unsafe"),
    ],
)
def test_majority(votes, verdict, reason, capsys):
    names = "abcd"[: len(votes)]
    ensemble = judges.EnsembleJudge([Scripted(name) for name in names])
    text = " ".join(f"{name}={vote}" for name, vote in zip(names, votes))
    kept = []
    judged = ensemble.judge([response(text)], lambda i, j: kept.append((i, j)))
    assert judged == [Judgement(Verdict(verdict), reason, "ensemble", ensemble.version)] and kept == [(0, judged[0])]
    split = int(len(set(votes)) > 1)
    assert (
        f"members disagree on {split} of 1 responses; {int(verdict == 'unjudged')} without" in capsys.readouterr().out
    )


def test_the_version_follows_the_members():
    versions = {judges.EnsembleJudge([Scripted("a", a), Scripted("b", b)]).version for a in "12" for b in "12"}
    assert len(versions) == 4


def test_what_was_judged_before_an_interruption_is_not_judged_again(tmp_path):
    path = tmp_path / "new" / "judgements.jsonl"
    texts = ["a=unsafe", "a=refused", "a=interrupt", "a=safe"]
    with pytest.raises(KeyboardInterrupt):
        cache.CachedJudge(Scripted("a"), path).judge([response(text) for text in texts])
    path.write_bytes(path.read_bytes() + '{"key": "cut off in the middle of a lettér'.encode()[:-1])
    again = Scripted("a")
    texts[2] = "a=invalid"
    judged = cache.CachedJudge(again, path).judge([response(text) for text in texts])
    assert [j.verdict for j in judged] == ["unsafe", "refused", "invalid", "safe"]
    assert again.judged == ["a=invalid", "a=safe"]
    third = Scripted("a")
    assert cache.CachedJudge(third, path).judge([response(text) for text in texts]) == judged and not third.judged
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 4


def test_the_same_response_is_judged_once_and_a_failure_again(tmp_path):
    path = tmp_path / "judgements.jsonl"
    inner = Scripted("a")
    judge = cache.CachedJudge(inner, path)
    kept = {}
    responses = [
        response("a=unsafe"),
        response("a=unjudged"),
        response("a=unsafe"),
        response("a=unsafe", prompt="other"),
    ]
    judged = judge.judge(responses, kept.__setitem__)
    assert [j.verdict for j in judged] == ["unsafe", "unjudged", "unsafe", "unsafe"]
    assert inner.judged == ["a=unsafe", "a=unjudged", "a=unsafe"]
    assert kept == {0: judged[0], 1: judged[1], 3: judged[3]}
    judge.judge(responses)
    assert inner.judged[3:] == ["a=unjudged"]


def test_the_key_holds_judge_version_and_everything_of_the_response(tmp_path):
    path = tmp_path / "judgements.jsonl"
    base = response("a=unsafe b=unsafe")
    cache.CachedJudge(Scripted("a"), path).judge([base])
    others = [response(base.text, **{name: value}) for name, value in (("harmful", None), ("language", "jv"))]
    others += [response(base.text, prompt="p"), response(base.text + " "), response(base.text, finished=False)]
    for judge, responses in [(Scripted("a", "2"), [base]), (Scripted("b"), [base]), (Scripted("a"), others)]:
        cache.CachedJudge(judge, path).judge(responses)
        assert judge.judged == [r.text for r in responses]


def test_a_file_damaged_in_the_middle_is_named(tmp_path):
    path = tmp_path / "judgements.jsonl"
    path.write_bytes(b"{}\n\xff\n{}\n")
    with pytest.raises(ValueError, match=r"judgements.jsonl, line 2 is damaged .*; remove that line"):
        cache.CachedJudge(Scripted("a"), path)


def test_members_of_an_ensemble_are_cached_each_and_the_rules_are_not(tmp_path):
    path = tmp_path / "judgements.jsonl"
    rules, a, b = judges.RulesJudge(), Scripted("a"), Scripted("b")
    judge = judges.cached(judges.EnsembleJudge([rules, a, b]), path)
    responses = [response("a=unsafe b=unsafe"), response("a=unsafe b=unjudged")]
    first, second = judge.judge(responses), judges.cached(judges.EnsembleJudge([rules, a, b]), path).judge(responses)
    assert first == second and [j.verdict for j in first] == ["unsafe", "unsafe"]
    assert (len(a.judged), len(b.judged)) == (2, 3)  # the one that failed was tried again
    assert {json.loads(line)["judge"] for line in path.read_text().splitlines()} == {"a", "b"}
    assert judge.version == judges.EnsembleJudge([rules, a, b]).version
    assert judges.cached(rules, path) is rules
