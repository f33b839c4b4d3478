import pytest

from msd_jax.errors import UserError
from msd_jax.io.text import read_text

TEXT = "Kiswahili ቋንቋ 🙂\r\nza pili\u2028\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_other_programs_save_reads_the_same(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    assert read_text(tmp_path / "a.txt") == TEXT


def test_big_endian_and_empty(tmp_path):
    (tmp_path / "a.txt").write_bytes(("\ufeff" + TEXT).encode("utf-16-be"))
    assert read_text(tmp_path / "a.txt") == TEXT
    (tmp_path / "a.txt").write_bytes(b"")
    assert read_text(tmp_path / "a.txt") == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\xe9\n", "line 2: byte 0xe9 at offset 3 is not UTF-8; save"),
        (b"\xff\xfea\x00\n", "line 1: byte 0x0a at offset 4 is not UTF-16; save"),
    ],
)
def test_other_bytes_are_named(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt, {message}"):
        read_text(tmp_path / "a.txt")
