"""What a run computes from beside its config: hashes of files and of the queries as they are encoded."""

import hashlib
import pathlib
from collections.abc import Mapping

from msd_jax.data import batches
from msd_jax.io import checksums, ranges

# Of a Hugging Face directory: the weights, and whatever decides how they are run and how a text becomes token ids.
_FILES = (
    *("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "chat_template*", "vocab.*"),
    *("special_tokens_map.json", "added_tokens.json", "merges.txt"),
)


def of(directory: pathlib.Path, encoded: batches.Encoded) -> dict[str, str]:
    """{what the user knows it by: hash} of a model's files, by their content, and of the examples to train on."""
    files = sorted({path for pattern in _FILES for path in directory.glob(pattern) if path.is_file()})
    known = ranges.hashes(directory)  # by the object store that they are in
    whole = [path for path in files if path.name not in known]
    hashes = known | dict(zip((path.name for path in whole), checksums.of_unchanged(whole)))
    return {f"config.model.path: {path.name}": hashes[path.name] for path in files} | {
        "config.data.path: the queries, as they are encoded": _of_examples(encoded)
    }


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """A line for each entry that differs."""
    words = {(True, True): "has changed", (True, False): "is gone", (False, True): "is new"}
    return [
        f"{name} {words[name in old, name in new]}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _of_examples(encoded: batches.Encoded) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for example in encoded.examples():
        for part in (example.query_id.encode(), example.language.encode()):
            digest.update(len(part).to_bytes(4, "little") + part)
        for ids in (example.student_ids, example.teacher_ids, example.response_ids):
            if ids is not None:
                digest.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
    return digest.hexdigest()
