"""Uploads to the Hugging Face hub; HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT are respected."""

import contextlib
import pathlib
import shlex
from collections.abc import Iterator

from msd_jax.errors import UserError


def claim(repository: str, private: bool) -> str:
    """Sees to it that the model repository is there, before anything long begins; returns its address.

    Args:
      repository: OWNER/NAME.
      private: whether a new one is; one that is there stays as it is.

    Raises:
      UserError: there is no token, or no right to write, or no hub.
    """
    import huggingface_hub  # here, for most commands do without

    if repository.count("/") != 1:
        raise UserError(f"--push_to_hub={repository}: write OWNER/NAME")
    with _errors(repository):
        api = huggingface_hub.HfApi()
        api.whoami()
        return str(api.create_repo(repository, private=private, exist_ok=True))


def upload(repository: str, directory: pathlib.Path, message: str) -> None:
    """One commit with all files of `directory`. Raises UserError; `directory` is whole, and can be uploaded again."""
    import huggingface_hub

    again = f"; {directory} is whole: hf upload {repository} {shlex.quote(str(directory))}"
    with _errors(repository, again):
        huggingface_hub.HfApi().upload_folder(
            repo_id=repository, folder_path=directory, commit_message=message, ignore_patterns=["*.lock"]
        )


@contextlib.contextmanager
def _errors(repository: str, remedy: str = "") -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalTokenNotFoundError:
        reason = "no token: run `hf auth login`, or set HF_TOKEN"
    except errors.OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set"
    except errors.HFValidationError as error:
        reason = str(error).splitlines()[0]
    except errors.HfHubHTTPError as error:  # its text quotes the request
        status = error.response.status_code
        reason = {401: "the hub refuses the token", 403: "the token has no right to write there"}.get(status, "")
        reason = f"{reason or 'the hub does not take it'} (HTTP {status})"
    except Exception as error:  # those of two HTTP libraries and of hf_xet
        reason = f"the hub cannot be reached ({type(error).__name__})"
    else:
        return
    raise UserError(f"--push_to_hub={repository}: {reason}{remedy}")
