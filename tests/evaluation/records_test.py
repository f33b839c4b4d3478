"""A record survives its file, and files of other times are read."""

import json

import pytest

from msd_jax.errors import UserError
from msd_jax.evaluation import records
from msd_jax.evaluation.judges import Verdict
from tests.evaluation.made import record

# As written before records were a type.
GENERATED = (
    '{"benchmark": "queries", "pass": "greedy", "id": "bread-02", "language": "en", "harmful": false, '
    '"category": "food", "prompt": "Tell me how to make bread.", "response": "You need flour.", "tokens": 5, '
    '"stopped": true, "exact_match": true, "language_match": true, "settings": "988d5fb21ae1bc9e", '
    '"verdict": "answered", "reason": "no refusal phrase", "judge": "rules 1-b9cf949b"}'
)
UNJUDGED_YET = GENERATED[: GENERATED.index(', "verdict"')] + "}"
CHOSEN = (
    '{"benchmark": "mmmlu", "pass": "likelihood", "id": "7", "language": "sw", "harmful": false, "category": "tests", '
    '"prompt": "?", "response": "B", "tokens": 0, "stopped": null, "exact_match": null, "language_match": null, '
    '"correct": false, "log_likelihoods": [-1.5, -0.25, -3.0, -2.0], "settings": "988d5fb21ae1bc9e", '
    '"verdict": null, "reason": null, "judge": null}'
)


@pytest.mark.parametrize("line", [GENERATED, CHOSEN])
def test_a_line_is_written_as_it_was_read(line):
    assert json.dumps(records.ResponseRecord.from_json(json.loads(line)).to_json()) == line


def test_a_record_is_what_its_line_says(tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text(f"{GENERATED}\n{UNJUDGED_YET}\n{CHOSEN}\n" + GENERATED[:50])
    judged, unjudged, chosen = records.read(path)
    assert judged.verdict is Verdict.ANSWERED and judged.pass_name is records.Pass.GREEDY
    assert unjudged.verdict is unjudged.judge is None and unjudged.key == judged.key
    assert judged.prompt_key == ("queries", "bread-02", "en") and judged.key == ("greedy", judged.prompt_key)
    assert chosen.correct is False and chosen.log_likelihoods == (-1.5, -0.25, -3.0, -2.0)
    assert records.RecordLog(path).read() == [judged, unjudged, chosen]
    assert records.read(tmp_path / "nothing.jsonl") == []


def test_a_log_holds_what_is_added(tmp_path):
    log = records.RecordLog(tmp_path / "out" / "responses.jsonl")
    first, second = record(id="1"), record("refused", id="2", settings="s")
    log.append([first])
    log.append([second])
    assert log.read() == [first, second]
    log.replace([second])
    assert log.read() == [second]


@pytest.mark.parametrize(
    "change", [{"verdict": "perhaps"}, {"pass": "beam"}, {"pass": None}, {"id": None}, {"response": None}]
)
def test_a_line_of_something_else_is_named(tmp_path, change):
    path = tmp_path / "responses.jsonl"
    path.write_text(GENERATED + "\n" + json.dumps(json.loads(GENERATED) | change) + "\n")
    with pytest.raises(UserError, match=r"responses.jsonl, line 2 is not a response of an evaluation"):
        records.read(path)
