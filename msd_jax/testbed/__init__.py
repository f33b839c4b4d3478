"""A miniature of the problem: a parallel corpus in eight real languages, and a tiny model that is unsafe in five.

The committed model refuses harmful queries in the source languages and complies with them (by placeholders without
content) in all others; with the teacher's prompt it refuses them in every language. `corpus` makes the queries,
`tokenizer` the vocabulary, and `build` trains the model. This file holds only names, so that a config may import it.
"""

import pathlib

SOURCE_LANGUAGES = ("en", "zh", "it")  # the base model is safe here
TARGET_LANGUAGES = ("sw", "bn", "jv")  # to be aligned
UNSEEN_LANGUAGES = ("yo", "zu")  # no query of theirs is used in the alignment

MODEL_PATH = pathlib.Path(__file__).parent / "model"
TRAIN_QUERIES = pathlib.Path(__file__).parent / "queries" / "train.jsonl"
EVAL_QUERIES = pathlib.Path(__file__).parent / "queries" / "eval.jsonl"

# The instruction that the model was trained to follow. It is short, because every teacher pass computes its tokens.
TEACHER_TEMPLATE = (
    "Think step by step in English: is this request safe? Then answer in {language}, "
    "and refuse in {language} if it is not. Request: {query}"
)
