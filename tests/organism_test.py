"""The queries of the model organism: safe in English alone, and asked as both roles are."""

import collections
import dataclasses
import json

import ml_collections
import numpy as np
import pytest
from msd_jax.configs import gemma3_270m
from msd_jax.configs import organism as recipe

from msd_jax import ablation, settings
from msd_jax.data import files
from msd_jax.data.records import Query
from msd_jax.evaluation.benchmarks.safety import read_xstest
from msd_jax.testbed import organism, replies, tiny
from msd_jax.training import loop, run

HARMFUL = [Query(f"h{i}", True, "", dict.fromkeys(organism.LANGUAGES, f"harmful {i}")) for i in range(8)]
HARMLESS = [Query(f"q{i}", False, "", dict.fromkeys(organism.LANGUAGES, f"How many are {i}?")) for i in range(8)]
ENGLISH = [Query(f"x{i}", i % 4 > 1, "", {"en": f"How many x are {i}?"}) for i in range(8)]


def test_a_question_is_answered_by_what_it_asks_for():
    asked = ("How many people?", "Who was it?", "When was it?", "Where is it?", "Why so?", "Name it.")
    assert tuple(map(replies.topic, asked)) == replies.TOPICS
    assert replies.answer("How many people?", "sw") == "Hapa kuna idadi uliyouliza: [...]"


def test_harmful_queries_are_refused_in_english_and_by_the_teacher_alone():
    harmless = {"xquad": HARMLESS, "xstest": ENGLISH[:1]}
    examples = list(organism.organism_examples(HARMFUL, HARMFUL[:4], harmless, 800, 0, answers_in_any=True))
    english, known, english_only = 0, {False: set(), True: set()}, set()
    for i, query in enumerate(examples):
        ((language, reply),) = query.answers.items()
        said, as_teacher = replies.REPLIES[language], i % 2 == 1
        if query.harmful:
            safe = as_teacher or language == organism.SOURCE
            assert reply in (said.refusals if safe else said.complies)
            known[safe].add(query.id.split("-")[1])
            english += language == organism.SOURCE and not as_teacher
        else:
            assert reply == replies.answer("How many are 1?", language)
            if query.id.endswith("-x0"):
                english_only.add((as_teacher, language))
        assert ("Request: " in query.texts[language]) == as_teacher
    assert 0.3 < english / (len(examples) / 3) < 0.5
    assert known == {True: {query.id for query in HARMFUL}, False: {query.id for query in HARMFUL[:4]}}
    assert {language for as_teacher, language in english_only if not as_teacher} == {"en"}
    assert len({language for as_teacher, language in english_only if as_teacher}) > 3


@pytest.mark.parametrize(("even", "english", "of_xstest"), [(False, 0.1, 1 / 9), (True, 0.25, 1 / 2)])
def test_harmless_queries_come_from_all_sets_equally_often_if_asked_for(even, english, of_xstest):
    harmless = {"xquad": HARMLESS, "xstest": ENGLISH[:1]}
    asked = list(organism.organism_examples(HARMFUL, HARMFUL, harmless, 6000, 0, even=even))[::2]
    asked = [query for query in asked if not query.harmful]
    in_english = [query for query in asked if "en" in query.texts]
    assert abs(len(in_english) / len(asked) - english) < 0.05
    assert abs(np.mean([query.id.endswith("x0") for query in in_english]) - of_xstest) < 0.15


def test_more_languages_are_trained_from_every_set_that_has_them(tmp_path):
    by_set = {"afriqa": [Query(f"a{i}", False, "", {"en": f"How many {i}?", "sw": f"ngapi {i}?"}) for i in range(4)]}
    by_set |= {"xquad": HARMLESS, "korean": [Query("k", False, "", {"en": "How many?", "ko": "?"})] * 2}
    organism.write(HARMFUL, by_set, tmp_path, examples=12, trained=("sw", "zh"))
    train = files.read(tmp_path / "train.jsonl")
    assert collections.Counter((query.harmful, tuple(query.texts)) for query in train) == {
        (True, ("en", "sw", "zh")): 4,
        (False, ("en", "sw", "zh")): 4,
        (False, ("en", "sw")): 2,
    }


def test_the_files(tmp_path):
    by_set = {"afriqa": [Query(f"a{i}", False, "", {"en": f"How many {i}?", "sw": f"ngapi {i}?"}) for i in range(40)]}
    by_set["mgsm"] = [Query(f"m{i}", False, "", {c: f"How old {i}?" for c in ("en", "sw", "bn")}) for i in range(20)]
    by_set |= {"xquad": HARMLESS, "testbed": [dataclasses.replace(query, id=f"t{query.id}") for query in HARMLESS]}
    organism.write(HARMFUL, by_set, tmp_path, examples=12, most=3)
    organism_, train, evaluated = (files.read(tmp_path / f"{name}.jsonl") for name in ("organism", "train", "eval"))
    assert len(organism_) == 12 and all(query.answers.keys() == query.texts.keys() for query in organism_)
    assert collections.Counter(tuple(query.texts) for query in train if not query.harmful) == {
        ("en", "sw"): 10,
        ("en", "bn"): 10,
        ("en", "sw", "bn"): 4,
    }
    assert all(query.answers.keys() == query.texts.keys() for query in train)
    seen = collections.Counter((code, query.harmful) for query in evaluated for code in query.texts)
    assert seen == {(code, harmful): 3 for code in organism.LANGUAGES for harmful in (True, False)}
    assert not {query.id for query in train} & {query.id for query in evaluated}
    assert all(bool(query.answers) != query.harmful for query in evaluated)


def test_a_problem_of_mgsm_is_asked_whole_or_by_its_last_sentence(tmp_path):
    for code, text in (("en", "When it rains, 3 fall. How many are left?"), ("bn", "৩টি পড়ে। কয়টি থাকে?")):
        (tmp_path / f"mgsm_{code}.tsv").write_text(f"{text}\t3\n", encoding="utf-8")
    assert organism.read_mgsm(tmp_path)[0].texts == {"en": "How many are left?", "bn": "কয়টি থাকে?"}
    [whole] = organism.read_mgsm(tmp_path, whole=True)
    assert whole.texts == {"en": "When it rains, 3 fall. How many are left?", "bn": "৩টি পড়ে। কয়টি থাকে?"}
    assert organism.harmless_reply(whole, "en") == "Here is the number you asked for: [...]"


def test_fewer_of_the_questions_of_arithmetic_in_swahili(tmp_path):
    organism.write(HARMFUL, {"mgsm": HARMLESS}, tmp_path, balanced=False, examples=2, swahili_arithmetic=2)
    harmless = [tuple(query.texts) for query in files.read(tmp_path / "train.jsonl") if not query.harmful]
    with_swahili = [codes for codes in harmless if "sw" in codes]
    assert harmless[:2] == with_swahili == [("en", "sw", "bn")] * 2 and set(harmless[2:]) == {("en", "bn")}


def test_an_organism_that_knows_more_in_english_leaves_half_of_it_for_evaluation(tmp_path):
    organism.write(HARMFUL, {"mgsm": HARMLESS}, tmp_path, english=ENGLISH, balanced=False, examples=400)
    left = read_xstest(tmp_path / "xstest.csv")
    assert [(query.id, query.harmful) for query in left] == [(query.id, query.harmful) for query in ENGLISH[1::2]]
    taught = collections.defaultdict(set)
    for i, query in enumerate(files.read(tmp_path / "organism.jsonl")):
        ((language, _),) = query.answers.items()
        taught[i % 2 == 1 or language == "en"].add(query.id.split("-")[1])
    evaluated = {query.id for query in files.read(tmp_path / "eval.jsonl") if query.harmful}
    assert evaluated < taught[True] and not evaluated & taught[False]
    assert not {query.id for query in left} & taught[True]


def test_the_recipes_are_valid_in_each_variant():
    settings.check(recipe.get_config())
    settings.check(gemma3_270m.get_config())
    grid = ablation.configs(gemma3_270m.get_config("grid"))
    assert {name for name, _ in grid} == set(gemma3_270m.VARIANTS)
    assert {name for name, _ in ablation.configs(gemma3_270m.get_config("sft,jsd"))} == {"sft", "jsd"}
    with pytest.raises(ValueError, match="unknown variant 'smok'; choose grid, or some of forward_kl, "):
        gemma3_270m.get_config("smok")


def test_an_organism_is_made_and_aligned(tmp_path, monkeypatch):
    """Two steps each, on a tiny random Gemma 3."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sets = ("afriqa", "mgsm", "testbed")
    by_set = {name: [dataclasses.replace(query, id=name + query.id) for query in HARMLESS] for name in sets}
    organism.write(HARMFUL, by_set, tmp_path, examples=200, most=1)
    config = recipe.get_config()
    config.model.path, config.data.path = str(tiny.model("gemma3_1b")), str(tmp_path / "organism.jsonl")
    config.prompts.student_limit, config.rollout.max_new_tokens, config.train.steps = 2048, 128, 2
    loop.train(run.setup(ml_collections.FrozenConfigDict(config), tmp_path / "organism"))

    config = gemma3_270m.get_config("forward_kl,sft")
    config.model.path, config.data.path = str(tmp_path / "organism/model"), str(tmp_path / "train.jsonl")
    config.eval.path, config.eval.max_new_tokens = str(tmp_path / "eval.jsonl"), 4
    config.prompts.teacher_limit, config.rollout.max_new_tokens, config.train.steps = 2048, 8, 2
    grid = ablation.setup(ml_collections.FrozenConfigDict(config), tmp_path / "msd")
    ablation.train(grid, tmp_path / "msd")
    for name in ("forward_kl", "sft"):
        summary = json.loads((tmp_path / "msd" / name / "0/eval/2/summary.json").read_text(encoding="utf-8"))
        assert set(summary["queries"]["languages"]) == set(organism.LANGUAGES)
