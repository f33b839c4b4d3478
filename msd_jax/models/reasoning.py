"""How models mark the reasoning that precedes a reply."""

TAGS = (  # opening and closing
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
)
# Variables of chat templates that turn reasoning on: of Qwen3 and SmolLM3, and of Granite and DeepSeek.
ON = {"enable_thinking": True, "thinking": True}


def marked(template: object) -> bool:
    """Whether a chat template, or several by name, writes or reads the tags of reasoning."""
    return any(tag in str(template) for pair in TAGS for tag in pair)


def thoughts(text: str) -> str:
    """What a response holds before its reasoning ends; all of it where that never ends.

    The opening tag may be in the prompt.

    Example:
      >>> thoughts("<think>May I?</think> No.")
      'May I?'
    """
    for opening, closing in TAGS:
        text = text.partition(closing)[0]
        before, _, after = text.partition(opening)
        text = after if not before.strip() else text
    return text.strip()
