"""Chat templates that loop, take memory, fail or drop text: each is one line that names the file and the role."""

import resource

import pytest

from msd_jax.data import prompts
from msd_jax.errors import UserError
from msd_jax.models import pretrained, template_check
from msd_jax.models.tokenizer import load_tokenizer, render
from tests.conftest import CHATML, write_model
from tests.data.prompts_test import byte_tokenizer, prompts_config

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ALLOCATES = "{{ 'x' * 1000000000 }}"
DROPS_TEXT = (  # made for messages whose content is a list of parts
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPS_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"


def computed() -> float:
    """Processor seconds of this process and of those that it has waited for, however busy the machine is."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@pytest.mark.parametrize(
    "template, changes, message",
    [
        (LOOP, {}, r"the student: .*takes more than 2 seconds or 512 MB"),
        (ALLOCATES, {}, r"the student: .*it takes too much memory"),
        ("{{ 'x' * 9000000 }}", {}, r"it writes 9,000,000 characters"),
        ("{{ 1 // 0 }}", {}, r"the student: .*\['user'\] messages \(ZeroDivisionError"),
        ("{{ messages | length + 'x' }}", {}, r"TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {}, r"RecursionError"),
        ("{% for %}", {}, r"TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", {}, r"SecurityError"),
        (DROPS_TEXT, {}, r"the student: .*drops what the user says"),
        (DROPS_SYSTEM, {"teacher_system": "Be kind."}, r"the teacher: .*drops what the system says"),
        ("{{ messages[-1].content }}", {"cot": "generated"}, r"the teacher: .*drops what the user says"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML,
            {"teacher_system": "Be kind."},
            r"the teacher: .*\['system', 'user'\] messages \(TemplateError: No system role\)",
        ),
    ],
)
def test_a_bad_template_is_one_error(tmp_path, template, changes, message):
    tokenizer, begun = load_tokenizer(str(byte_tokenizer(tmp_path, template))), computed()
    with pytest.raises(UserError, match=message) as caught:
        prompts.check_templates(tokenizer, prompts_config(**changes))
    assert str(caught.value).startswith(f"{tmp_path}/chat_template.jinja: ") and "\n" not in str(caught.value)
    assert computed() - begun < 5  # two for the template, and what is around it


def test_a_model_whose_template_loops_does_not_load(tmp_path):
    directory = write_model(tmp_path / "model")
    (directory / "chat_template.jinja").write_text(LOOP)
    with pytest.raises(UserError, match=r"chat_template\.jinja: a conversation: .*takes more than 2 seconds"):
        pretrained.load(str(directory), dtype="float32", param_dtype="float32", remat="none")


def test_a_machine_that_is_too_busy_is_not_the_template_s_fault(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(str(byte_tokenizer(tmp_path, CHATML + "{# new #}")))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="this machine is too busy; run the same"):
        patch.setattr(template_check, "_START", 0.001 - template_check.SECONDS)
        prompts.check_templates(tokenizer, prompts_config())
    prompts.check_templates(tokenizer, prompts_config())


def test_a_failure_that_only_some_queries_see_is_an_error_too(tmp_path):
    template = CHATML + "{{ 1 // (0 if 'bomb' in messages[0].content else 1) }}"
    tokenizer = load_tokenizer(str(byte_tokenizer(tmp_path, template)))
    prompts.check_templates(tokenizer, prompts_config())
    with pytest.raises(UserError, match=r"chat_template\.jinja: .*ZeroDivisionError"):
        render(tokenizer, [{"role": "user", "content": "a bomb"}], {})


def test_it_renders_as_transformers_does(tmp_path):
    """What transformers adds to Jinja is there: its tags, filters, functions, variables and trimming of blanks."""
    template = (
        "{{ bos_token }}{% for m in messages %}\n    {% if loop.index > 9 %}{% break %}{% endif %}\n"
        "{{ m | tojson }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ tools is none }}"
        "{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}{{ dict(a=1) }}{{ strftime_now('%Y') }}{{ date }}"
    )
    tokenizer = load_tokenizer(str(byte_tokenizer(tmp_path, template)))
    messages = [{"role": "user", "content": "markerof0message"}]
    written = []
    original = template_check._drops

    def keep(messages, text):
        written.append(text)
        return original(messages, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_check, "_drops", keep)
        template_check.check(tokenizer, {"a": (messages, {"date": "now"})})
    assert written == [render(tokenizer, messages, {"date": "now"})]
