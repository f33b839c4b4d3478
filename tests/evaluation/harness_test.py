"""The harness gives the same numbers on our models as on its own `hf` model: local tasks, without a network."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
from msd_jax.configs import quickstart

lm_eval = pytest.importorskip("lm_eval", reason="the eval extra is not installed")
from lm_eval.tasks import TaskManager  # noqa: E402

from msd_jax.evaluation.harness import MsdJaxLM  # noqa: E402
from msd_jax.training import loop  # noqa: E402
from msd_jax.training import run as training_run  # noqa: E402
from tests.evaluation.judges.guard_test import CHAT, CORPUS, write_guard  # noqa: E402

SMOLLM2 = os.environ.get("MSD_JAX_SMOLLM2", "")
TASKS = {
    "likelihood": """
        output_type: loglikelihood
        doc_to_text: "{{question}}"
        doc_to_target: "{{choices[answer]}}"
        metric_list:
          - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
          - {metric: acc, aggregation: mean, higher_is_better: true}
    """,
    "choice": """
        output_type: multiple_choice
        doc_to_text: "{{question}}\\n{% for c in choices %}{{'ABCD'[loop.index0]}}. {{c}}\\n{% endfor %}Answer:"
        doc_to_choice: ["A", "B", "C", "D"]
        doc_to_target: answer
        metric_list:
          - {metric: acc, aggregation: mean, higher_is_better: true}
    """,
    "words": """
        output_type: multiple_choice
        doc_to_text: "{{question}} "
        doc_to_choice: choices
        doc_to_target: answer
        metric_list:
          - {metric: acc, aggregation: mean, higher_is_better: true}
          - {metric: acc_norm, aggregation: mean, higher_is_better: true}
    """,
    "rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list:
          - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
          - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
    """,
    "generate": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{choices[answer]}}"
        generation_kwargs: {until: ["STOP"], max_gen_toks: 12, do_sample: false}
        metric_list:
          - {metric: exact_match, aggregation: mean, higher_is_better: true}
    """,
}
REAL = [
    {
        "question": "Which gas do plants take in from the air?",
        "choices": ["oxygen", "carbon dioxide", "helium", "neon"],
        "answer": 1,
        "text": "Photosynthesis turns light, water and carbon dioxide into sugar.\nIt takes place in leaves.",
    },
    {
        "question": "Mji mkuu wa Kenya ni upi?",
        "choices": ["Mombasa", "Nairobi", "Kisumu", "Dodoma"],
        "answer": 1,
        "text": "Nairobi ni mji mkuu wa Kenya, nao uko kwenye nyanda za juu.",
    },
    {
        "question": "পৃথিবীর উপগ্রহের নাম কী?",
        "choices": ["মঙ্গল", "শুক্র", "চাঁদ", "সূর্য"],
        "answer": 2,
        "text": "চাঁদ পৃথিবীর একমাত্র প্রাকৃতিক উপগ্রহ।",
    },
    {"question": "2 + 2 =", "choices": ["3", "4", "5", "22"], "answer": 1, "text": "Two and two make four. " * 12},
]


def write_tasks(directory: pathlib.Path, rows: list[dict], stop: str) -> TaskManager:
    directory.mkdir()
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {directory}}}\n"
    for name, text in TASKS.items():
        body = "\n".join(line[8:] for line in text.splitlines()).replace("STOP", stop)
        (directory / f"{name}.yaml").write_text(f"task: {name}\n{head}test_split: test\n{body}", encoding="utf-8")
    return TaskManager(include_path=str(directory), include_defaults=False)


def run(model, tasks: TaskManager, names=tuple(TASKS), **options):
    options = {"bootstrap_iters": 0, "log_samples": True, "verbosity": "ERROR"} | options
    return lm_eval.simple_evaluate(model=model, tasks=list(names), task_manager=tasks, **options)


def hf(directory, **options):
    pytest.importorskip("torch", reason="the parity extra is not installed")
    pytest.importorskip("accelerate", reason="the parity extra is not installed")
    from lm_eval.models.huggingface import HFLM

    # Over 49,152 tokens torch's float32 log-softmax is off by 1e-5 a token, always to the same side.
    options |= {"device": "cpu", "dtype": "float32", "softmax_dtype": "float64"}
    return HFLM(str(directory), batch_size=4, **options)


def command_line(tasks: pathlib.Path, model_args: str, names=tuple(TASKS)) -> dict:
    """What `run` gives, from a process of its own with one device, as a user starts it."""
    out = tasks.with_name(tasks.name + ".out")
    command = [sys.executable, "-m", "msd_jax.lm_eval", "run", "--model", "msd_jax", "--tasks", ",".join(names)]
    command += ["--include_path", str(tasks), "--output_path", str(out), "--log_samples", "--batch_size", "auto"]
    command += ["--model_args", model_args]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    samples = {name: next(out.rglob(f"samples_{name}_*.jsonl")).read_text("utf-8").splitlines() for name in names}
    samples = {name: [json.loads(line) for line in lines] for name, lines in samples.items()}
    return json.loads(results.read_text("utf-8")) | {"samples": samples}


def responses(results, task):
    return [sample["filtered_resps"] for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])]


def scores(results, task):
    """(log-likelihood, greedy) of each continuation, [N, 2] or, without the flag, [N, 1]; files hold them as text."""
    flat = [pair for row in responses(results, task) for pair in row]
    pairs = [pair if isinstance(pair, tuple | list) else [pair] for pair in flat]
    return np.array([[float({"True": 1, "False": 0}.get(str(x), x)) for x in pair] for pair in pairs])


def require_same(ours, theirs, names=tuple(TASKS)):
    """Log-likelihoods within 1e-4, the same greedy flags and texts, and so the same metrics."""
    for task in names:
        if task == "generate":
            assert responses(ours, task) == responses(theirs, task)
        else:
            mine, other = scores(ours, task), scores(theirs, task)
            print(f"{task}: {len(mine)} log-likelihoods, off by {np.abs(mine - other)[:, 0].max():.1e} at most")
            np.testing.assert_allclose(mine[:, 0], other[:, 0], atol=1e-4, rtol=0, err_msg=task)
            np.testing.assert_array_equal(mine[:, 1:], other[:, 1:])
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                np.testing.assert_allclose(ours["results"][task][metric], value, rtol=1e-4, err_msg=f"{task} {metric}")


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    words = [word for text in CORPUS for word in text.split()]

    def some(least, most):
        return " ".join(rng.choice(words, rng.integers(least, most)))

    return [
        {"question": some(1, 9), "choices": [some(1, 4) for _ in range(4)], "answer": i % 4, "text": some(1, 60)}
        for i in range(9)
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny random Llama with a byte-level tokenizer, which splits words as those of real models do."""
    return write_guard(tmp_path_factory.mktemp("models") / "tiny", template=CHAT)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, rows):
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks", rows, stop="safe")


@pytest.fixture(scope="module")
def ours(directory):
    return MsdJaxLM(str(directory), batch_size=4, max_length=96, data=1, fsdp=-1)


def test_numbers_are_those_of_hf(directory, tasks, ours):
    """Every kind of request; 96 tokens at most, so that some texts take several windows and some contexts are cut."""
    mine, theirs = run(ours, tasks), run(hf(directory, max_length=96), tasks)
    require_same(mine, theirs)
    assert len({text for texts in responses(mine, "generate") for text in texts}) > 3  # no constant
    assert not any("safe" in text for texts in responses(mine, "generate") for text in texts)


def test_a_base_model(tmp_path, directory, tasks):
    base = pathlib.Path(shutil.copytree(directory, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    names = ("likelihood", "choice")
    mine, theirs = (run(model, tasks, names) for model in (MsdJaxLM(str(base), max_length=96), hf(base, max_length=96)))
    require_same(mine, theirs, names)


def test_chat_template_and_few_shots(directory, tasks, ours):
    options = {"apply_chat_template": True, "num_fewshot": 2, "names": ("choice", "generate")}
    mine, theirs = run(ours, tasks, **options), run(hf(directory, max_length=96), tasks, **options)
    for task in options["names"]:
        asked = [[sample["arguments"] for sample in results["samples"][task]] for results in (mine, theirs)]
        assert asked[0] == asked[1] and "<|start_header_id|>" in str(asked[0])
    require_same(mine, theirs, options["names"])


def test_sampling_repeats_differ_and_runs_agree(directory, tasks, ours):
    options = {"names": ("generate",), "gen_kwargs": "do_sample=True,temperature=1.0,top_k=20"}
    first, again = (responses(run(ours, tasks, **options), "generate") for _ in range(2))
    assert first == again != responses(run(ours, tasks, names=("generate",)), "generate")
    with pytest.raises(ValueError, match="num_beams"):
        run(ours, tasks, names=("generate",), gen_kwargs="num_beams=4")


def test_command_line_and_a_step_of_a_run(tmp_path, tasks, rows):
    """`python -m msd_jax.lm_eval` knows the model, and reads a checkpoint of a run as its exported directory."""
    config = quickstart.get_config()
    config.train.steps, config.train.checkpoints.every, config.eval.path = 1, 1, ""
    workdir = tmp_path / "run"
    loop.train(training_run.setup(ml_collections.FrozenConfigDict(config), workdir))
    (step,) = (workdir / "checkpoints").iterdir()
    tasks = write_tasks(tmp_path / "tasks", rows, stop="safe")
    found = command_line(tmp_path / "tasks", f"pretrained={step}", ("choice",))
    require_same(found, run(MsdJaxLM(str(workdir / "model")), tasks, ("choice",)), ("choice",))
    initial = run(MsdJaxLM(config.model.path), tasks, ("choice",))
    assert np.abs(scores(found, "choice") - scores(initial, "choice")).max() > 1e-3


def test_bad_input_is_said_in_a_line(tmp_path, directory):
    (tmp_path / "7" / "state").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not the run's config"):
        MsdJaxLM(str(tmp_path / "7"))
    with pytest.raises(FileNotFoundError, match="neither a directory"):
        MsdJaxLM(str(tmp_path / "none"))


@pytest.mark.skipif(not SMOLLM2, reason="MSD_JAX_SMOLLM2 does not name a directory of SmolLM2")
def test_smollm2(tmp_path):
    tasks = write_tasks(tmp_path / "tasks", REAL, stop="\\n")
    require_same(command_line(tmp_path / "tasks", f"pretrained={SMOLLM2}"), run(hf(SMOLLM2), tasks))
