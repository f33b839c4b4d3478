import io
import json
import os
import pathlib
import runpy
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
import rich.console
import tokenizers
import transformers

from msd_jax.data import files, prompts
from msd_jax.data.records import Query
from msd_jax.models.tokenizer import describe_bos, load_tokenizer, render, stop_token_ids, token_ids
from msd_jax.prompts import show
from tests.conftest import REPOSITORY

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUERY = Query("q1", False, "", {"en": "How do I bake {bread}?", "sw": "Ninaokaje {language} mkate?"})


def byte_tokenizer(directory: pathlib.Path, chat_template: str | None = CHATML, **special) -> pathlib.Path:
    """Writes a tokenizer with one token a byte, which puts <s> before every text, and whose pad is its eos."""
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(names + alphabet)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"} | special
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, additional_special_tokens=["<|im_start|>", "<|im_end|>"], **special
    )
    fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return directory


def prompts_config(**changes) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "student_limit": 64,
            "chat_template": "",
            "require_same_ending": True,
            "teacher_limit": 256,
            "cot": "instruction",
            "analysis_is_thinking": False,
            "plain_template": "{language}: {query}",
            "analysis_template": "Is it safe? {query}",
            "reply_template": "Reply in {language}.",
            "teacher_template": "Think in English, answer in {language}: {query}",
            "student_system": "",
            "teacher_system": "",
            "student_template_kwargs": {"enable_thinking": False},
            "teacher_template_kwargs": {"enable_thinking": False},
        }
        | changes
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def test_fill_template_takes_one_pass():
    template = "{{{query}}} {{language}} {language} {query}"
    query = "{language} {query} { }} {0} {{"
    assert prompts.fill_template(template, query, "{query}") == f"{{{query}}} {{language}} {{query}} {query}"


@pytest.mark.parametrize(
    "template, message",
    [
        ("Answer in {language}.", r"has no \{query\}"),
        ("", r"has no \{query\}"),
        ("{{query}}", r"has no \{query\}"),
        ("{query} {lang}", r"unknown placeholder \{lang\}"),
        ("{query} {}", r"unknown placeholder \{\}"),
        ("{query} {target}", r"unknown placeholder \{target\}; it may have \{query\}, \{language\}, \{target_query\}"),
        ("{target_query} {language}", r"has no \{query\}"),
        ("{query} {query.__class__}", r"unknown placeholder \{query\.__class__\}"),
        ("{query} {language!r}", r"unknown placeholder"),
        ("{query:>9}", r"unknown placeholder"),
        ("{query} {language", r"expected '}'"),
        ("{query} }", r"Single '}'"),
    ],
)
def test_bad_templates(template, message):
    with pytest.raises(ValueError, match=r"^config\.prompts\.teacher_template.*" + message):
        prompts.fill_template(template, "q", "Swahili")


@pytest.mark.parametrize("cot", prompts.COT)
def test_the_teacher_may_see_the_query_in_the_target_language_too(tokenizer, cot):
    """As text, whatever it looks like; in two languages it is two prompts."""
    record = Query("q1", True, "", {"en": "E {language}", "sw": "S {query}", "bn": "B"})
    shows = "{query} | {target_query} | {language}"
    config = prompts_config(cot=cot, teacher_template=shows, plain_template=shows, reply_template=shows)
    for language, expected in (("sw", "E {language} | S {query} | Swahili"), ("bn", "E {language} | B | Bangla")):
        messages = prompts.teacher_messages(record, language, config, "en", "An analysis.")
        assert messages[-1]["content"] == expected
        ids = prompts.encode(record, language, tokenizer, config, "en", "An analysis.").teacher_ids
        assert expected in tokenizer.decode(ids)
    prompts.check_templates(tokenizer, config)


def test_an_analysis_is_of_a_query_in_any_language(tokenizer):
    for placeholder in ("target_query", "language"):
        config = prompts_config(cot="generated", analysis_template=f"{{query}} {{{placeholder}}}")
        with pytest.raises(
            ValueError, match=rf"analysis_template: unknown placeholder \{{{placeholder}\}}; it may have"
        ):
            prompts.encode(QUERY, "sw", tokenizer, config, "en", "It is safe.")


def test_the_default_template_names_language_and_query():
    text = prompts.fill_template(prompts.DEFAULT_TEACHER_TEMPLATE, "QUERY", "Javanese")
    assert text.count("QUERY") == 1 and text.count("Javanese") == 3 and "think step by step in English" in text


def test_messages_of_both_roles():
    config = prompts_config()
    student = [{"role": "user", "content": "Ninaokaje {language} mkate?"}]
    teacher = [{"role": "user", "content": "Think in English, answer in Swahili: How do I bake {bread}?"}]
    assert prompts.student_messages(QUERY, "sw", config) == student
    assert prompts.teacher_messages(QUERY, "sw", config, "en") == teacher
    config.student_system, config.teacher_system = "S", "T"
    assert prompts.student_messages(QUERY, "sw", config) == [{"role": "system", "content": "S"}, *student]
    assert prompts.teacher_messages(QUERY, "sw", config, "en") == [{"role": "system", "content": "T"}, *teacher]


def test_ids_are_those_of_the_rendered_prompt_with_one_bos(tmp_path):
    tokenizer = load_tokenizer(str(byte_tokenizer(tmp_path, "{{ bos_token }}" + CHATML)))
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # it adds one to any text
    example = prompts.encode(QUERY, "sw", tokenizer, prompts_config(teacher_system="Be kind."), "en")
    student = "<s><|im_start|>user\nNinaokaje {language} mkate?<|im_end|>\n<|im_start|>assistant\n"
    teacher = (
        "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nThink in English, answer in Swahili: "
        "How do I bake {bread}?<|im_end|>\n<|im_start|>assistant\n"
    )
    for ids, text in ((example.student_ids, student), (example.teacher_ids, teacher)):
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert (ids == tokenizer.bos_token_id).sum() == 1
    assert render(tokenizer, prompts.student_messages(QUERY, "sw", prompts_config()), {}) == student
    assert (example.query_id, example.language, example.harmful) == ("q1", "sw", False)


def test_long_prompts_are_not_cut(tokenizer):
    query = Query("q", None, "", {"en": "x" * 5000, "sw": "y" * 6000})
    example = prompts.encode(query, "sw", tokenizer, prompts_config(), "en")
    assert len(example.student_ids) > 6000 and len(example.teacher_ids) > 5000


def test_template_kwargs_are_each_roles_own(tmp_path):
    template = CHATML + "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    tokenizer = load_tokenizer(str(byte_tokenizer(tmp_path, template)))
    config = prompts_config(student_template_kwargs={"enable_thinking": True}, teacher_template_kwargs={})
    example = prompts.encode(QUERY, "sw", tokenizer, config, "en")
    assert tokenizer.decode(example.student_ids).endswith("assistant\nTrue")
    assert tokenizer.decode(example.teacher_ids).endswith("assistant\n")
    default = prompts.encode(QUERY, "sw", tokenizer, prompts_config(), "en")
    assert all(tokenizer.decode(ids).endswith("False") for ids in (default.student_ids, default.teacher_ids))


@pytest.mark.parametrize("variables", [{"truncation": True}, {"max_length": 5}, {"tokenize": False}, {"tools": []}])
def test_template_kwargs_are_variables_alone(tokenizer, variables):
    with pytest.raises(ValueError, match=f"'{next(iter(variables))}' in template_kwargs is not a variable"):
        token_ids(tokenizer, [{"role": "user", "content": "x" * 50}], variables)


def test_a_tokenizer_without_chat_template(tmp_path):
    tokenizer = load_tokenizer(str(byte_tokenizer(tmp_path, None)))
    with pytest.raises(ValueError, match=r"no chat template, .*--config\.prompts\.chat_template=FILE"):
        prompts.student_ids(QUERY, "sw", tokenizer, prompts_config())


THINKING = (
    CHATML + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}"
)


def test_roles_whose_prompts_end_differently_are_refused(tmp_path):
    """One thinks and the other does not: the first token of the response means different things to them."""
    tokenizer = load_tokenizer(str(byte_tokenizer(tmp_path, THINKING)))
    prompts.check_templates(tokenizer, prompts_config(teacher_system="Be kind.", cot="generated"))
    on = {"enable_thinking": True}
    both = prompts_config(student_template_kwargs=on, teacher_template_kwargs=on)
    assert set(prompts.check_templates(tokenizer, both).values()) == {"<|im_end|>\n<|im_start|>assistant\n"}
    one = prompts_config(teacher_template_kwargs=on)
    with pytest.raises(ValueError, match=r"the student's in '.*</think>.n.n', the teacher's in .*require_same_ending"):
        prompts.check_templates(tokenizer, one)
    prompts.check_templates(tokenizer, one, ("student",))
    one.require_same_ending = False
    prompts.check_templates(tokenizer, one)


@pytest.mark.parametrize(
    "template, told", [(CHATML, True), ("{{ bos_token }}" + CHATML, False), ("<s>\n" + CHATML, False)]
)
def test_a_template_without_the_bos_of_other_texts_is_told(tmp_path, template, told):
    tokenizer = load_tokenizer(str(byte_tokenizer(tmp_path, template)))
    lines = describe_bos(tokenizer)
    assert len(lines) == told and all("begins prompts without <s>" in line for line in lines)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.ByteLevel()  # it puts nothing before texts
    assert not describe_bos(tokenizer)


def test_a_template_that_writes_bos_twice_is_refused(tmp_path):
    tokenizer = load_tokenizer(str(byte_tokenizer(tmp_path, "<s>{{ bos_token }}" + CHATML)))
    with pytest.raises(ValueError, match=r"chat_template\.jinja: the chat template begins prompts with <s> twice"):
        describe_bos(tokenizer)


def test_a_chat_template_that_refuses_system_messages(tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML
    tokenizer = load_tokenizer(str(byte_tokenizer(tmp_path, template)))
    prompts.student_ids(QUERY, "sw", tokenizer, prompts_config())
    with pytest.raises(ValueError, match=r"does not take \['system', 'user'\].*No system role.*config\.prompts"):
        prompts.student_ids(QUERY, "sw", tokenizer, prompts_config(student_system="Be kind."))


def test_chat_templates_are_sandboxed(tmp_path):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}" + CHATML
    tokenizer = load_tokenizer(str(byte_tokenizer(tmp_path, template)))
    with pytest.raises(ValueError, match=r"chat template.*unsafe"):
        prompts.student_ids(QUERY, "sw", tokenizer, prompts_config())


def test_load_tokenizer_fails_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"config\.model\.path is empty"):
        load_tokenizer("")
    for path in (str(tmp_path / "absent"), "./absent", "absent"):
        with pytest.raises(FileNotFoundError, match=r"absent.*is neither a directory nor a hub id"):
            load_tokenizer(path)
    with pytest.raises(FileNotFoundError, match=r"'owner/absent' is not a directory here, and the hub"):
        load_tokenizer("owner/absent")
    byte_tokenizer(tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "empty").mkdir()
    for name in ("broken", "empty"):
        with pytest.raises(
            ValueError, match=f"{name}: the tokenizer does not load .*it needs tokenizer.json"
        ) as caught:
            load_tokenizer(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_code_of_a_model_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the answer of a careless user
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('was_run', 'w')\nclass Evil: pass\n")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="the tokenizer does not load"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "was_run").exists()


EOS, IM_START, IM_END = 1, 2, 3


@pytest.mark.parametrize(
    "template, generation_config, expected",
    [
        pytest.param(CHATML, None, {EOS, IM_END}, id="end of turn is not eos"),
        pytest.param(CHATML, {"eos_token_id": 77}, {EOS, IM_END, 77}, id="one of generation_config"),
        pytest.param(CHATML, {"eos_token_id": [EOS, 78, 77]}, {EOS, IM_END, 77, 78}, id="a list in generation_config"),
        pytest.param(CHATML, {"eos_token_id": None}, {EOS, IM_END}, id="null in generation_config"),
        pytest.param(CHATML, {"temperature": 0.1}, {EOS, IM_END}, id="nothing in generation_config"),
        pytest.param(
            "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ eos_token }}{% endfor %}", None, {EOS}, id="eos"
        ),
        pytest.param(
            "{% for m in messages %}{{ m.role }}: {{ m.content }} <|im_end|>{% endfor %}",
            None,
            {EOS, IM_END},
            id="a space before the end of turn",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None, {EOS}, id="turns end in text"
        ),
        pytest.param(
            "{% for m in messages %}{{ m.content }}\nend <|im_start|>{% endfor %}", None, {EOS}, id="not right behind"
        ),
        pytest.param(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n<think>{{ m.content }}<|im_end|>{% endfor %}",
            None,
            {EOS, IM_END},
            id="thinking before the reply",
        ),
        pytest.param("{{ messages[0].content }}<|im_end|>", None, {EOS}, id="no reply in it"),
    ],
)
def test_stop_tokens(tmp_path, template, generation_config, expected):
    byte_tokenizer(tmp_path, template)
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    stops = stop_token_ids(load_tokenizer(str(tmp_path)), str(tmp_path))
    assert stops == tuple(sorted(expected))


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [1, true]}'])
def test_a_broken_generation_config_is_named(tmp_path, tokenizer, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json.*(JSON object|must be a token id)"):
        stop_token_ids(tokenizer, str(tmp_path))


def test_no_stop_token_at_all_is_an_error(tmp_path, tokenizer):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    endless = load_tokenizer(str(byte_tokenizer(tmp_path, template, eos_token=None, pad_token=None)))
    with pytest.raises(ValueError, match="no token ends a reply"):
        stop_token_ids(endless, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="owner/name is not a directory"):
        stop_token_ids(tokenizer, "owner/name")


def config_file(tmp_path: pathlib.Path, records, **changes) -> tuple[pathlib.Path, ml_collections.ConfigDict]:
    """A config with these records and a tokenizer, as a file and as it loads."""
    files.write_jsonl(tmp_path / "queries.jsonl", records)
    path = tmp_path / "config.py"
    path.write_text(
        "import ml_collections\nfrom msd_jax.configs import default\n\n\ndef get_config():\n"
        "    config = default.get_config()\n"
        f"    config.model.path = {str(byte_tokenizer(tmp_path / 'tokenizer'))!r}\n"
        f"    config.data.path = {str(tmp_path / 'queries.jsonl')!r}\n"
        '    config.data.languages = ml_collections.ConfigDict({"sw": 1.0, "jv": 0.5})\n'
        f"    config.prompts.update({prompts_config(**changes).to_dict()!r})\n"
        "    return config\n"
    )
    return path, runpy.run_path(str(path))["get_config"]()


RECORDS = [
    Query(f"r{i}", None, "", {"en": f"Question {i}?", "sw": f"Swali {i}?", "jv": f"Pitakon {i}?"}) for i in range(4)
]


def test_show_obeys_nothing_that_stands_in_the_data(tmp_path):
    hostile = "[bold]x[/bold] [/] \x1b[31mred\x1b]0;title\x07 \x9b1m \u202eabc \r\b \u0985\u09cd\u200d\u09af"
    record = Query("id\x1b[2J", None, "", {"en": "x", "sw": hostile, "jv": "y" * 100})
    _, config = config_file(tmp_path, [record])
    written = io.StringIO()
    console = rich.console.Console(file=written, force_terminal=True, width=40, color_system=None)
    show(config, 1, console)
    output = written.getvalue()
    assert not any(c in output for c in "\x1b\x07\x9b\u202e\r\b")
    shown = "[bold]x[/bold] [/] ␛[31mred␛]0;title␇ [U+009B]1m [U+202E]abc ␍␈ \u0985\u09cd\u200d\u09af"
    assert shown in output
    assert "y" * 100 in output  # not folded at the console's width
    assert "id␛[2J  Javanese (jv)  student: 119 tokens, over config.prompts.student_limit=64: dropped" in output


ROLES = ("student", "teacher")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "msd_jax.prompts", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_the_command_shows_both_prompts_of_n_records_in_each_language(tmp_path):
    path, _ = config_file(tmp_path, RECORDS)
    result = run(f"--config={path}", "--n=2", "--config.prompts.teacher_system=Be kind.")
    assert result.returncode == 0, result.stderr
    for i in range(4):
        for query, language in (("Swali", "Swahili (sw)"), ("Pitakon", "Javanese (jv)")):
            assert result.stdout.count(f"<|im_start|>user\n{query} {i}?<|im_end|>") == (i < 2)
            assert result.stdout.count(f"r{i}  {language}  student: ") == (i < 2)
            assert result.stdout.count(f"answer in {language[:-5]}: Question {i}?<|im_end|>") == (i < 2)
    assert result.stdout.count("system\nBe kind.<|im_end|>") == 4  # the teacher's alone


def test_the_command_shows_records_in_the_languages_that_they_have(tmp_path):
    ragged = [Query("en-jv", None, "", {"en": "x?", "jv": "y?"}), Query("en", None, "", {"en": "x?"}), *RECORDS]
    path, _ = config_file(tmp_path, ragged)
    result = run(f"--config={path}", "--n=1")
    titles = [line.partition(":")[0] for line in result.stdout.splitlines() if line.endswith(" tokens")]
    assert titles == [
        f"{id}  {name}  {r}" for id, name in (("en-jv", "Javanese (jv)"), ("r0", "Swahili (sw)")) for r in ROLES
    ]


def test_the_command_ends_in_one_line_for_a_mistake(tmp_path):
    path, _ = config_file(tmp_path, RECORDS)
    result = run(f"--config={path}", "--config.data.languages.sw=0.0", "--config.data.source_language=yo")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: ") and "no record has a text in yo" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_config_is_cheap_to_import():
    code = "import sys; from msd_jax.configs import default; print([m for m in sys.modules if '.' not in m])"
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert "msd_jax" in modules
    assert not any(f"'{heavy}'" in modules for heavy in ("transformers", "tokenizers", "langcodes", "rich", "jinja2"))


def test_thinking_is_a_turn_of_the_teachers_or_nothing(tokenizer):
    record = Query("1", True, "", {"en": "make {this}?", "sw": "fanya?"})
    plain = prompts.teacher_messages(record, "sw", prompts_config(cot="none"), "en")
    assert plain == [{"role": "user", "content": "Swahili: make {this}?"}]
    generated = prompts_config(cot="generated", teacher_system="Be good.")
    asked = prompts.analysis_messages(record, generated, "en")
    assert asked == [
        {"role": "system", "content": "Be good."},
        {"role": "user", "content": "Is it safe? make {this}?"},
    ]
    assert prompts.teacher_messages(record, "sw", generated, "en", "It is {not}.") == [
        *asked,
        {"role": "assistant", "content": "It is {not}."},
        {"role": "user", "content": "Reply in Swahili."},
    ]
    example = prompts.encode(record, "sw", tokenizer, generated, "en", "It is {not}.")
    assert "It is {not}." in tokenizer.decode(example.teacher_ids)
    for changes, message in (
        ({"analysis_template": "Is it safe?"}, r"prompts.analysis_template has no \{query\}"),
        ({"reply_template": "Reply."}, r"prompts.reply_template has no \{language\}"),
    ):
        with pytest.raises(ValueError, match=message):
            prompts.encode(record, "sw", tokenizer, prompts_config(cot="generated", **changes), "en")
