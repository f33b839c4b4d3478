"""A word-level tokenizer in Hugging Face's format: one token per word of the corpus, in Chinese per character.

`▁` marks a word that follows a space (or begins a text), so that decode(encode(text)) == text.
"""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# One token both ends a turn and pads a batch, on purpose: a mask made from token ids would drop the end of turn.
END = "<|end|>"
SPECIAL_TOKENS = (END, "<|system|>", "<|user|>", "<|assistant|>", "<unk>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def build(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the words of `texts`, sorted by code points."""
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
            pre_tokenizers.Split(tokenizers.Regex(r"▁(?=\p{Han})"), "removed"),
            pre_tokenizers.Split(tokenizers.Regex(r"\p{Han}"), "isolated"),
            # Hyphens and apostrophes stay inside their words: langkah-langkah, un'arma.
            pre_tokenizers.Split(tokenizers.Regex(r"▁?(?![-'])\p{P}"), "isolated"),
        ]
    )
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " ")])
    words = {word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))}
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *sorted(words)))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        unk_token="<unk>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
