"""Folders on the Hugging Face hub, or any server of its kind (HF_ENDPOINT)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyard.errors import InputError


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
            f"{source}: no such path, and no repository of the Hugging Face hub that can be read ({reason})"
        ) from None


def push_folder(save: Callable[[Path], None], repo_id: str, *, private: bool | None, token: str | None) -> str:
    """Upload what `save` writes into a folder as one commit; the repository is made if there is none.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        save(folder)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a model of pyard").commit_url)
