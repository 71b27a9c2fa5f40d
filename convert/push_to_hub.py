"""Uploading an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from convert.command import ConvertError

# Of an earlier upload with other shards: from_pretrained would load them in place of the new ones.
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def check_push(repository: str) -> None:
    """Checks what can be checked before any work is done, without the network.

    Raises:
        ConvertError: the name is malformed, or nobody is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConvertError(f"--push-to-hub {repository}: {_first_line(error)}") from None
    if get_token() is None:
        raise ConvertError(
            f"--push-to-hub {repository}: nobody is logged in; `hf auth login`, or set HF_TOKEN"
        )


def push_to_hub(folder: Path, repository: str, private: bool) -> str:
    """Uploads a folder as one commit; the repository is made if there is none. Files of the same
    name and all weights that were there are replaced.

    Args:
        folder: a complete Hugging Face folder.
        repository: NAME or OWNER/NAME.
        private: whether a new repository is private.

    Returns:
        the repository's address.

    Raises:
        ConvertError: it failed; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            delete_patterns=WEIGHTS,
            commit_message="Export from GPT-NeoX",
        )
    except Exception as error:  # of the HTTP library, which is another one in each major version
        raise ConvertError(
            f"{folder} is complete, but was not uploaded to {repository}: {_first_line(error)}; "
            f"`hf upload {repository} {folder}` tries again"
        ) from None
    return str(address)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
