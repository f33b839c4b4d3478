"""Text files that other programs wrote."""

import codecs
import pathlib

from msd_jax.errors import UserError


def read_text(path: pathlib.Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark; line ends stay as they are.

    Raises:
      UserError: the bytes are neither; the message names the line and the byte.
    """
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # what Excel saves as "Unicode Text"
        encoding, mark = "utf-16", ""
    else:
        encoding, mark = "utf-8", "\ufeff"
    try:
        return raw.decode(encoding).removeprefix(mark)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} at offset {error.start} is not {encoding.upper()}; "
            "save the file as UTF-8"
        ) from None
