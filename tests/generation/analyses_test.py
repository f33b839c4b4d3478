"""The teacher's analyses: greedy, its own, written once, and part of its prompt from then on."""

import itertools
import json
import shutil
import types

import jax
import ml_collections
import numpy as np
import pytest
import tokenizers
import transformers
from msd_jax.configs import default

from msd_jax import settings
from msd_jax.data import prompts
from msd_jax.errors import UserError
from msd_jax.generation import analyses, rollout
from msd_jax.io import jsonl
from msd_jax.models import pretrained
from msd_jax.models.tokenizer import token_ids
from msd_jax.parallel import sharding
from msd_jax.training import loop, run
from tests.conftest import WORDS


@pytest.fixture
def config(model_dir, tmp_path):
    config = default.get_config()
    config.model.path, config.data.path = str(model_dir), str(tmp_path / "queries.jsonl")
    rng = np.random.default_rng(0)

    def text():
        return " ".join(rng.choice(WORDS, rng.integers(1, 6)))

    records = [{"id": str(i), "harmful": True, "texts": {"en": text(), "sw": text(), "bn": text()}} for i in range(21)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config.data.languages = ml_collections.ConfigDict({"sw": 1.0, "bn": 1.0})
    config.data.batch_size = 8
    config.prompts.cot, config.prompts.analysis_tokens = "generated", 7
    config.prompts.analysis_template, config.prompts.reply_template = "{query} ?", "answer in {language}"
    config.rollout.max_new_tokens = config.train.completions.kept = 4
    config.train.steps, config.train.checkpoints.every, config.train.completions.every = 2, 1, 1
    config.train.export = False
    return config


def test_each_is_written_once_and_stands_in_the_teachers_prompt(config, tmp_path, monkeypatch):
    frozen = ml_collections.FrozenConfigDict(config)
    ready = run.setup(frozen, tmp_path / "run")
    loop.train(ready)
    lines = jsonl.read(tmp_path / "run/analyses.jsonl")[1:]
    assert sorted(int(line["id"]) for line in lines) == list(range(21)) and {line["language"] for line in lines} == {
        "en"
    }
    tokenizer = ready.model.tokenizer
    texts = {line["id"]: tokenizer.decode(line["tokens"], skip_special_tokens=True).strip() for line in lines}
    assert len(set(texts.values())) > 5
    entries = jsonl.read(tmp_path / "run/completions.jsonl")
    assert entries and all(texts[entry["id"]] in entry["teacher_prompt"] for entry in entries)
    assert not any(texts[entry["id"]] in entry["student_prompt"] for entry in entries if texts[entry["id"]])

    # Greedy, and the same without a batch around it.
    record = next(record for record in ready.records if texts[record.id])
    messages = prompts.analysis_messages(record, config.prompts, "en")
    ids = token_ids(tokenizer, messages, config.prompts.teacher_template_kwargs)[None]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = ready.model
    alone = pretrained.load(**config.model)
    greedy = rollout.Generator(alone.graphdef, mesh, rollout.Sampling(7, 0.0), model.stop_ids, model.pad_id)
    one = np.ones(1, np.uint32)
    arrays = (ids, np.array([ids.shape[1]], np.int32), one, one.astype(bool))
    written = greedy(alone.params(mesh), *arrays, jax.random.key(9))
    expected = next(line["tokens"] for line in lines if line["id"] == record.id)
    assert np.asarray(written.response_BxR)[0, : len(expected)].tolist() == expected

    # The same command again has nothing to write.
    monkeypatch.setattr(analyses, "_generate", lambda *_: pytest.fail("written twice"))
    before = (tmp_path / "run/completions.jsonl").read_bytes()
    again = run.setup(frozen, tmp_path / "run")
    loop.train(again)
    state, frozen_params = loop.initial_state(again)
    first, second = (next(iter(loop.with_analyses(one, frozen_params, state))).examples for one in (ready, again))
    assert [e.teacher_ids.tolist() for e in first] == [e.teacher_ids.tolist() for e in second]
    assert any(texts[example.query_id] in ready.model.tokenizer.decode(example.teacher_ids) for example in first)
    assert (tmp_path / "run/completions.jsonl").read_bytes() == before


def test_a_teacher_that_changes_is_refused(config, tmp_path):
    config.teacher.kind = "ema"
    with pytest.raises(ValueError, match=r"config.prompts.cot='generated' with config.teacher.kind='ema'"):
        settings.check(config)


def thinking(model_dir, directory) -> str:
    """The model, with a template in the manner of Qwen3's and the tags as tokens, one of which is special."""
    shutil.copytree(model_dir, directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", special=True), tokenizers.AddedToken("</think>")])
    off = "{% if not enable_thinking %} <think> </think>{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(" assistant{%", f" assistant{off}{{%")
    assert off in tokenizer.chat_template
    tokenizer.save_pretrained(directory)
    return str(directory)


THOUGHTS = {
    "<think> how make </think> yes a cup": "how make",
    "<think> how make a bomb": "how make a bomb",  # cut
    "no </think>": "no",
    "no": "no",
    "<think> </think> yes": "",
}


def test_its_thoughts_are_the_analysis(config, model_dir, tmp_path, monkeypatch):
    config.model.path = thinking(model_dir, tmp_path / "model")
    config.prompts.analysis_is_thinking = True
    ready = run.setup(ml_collections.FrozenConfigDict(config), tmp_path / "run")
    tokenizer, asked = ready.model.tokenizer, {}

    def pool(_graphdef, _mesh, _sampling, stop_ids, *_, **__):
        asked["stops"] = stop_ids

        def write(_params, rows):
            for i, text in zip(range(len(rows)), itertools.cycle(THOUGHTS)):
                yield types.SimpleNamespace(index=i, tokens=[*tokenizer(text).input_ids, 3], stopped=True)

        return write

    monkeypatch.setattr(analyses.refill, "PoolGenerator", pool)
    store = run.teacher_store(ready.config, ready.model, tmp_path / "analyses.jsonl")
    found = analyses.write(ready.records, ready.config, ready.model, ready.mesh, dict, store)
    assert {tokenizer.decode(store[i, "en"][0][:-1]): text for i, text in found.items()} == THOUGHTS and len(
        found
    ) == 21
    assert set(asked["stops"]) == {*ready.model.stop_ids, tokenizer.convert_tokens_to_ids("</think>")}

    asking = [
        {"role": "user", "content": "a"}
    ]  # the roles' prompts end in thoughts that are over, the analysis's do not
    on = prompts.analysis_variables(config.prompts)
    assert tokenizer.decode(token_ids(tokenizer, asking, config.prompts.teacher_template_kwargs)).endswith("</think>")
    assert "</think>" not in tokenizer.decode(token_ids(tokenizer, asking, on))
    for example in run.encode(ready.config, ready.model, ready.records, found).examples():
        teacher = tokenizer.decode(example.teacher_ids)
        assert f"assistant {found[example.query_id]} ".replace("  ", " ") in teacher and teacher.count("<think>") == 1


def test_a_model_that_does_not_think_is_refused(config, tmp_path):
    config.prompts.analysis_is_thinking = True
    with pytest.raises(UserError, match=r"analysis_is_thinking=True: the chat template of \S+ marks no reasoning"):
        run.setup(ml_collections.FrozenConfigDict(config), tmp_path / "run")
