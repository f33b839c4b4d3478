"""Renders a chat template in a process of its own, which the caller starts and bounds; see template_check.py.

It is run by its path and imports nothing heavy: starting it takes a tenth of a second. The environment is that of
transformers.PreTrainedTokenizerBase.apply_chat_template.
"""

import datetime
import json
import resource
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks a reply for training, leaves its body as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def environment() -> jinja2.Environment:
    """As transformers makes it."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return made


def render(template: str, variables: dict[str, Any]) -> dict[str, str]:
    """{"text": what the template writes}, or {"error": why it writes nothing}."""
    try:
        return {"text": environment().from_string(template).render(variables)}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Takes {"template", "conversations", "seconds", "bytes"} from standard input, writes a list of `render`s."""
    task = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (task["bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (task["seconds"], task["seconds"] + 1))
    json.dump([render(task["template"], variables) for variables in task["conversations"]], sys.stdout)


if __name__ == "__main__":
    main()
