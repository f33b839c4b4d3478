"""Text files that other programs wrote."""

import pathlib

from msd_jax.errors import UserError


def read_text(path: pathlib.Path) -> str:
    """The text of a UTF-8 file without its byte order mark; line ends stay as they are.

    Raises:
      UserError: the bytes are not UTF-8; the message names the line and the byte.
    """
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8; save the file "
            "as UTF-8"
        ) from None
