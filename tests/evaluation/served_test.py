"""A model behind a server is evaluated as one on the mesh is: same records, report and resuming, whatever happens."""

import json
import math
import re
import socket
import time

import ml_collections
import pytest
from msd_jax.configs import default

from msd_jax.errors import UserError
from msd_jax.evaluation import endpoint, records, served
from msd_jax.io import jsonl
from msd_jax.parallel import peers
from tests.evaluation.judges.server import completion, send

KEY = "sk-secret-0123456789"
REFUSAL = "Samahani, siwezi kukusaidia na hilo."


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.01)


@pytest.fixture
def config(tmp_path) -> ml_collections.ConfigDict:
    path = tmp_path / "queries.jsonl"
    rows = [{"id": f"q{i}", "harmful": i % 2 == 0, "texts": {"en": f"how {i}?", "sw": f"vipi {i}?"}} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = default.get_config()
    config.eval.path, config.eval.max_new_tokens = str(path), 9
    config.eval.server.update(retries=2, timeout=30.0, concurrency=3)
    return config


def evaluation(config, url, model="tiny"):
    return served.evaluation(ml_collections.FrozenConfigDict(config), url, model, mesh=None)


def reply(body):
    """What the stand-in's model says: it refuses in Swahili, and goes on and on in English."""
    said = body["messages"][-1]["content"]
    if said.startswith("vipi"):
        return completion(REFUSAL, usage=(5, 4))
    return completion(f"Step 1: {said} {KEY}", usage=(6, 9), finish_reason="length")


def answers(number, body):
    return send(200, reply(body))


def is_trial(body):
    return body["messages"][-1]["content"] == "Hello"


def test_the_same_records_rates_and_files(config, serve, tmp_path, capsys):
    config.prompts.student_system, config.eval.passes = "Be kind.", ("greedy", "t1")
    config.eval.server.update(price_per_million_prompt_tokens=1e6, price_per_million_completion_tokens=2e6)
    server = serve(answers)
    summary = evaluation(config, server.url)(tmp_path / "out")["queries"]["languages"]
    assert (summary["en"]["asr"], summary["sw"]["asr"], summary["sw"]["over_refusal"]) == (1.0, 0.0, 1.0)
    assert summary["en"]["n"] == summary["sw"]["n"] == 6 and summary["sw"]["asr_t1_n"] == 3
    rows = records.read(tmp_path / "out" / "responses.jsonl")
    assert len(rows) == len({row.key for row in rows}) == 24
    assert {(r.language, r.tokens, r.stopped, r.language_match) for r in rows} >= {("sw", 4, True, True)}
    assert {(r.tokens, r.stopped) for r in rows if r.language == "en"} == {(9, False)}
    path, headers, body = server.requests[1]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["messages"][0] == {"role": "system", "content": "Be kind."} and body["model"] == "tiny"
    asked = [(body["temperature"], body["top_p"], body["max_tokens"]) for _, _, body in server.requests[1:]]
    assert asked == [(0.0, 1.0, 9)] * 12 + [(1.0, 1.0, 9)] * 12
    [usage] = jsonl.read(tmp_path / "out" / "server_usage.jsonl")
    cost = 12 * (5 + 2 * 4) + 12 * (6 + 2 * 9) + (6 + 2 * 9)  # the trial too
    assert (usage["requests"], usage["model"], usage["cost"]) == (25, "tiny", cost)
    assert "server: 25 requests, 0 of them repeated" in capsys.readouterr().out
    assert all("[key]" in row.response for row in rows if row.language == "en")
    assert all(KEY not in file.read_text() for file in (tmp_path / "out").iterdir())


def cut(handler):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def slow(handler):
    time.sleep(0.7)
    cut(handler)


PASSING = {
    "429 with Retry-After": [send(429, {"error": {"message": "slow down"}}, {"Retry-After": "1"})],
    "500 twice": [send(500, b"oops")] * 2,
    "a dropped connection": [cut],
    "malformed JSON": [send(200, b'{"choices": [')],
    "no choices": [send(200, {"choices": []})],
    "an answer that takes too long": [slow],
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_retried(config, serve, tmp_path, name):
    if "too long" in name:
        config.eval.server.timeout = 0.5
    faults = {}

    def script(number, body):
        said = body["messages"][-1]["content"]
        if said == "vipi 3?" and len(faults.setdefault(said, [])) < len(PASSING[name]):
            faults[said].append(time.monotonic())
            return PASSING[name][len(faults[said]) - 1]
        faults["answered"] = time.monotonic()
        return answers(number, body)

    server = serve(script)
    summary = evaluation(config, server.url)(tmp_path / "out")["queries"]["languages"]
    assert summary["sw"]["n"] == 6 and len(server.requests) == 13 + len(PASSING[name])
    [usage] = jsonl.read(tmp_path / "out" / "server_usage.jsonl")
    assert usage["retries"] == len(PASSING[name]) and usage["unanswered"] == {}
    if "Retry-After" in name:
        assert faults["answered"] - faults["vipi 3?"][0] >= 1


def test_never_more_at_once_than_allowed(config, serve, tmp_path):
    def script(number, body):
        def do(handler):
            time.sleep(0.05)
            answers(number, body)(handler)

        return do

    server = serve(script)
    evaluation(config, server.url)(tmp_path / "out")
    assert server.most_at_once == 3


def test_what_the_server_refuses_is_left_out_and_told(config, serve, tmp_path, capsys):
    """As a provider's filter, or a prompt that is too long for the model, does."""

    def script(number, body):
        if body["messages"][-1]["content"] in ("how 2?", "vipi 2?", "how 4?"):
            return send(400, {"error": {"message": f"filtered\n{KEY}"}})
        return answers(number, body)

    summary = evaluation(config, serve(script).url)(tmp_path / "out")["queries"]["languages"]
    assert (summary["en"]["asr_n"], summary["sw"]["asr_n"]) == (1, 2)
    assert "server: 3 prompts left out, which it does not answer: HTTP 400 (filtered [key])" in capsys.readouterr().out
    [usage] = jsonl.read(tmp_path / "out" / "server_usage.jsonl")
    assert usage["unanswered"] == {"HTTP 400 (filtered [key])": 3}


def test_a_server_that_dies_costs_nothing_twice(config, serve, tmp_path):
    dies_at = 6
    server = serve(lambda number, body: answers(number, body) if number < dies_at else send(503, b""))
    with pytest.raises(UserError, match=r"no longer answers: HTTP 503; what it answered is kept; run the same command"):
        evaluation(config, server.url)(tmp_path / "out")
    assert not (tmp_path / "out" / "summary.json").exists()
    assert len(records.read(tmp_path / "out" / "responses.jsonl")) == dies_at - 1

    dies_at, before = math.inf, len(server.requests)
    summary = evaluation(config, server.url)(tmp_path / "out")["queries"]["languages"]
    assert summary["sw"]["n"] == summary["en"]["n"] == 6 and len(server.requests) - before == 1 + 12 - 5


def test_one_prompt_without_an_answer_leaves_the_evaluation_open(config, serve, tmp_path):
    """A rate of the others would be taken for one of all."""
    broken = True

    def script(number, body):
        return send(500, b"") if broken and body["messages"][-1]["content"] == "how 2?" else answers(number, body)

    server = serve(script)
    with pytest.raises(UserError, match=r"left 1 of 12 prompts without an answer: HTTP 500; what it answered is kept"):
        evaluation(config, server.url)(tmp_path / "out")
    broken, before = False, len(server.requests)
    assert evaluation(config, server.url)(tmp_path / "out")["queries"]["languages"]["en"]["n"] == 6
    assert len(server.requests) - before == 2


def test_an_interruption_ends_the_requests_and_is_resumed(config, serve, tmp_path, monkeypatch):
    config.eval.server.concurrency = 1

    def script(number, body):
        def do(handler):
            time.sleep(0.03)
            answers(number, body)(handler)

        return do

    server, keep, kept = serve(script), records.RecordLog.append, []

    def append(self, rows):
        keep(self, rows)
        kept.extend(rows)
        if len(kept) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records.RecordLog, "append", append)
        evaluation(config, server.url)(tmp_path / "out")
    time.sleep(0.2)
    before = len(server.requests)
    assert before < 12
    peers.do_last_acts()  # as the process does when it ends, by a signal too
    [spent] = jsonl.read(tmp_path / "out" / "server_usage.jsonl")
    assert spent["requests"] == before
    summary = evaluation(config, server.url)(tmp_path / "out")["queries"]["languages"]
    assert summary["en"]["n"] == 6 and len(server.requests) - before == 1 + 12 - 4
    peers.do_last_acts()
    spent = [row["requests"] for row in jsonl.read(tmp_path / "out" / "server_usage.jsonl")]
    assert spent == [before, len(server.requests) - before]  # what is kept already is not kept twice


@pytest.mark.parametrize(
    ("fault", "models", "message"),
    [
        (
            send(401, {"error": {"message": f"bad {KEY}"}}),
            None,
            r"tiny at \S+: the server refuses the key of OPENAI_AP",
        ),
        (
            send(404, {"error": {"message": "no such model"}}),
            ["a", "b"],
            r"HTTP 404 \(no such model\); the server has a, b$",
        ),
        (send(404, b""), None, r"HTTP 404; --server is the base of an OpenAI-compatible API, which mostly ends in /v1"),
        (send(400, {"detail": "use max_completion_tokens"}), None, r"HTTP 400 \(use max_completion_tokens\)$"),
        (send(500, b""), ["tiny"], r"HTTP 500; the server has tiny$"),
        (send(302, b"", {"Location": "http://127.0.0.1:9"}), None, r"redirect refused \(HTTP 302\)$"),
    ],
)
def test_a_server_that_cannot_serve_is_one_line_before_any_prompt_is_sent(config, serve, fault, models, message):
    server = serve(lambda number, body: fault, models)
    with pytest.raises(UserError, match=message) as caught:
        evaluation(config, server.url)
    assert all(is_trial(body) for _, _, body in server.requests) and "\n" not in str(caught.value)
    assert KEY not in str(caught.value)


def test_no_server_no_key_no_name(config, serve, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"tiny at {re.escape(dead)}: connection failed: ConnectError"):
        evaluation(config, dead)
    assert time.monotonic() - start < 5
    for url, message in [
        ("localhost:8000", "--server must be the base of an OpenAI-compatible API"),
        (f"http://u:{KEY}@localhost/v1", "--server must not hold a user or password"),
        ("http://169.254.169.254/v1", "config.eval.server.addresses='private' does not allow"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            evaluation(config, url)
        assert KEY not in str(caught.value)
    with pytest.raises(UserError, match="--model is empty"):
        evaluation(config, "http://127.0.0.1:9/v1", model="")
    config.eval.weights = "int8"
    with pytest.raises(UserError, match=r"config\.eval\.weights='int8' has no effect on --server"):
        evaluation(config, "http://127.0.0.1:9/v1")
    config.eval.weights = "float"
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve(lambda number, body: send(401, b""))
    with pytest.raises(
        UserError, match=r"the server wants a key \(HTTP 401\): put it into the environment as OPENAI_AP"
    ):
        evaluation(config, server.url)
    assert "Authorization" not in server.requests[0][1]


def logprobs(**tokens):
    top = [{"token": token, "logprob": math.log(p)} for token, p in tokens.items()]
    return {"content": [{"token": "x", "top_logprobs": top}]}


@pytest.mark.parametrize("given", [True, False])
def test_multiple_choice_where_the_server_gives_log_probabilities(config, serve, tmp_path, capsys, given):
    (tmp_path / "mmmlu").mkdir()
    lines = [",Question,A,B,C,D,Answer,Subject", *(f"{i},Which {i}?,w,x,y,z,B,tests" for i in range(3))]
    (tmp_path / "mmmlu" / "mmlu_EN-US.csv").write_text("\n".join(lines))
    config.eval.benchmarks, config.eval.mmmlu.path = ("mmmlu",), str(tmp_path / "mmmlu")
    found = [{" B": 0.5, "B": 0.1, "A": 0.3}, {"A": 0.6, "b": 0.2}, {"The": 0.9, "I": 0.05}]

    def script(number, body):
        if "logprobs" not in body:
            return answers(number, body)
        if not given:
            return send(422, {"detail": "unsupported: logprobs"})
        said = body["messages"][-1]["content"]
        index = 0 if is_trial(body) else int(re.search(r"Which (\d)", said)[1])
        assert is_trial(body) or said.endswith("Reply with the letter alone.")
        answer = completion("B", finish_reason="length")
        answer["choices"][0]["logprobs"] = logprobs(**found[index])
        return send(200, answer)

    summary = evaluation(config, serve(script).url)(tmp_path / "out")
    told = capsys.readouterr().out
    if not given:
        assert "mmmlu left out: the server gives no log-probabilities of tokens" in told and list(summary) == [
            "queries"
        ]
        return
    rows = {r.id: r for r in records.read(tmp_path / "out" / "responses.jsonl") if r.benchmark == "mmmlu"}
    assert [(r.response, r.correct) for r in rows.values()] == [("B", True), ("A", False), ("", False)]
    first, _, last = (row.log_likelihoods for row in rows.values())
    assert first == pytest.approx([math.log(p) for p in (0.3, 0.5, 0.1, 0.1)], abs=1e-5)
    assert last == pytest.approx([math.log(0.05)] * 4, abs=1e-5)
    assert summary["mmmlu"]["languages"]["en"]["accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("message", "finish", "text"),
    [
        ({"content": "Yes."}, "stop", "Yes."),
        ({"content": None, "refusal": "No."}, "stop", "No."),
        ({"content": None}, "content_filter", ""),
        ({"content": "Yes.", "reasoning_content": "May I?"}, "stop", "<think>May I?</think>Yes."),
        ({"content": "", "reasoning": "May I"}, "length", "<think>May I"),
    ],
)
def test_what_counts_as_the_reply(message, finish, text):
    assert served._text({"message": message, "finish_reason": finish}) == text


def test_the_fingerprint_follows_what_a_response_depends_on(config):
    def of(url="http://127.0.0.1:9/v1", model="tiny", **keys):
        config.eval.server.update(keys)
        frozen = ml_collections.FrozenConfigDict(config)
        return served.Server(frozen, url, model).fingerprint(None, [])

    first = of()
    assert of(concurrency=5, timeout=7.0) == first
    assert len({first, of(model="other"), of(url="http://127.0.0.1:10/v1"), of(request={"seed": 1})}) == 4
