"""Prints what the student and the teacher are shown: `python -m msd_jax.prompts --config configs/NAME.py --n 3`."""

import unicodedata

import ml_collections
import rich.console
from absl import flags
from rich.text import Text

from msd_jax import cli
from msd_jax.data import sources
from msd_jax.data.prompts import check_templates, student_messages, teacher_messages
from msd_jax.data.records import language_name
from msd_jax.io import console
from msd_jax.models.tokenizer import load_tokenizer, render, token_ids


def show(config: ml_collections.ConfigDict, n: int, screen: rich.console.Console) -> None:
    """Prints both roles' prompts, with their lengths, of the first `n` records in each target language."""
    source, records = config.data.source_language, sources.load(config.data)
    tokenizer = load_tokenizer(config.model.path, config.prompts.chat_template)
    check_templates(tokenizer, config.prompts)
    for language in config.data.languages:
        for record in [record for record in records if language in record.texts][:n]:
            for role, messages in (
                ("student", student_messages(record, language, config.prompts)),
                ("teacher", teacher_messages(record, language, config.prompts, source, "[the teacher's analysis]")),
            ):
                variables, limit = (config.prompts[f"{role}_{key}"] for key in ("template_kwargs", "limit"))
                length = len(token_ids(tokenizer, messages, variables))
                over = f", over config.prompts.{role}_limit={limit}: dropped in training" if length > limit else ""
                title = f"{record.id}  {language_name(language)} ({language})  {role}: {length} tokens{over}"
                # As text, not as markup: data is shown, never obeyed.
                screen.print(Text(printable(title), style="bold"), soft_wrap=True)
                screen.print(Text(printable(render(tokenizer, messages, variables)) + "\n"), soft_wrap=True)


def printable(text: str) -> str:
    """`text` with its control and invisible formatting characters escaped, so that it cannot steer a terminal."""
    keep = "\n\t\u200c\u200d"  # joiners belong to the spelling in Bengali, Persian and others
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cf") and c not in keep else c
        for c in text
    )


def main(argv: list[str]) -> None:
    del argv
    with cli.clear_errors():
        show(cli.config(), cli.FLAGS.n, console.console)


if __name__ == "__main__":
    flags.DEFINE_integer("n", 3, "Number of records to show.", lower_bound=1)
    cli.run(main, alone=True)
