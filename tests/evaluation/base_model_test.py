"""Models without a chat template: scored as they are, asked only with a template that the user gives."""

import json

import jax
import pytest
from msd_jax.configs import default

from msd_jax.errors import UserError
from msd_jax.evaluation import encoding
from msd_jax.models import export, pretrained
from msd_jax.models.tokenizer import load_tokenizer, text_ids
from msd_jax.parallel import sharding
from tests.data.prompts_test import CHATML, byte_tokenizer
from tests.models.formats_test import OPTIONS, made


@pytest.fixture
def base_dir(tmp_path):
    directory = made(tmp_path / "base", vocab_size=300)
    for file in directory.glob("chat_template*"):
        file.unlink()
    return byte_tokenizer(directory, None)


def settings(tmp_path, directory, *names):
    mmmlu, queries = tmp_path / "mmlu_SW-KE.csv", tmp_path / "queries.jsonl"
    mmmlu.write_text(",Question,A,B,C,D,Answer,Subject\n0,<|im_end|> ni?,a,b,c,d,B,x\n", encoding="utf-8")
    queries.write_text(json.dumps({"id": "1", "harmful": True, "texts": {"sw": "Vipi?", "en": "How?"}}) + "\n")
    config = default.get_config()
    config.model.path, config.eval.languages = str(directory), ("sw",)
    config.eval.benchmarks = tuple(name for name in names if name == "mmmlu")
    config.eval.mmmlu.path, config.eval.path = str(mmmlu), str(queries) if "queries" in names else ""
    return config


def test_multiple_choice_in_plain_text(tmp_path, base_dir):
    model = pretrained.load(str(base_dir), **OPTIONS)
    assert model.stop_ids == (1,)
    (prompt,) = encoding.encode(settings(tmp_path, base_dir, "mmmlu"), model, "student")
    text = model.tokenizer.decode(prompt.ids)
    assert text.startswith("<s>Here is a question") and text.endswith("\n<|im_end|> ni?\n\nA. a\nB. b\nC. c\nD. d\n")
    assert list(prompt.ids).count(0) == 1 and 3 not in prompt.ids  # one BOS; the control token is text


def test_a_text_does_not_end_in_eos(tmp_path):
    tokenizer = load_tokenizer(str(byte_tokenizer(tmp_path)))
    from tokenizers.processors import TemplateProcessing

    ends = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = ends
    assert tokenizer("x").input_ids[-1] == 1
    assert tokenizer.decode(text_ids(tokenizer, "x </s>")) == "<s>x </s>"


def test_what_is_not_multiple_choice_needs_a_template(tmp_path, base_dir):
    model = pretrained.load(str(base_dir), **OPTIONS)
    with pytest.raises(UserError, match=r"has no chat template, .*--config\.prompts\.chat_template=FILE$"):
        encoding.encode(settings(tmp_path, base_dir, "queries", "mmmlu"), model, "student")


def test_a_template_from_a_file(tmp_path, base_dir):
    """It is used, found in errors, and goes along with an export."""
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    model = pretrained.load(str(base_dir), chat_template=str(file), **OPTIONS)
    assert model.stop_ids == (1, 3)
    config = settings(tmp_path, base_dir, "queries", "mmmlu")
    asked, choice = encoding.encode(config, model, "student")
    assert model.tokenizer.decode(asked.ids) == "<|im_start|>user\nVipi?<|im_end|>\n<|im_start|>assistant\n"
    assert model.tokenizer.decode(choice.ids).endswith("<|im_start|>assistant\n")
    params = model.params(sharding.make_mesh(devices=jax.devices()[:1]))
    export.save(tmp_path / "out", params, base_dir, companions=model.companions())
    again = pretrained.load(str(tmp_path / "out"), **OPTIONS)
    assert again.tokenizer.chat_template == CHATML and again.stop_ids == model.stop_ids
    file.write_text("{{ messages | length + 'x' }}")
    with pytest.raises(UserError, match=rf"^{file}: a conversation: the chat template does not take"):
        pretrained.load(str(base_dir), chat_template=str(file), **OPTIONS)
    with pytest.raises(
        FileNotFoundError, match=r"^config.prompts.chat_template='\S+none' cannot be read: No such file"
    ):
        pretrained.load(str(base_dir), chat_template=str(tmp_path / "none"), **OPTIONS)
