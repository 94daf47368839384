"""Upload of draft folders to the Hugging Face Hub. Errors are detected before any work, and local files are kept."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from specbench.checkpoints.draft_folder import HUB_ID
from specbench.files.hub_datasets import answered


def push(folder: str | Path, repository: str, private: bool = False, replace: bool = False) -> str:
    """Upload a folder to the model `repository` on the Hub (created if necessary); returns its address.

    Errors: ValueError without a token, for a repository that has a draft already unless `replace`, or with the message
    of the Hub. The folder is only read.
    """
    require_vacant(repository, replace)
    api = HfApi()
    try:
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a SpecBench draft")
    except (OSError, ValueError, HTTPError) as error:
        raise _refused(repository, error) from error
    return address


def require_vacant(repository: str, replace: bool = False) -> None:
    """Errors: ValueError when a push to `repository` would fail or bury a draft: no token or a refused one, no hub in
    reach, or a repository with a config.json while `replace` is false. An empty repository is as good as none.
    """
    require_token(repository)
    try:
        files = [file.rfilename for file in HfApi().model_info(repository).siblings or ()]
    except (OSError, ValueError, HTTPError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 404:
            return
        raise _refused(repository, error) from error
    if "config.json" in files and not replace:
        raise ValueError(
            f"push={repository}: this repository holds a draft already: choose another name, or force=true to add a "
            "commit that replaces its files"
        )


def _refused(repository: str, error: Exception) -> ValueError:
    if isinstance(error, (HfHubHTTPError, ValueError)):
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        hint = "; does the token (HF_TOKEN) have write access there?" if status in (401, 403) else ""
        return ValueError(f"push={repository}: the hub refused it ({answered(error)}){hint}")
    return ValueError(f"push={repository}: the hub cannot be reached ({answered(error)}); try again later")


def require_token(repository: str) -> None:
    """Errors: ValueError when `repository` is not a hub id or when there is no token to write to it."""
    if not HUB_ID.fullmatch(repository):
        raise ValueError(f"push={repository}: give a hub id of the form OWNER/NAME")
    if get_token() is None:
        raise ValueError(f"push={repository}: no Hugging Face token here; set HF_TOKEN or run `hf auth login`")
