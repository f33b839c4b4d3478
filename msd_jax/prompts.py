"""Counts the queries by language and label, and prints what each role is shown (`msd-jax prompts`).

msd-jax prompts --config NAME --n 3
"""

import ml_collections
import rich.console
from absl import flags
from rich.text import Text

from msd_jax import cli
from msd_jax.data import sources
from msd_jax.data.prompts import check_templates, shows_teacher, student_messages, teacher_messages
from msd_jax.data.records import Query, language_name
from msd_jax.io import console
from msd_jax.models.tokenizer import Messages, load_tokenizer, render, token_ids
from msd_jax.report.untrusted import visible


def show(config: ml_collections.ConfigDict, n: int, screen: rich.console.Console) -> None:
    """Prints how many records there are, and the roles' prompts, with their lengths, of `n` in each target language."""

    def line(text: str, style: str = "") -> None:
        screen.print(Text(visible(text), style=style), soft_wrap=True)  # not as markup: data is shown, never obeyed

    source, roles = config.data.source_language, ("student", "teacher") if shows_teacher(config) else ("student",)
    counts: list[str] = []  # printed once nothing can be wrong any more
    records = sources.load(config.data, counts.append, teacher="teacher" in roles)
    tokenizer = load_tokenizer(config.model.path, config.prompts.chat_template)
    check_templates(tokenizer, config.prompts)

    def messages_of(role: str, record: Query, language: str) -> Messages:
        if role == "student":
            return student_messages(record, language, config.prompts)
        return teacher_messages(record, language, config.prompts, source, "[the teacher's analysis]")

    for count in (*counts, ""):
        line(count)
    for language in config.data.languages:
        for record in [record for record in records if language in record.texts][:n]:
            for role in roles:
                messages = messages_of(role, record, language)
                variables, limit = (config.prompts[f"{role}_{key}"] for key in ("template_kwargs", "limit"))
                length = len(token_ids(tokenizer, messages, variables))
                over = f", over config.prompts.{role}_limit={limit}: dropped in training" if length > limit else ""
                line(f"{record.id}  {language_name(language)} ({language})  {role}: {length} tokens{over}", "bold")
                for shown in render(tokenizer, messages, variables).split("\n"):
                    line(shown)
                screen.print()


def main(argv: list[str]) -> None:
    del argv
    with cli.clear_errors():
        show(cli.config(), cli.FLAGS.n, console.console)


if __name__ == "__main__":
    flags.DEFINE_integer("n", 3, "Number of records to show.", lower_bound=1)
    cli.run(main, alone=True)
