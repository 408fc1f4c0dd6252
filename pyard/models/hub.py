"""Folders on the Hugging Face hub, or any server of its kind (HF_ENDPOINT)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyard.errors import InputError
from pyard.models.card import CARD_NAME, is_own_card


def local_folder(source: str | Path, **options: Any) -> Path:
    """A path as it is; the name of a hub repository, `owner/name`, as the folder of its files, downloaded once.

    Args:
        source: the path or the name.
        options: of huggingface_hub.snapshot_download, such as revision, token and cache_dir.

    Raises:
        InputError: a name that is neither a path nor a repository that can be read.
    """
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"], **options))
    except Exception as error:  # its own, httpx's and OSError share no base class
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{source}: neither an existing path nor a readable repository on the Hugging Face Hub ({reason})"
        ) from None


def push_folder(
    save: Callable[[Path, str], None],
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    message: str = "Upload a pyard model",
    create_pr: bool = False,
) -> str:
    """Upload a folder as one commit; the repository is made if there is none.

    Args:
        save: writes the folder, given its path and the repository's name.
        repo_id: `owner/name`; a README.md in it that pyard did not write stays.
        private: of a new repository; None: the owner's default.
        token: of the hub; None: that of `hf auth login`.
        message: of the commit.
        create_pr: open a pull request.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        save(folder, repo_id)
        if api.file_exists(repo_id, CARD_NAME) and not is_own_card(_text(api.hf_hub_download(repo_id, CARD_NAME))):
            (folder / CARD_NAME).unlink(missing_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, create_pr=create_pr)
        return str(commit.commit_url)


def _text(file: str) -> str:
    return Path(file).read_text(encoding="utf-8", errors="replace")
