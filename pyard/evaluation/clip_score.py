"""CLIP score: how well pictures match their prompts, by a CLIP model in a local folder.

n pictures · E width of CLIP's embeddings
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyard.errors import InputError
from pyard.evaluation.pixels import to_bytes
from pyard.models.pretrained import check_model_folder
from pyard.storage.files import file_sha256

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_FILES = ("config.json", "preprocessor_config.json")
_TOKENS = ("input_ids", "attention_mask")


class ClipFolder:
    """A CLIP model of transformers (Radford et al. 2021), read from disk (implements `FeatureNetwork`).

    Its features are the normalised embeddings of pictures, so Fréchet distances can be taken in them where no other feature
    network is given.

    Args:
        folder: with config.json, preprocessor_config.json, weights and a tokenizer, as `save_pretrained` of CLIPModel and
            CLIPProcessor write them. Nothing is downloaded.
        device: where it runs.

    Raises:
        InputError: the folder lacks a file, or transformers cannot read it as a CLIP model.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        # The image processor without torchvision, so that scores do not depend on whether that is installed.
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        require_clip_folder(folder)
        check_model_folder(folder)
        try:
            model: Any = CLIPModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
            self._processor = CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
            self._tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        # Whatever a damaged file does to a library that is not ours.
        except Exception as error:
            found = " ".join(str(error).split())[:300]
            raise InputError(f"clip {folder}: transformers cannot read a CLIP model from it: {found}") from None
        self._device = torch.device(device)
        self._model = model.to(self._device).eval().requires_grad_(False)
        self.name = f"CLIP {folder.name}"
        digest = hashlib.sha256()
        for file in sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")):
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
        self.fingerprint = digest.hexdigest()

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Pictures [n, 3, H, W], uint8 or float from -1 to 1, to embeddings of length 1, float64 [n, E]."""
        pictures = list(to_bytes(images, "rounded").transpose(0, 2, 3, 1))
        pixels = self._processor(images=pictures, return_tensors="pt")["pixel_values"]
        return _normalised(self._model.get_image_features(pixel_values=pixels.to(self._device)))

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of length 1 of texts, cut after CLIP's limit of tokens: float64 [n, E]."""
        limit = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return _normalised(self._model.get_text_features(**{name: tokens[name].to(self._device) for name in _TOKENS}))

    def scores(self, features: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """100 max(cos, 0) of each picture's features and its text, float64 [n] (Hessel et al. 2021, with w = 100)."""
        cosines = (features * self.text_features(texts)).sum(axis=1)
        return 100 * np.maximum(cosines, 0)


def require_clip_folder(folder: Path) -> None:
    """Raises InputError unless the folder has the files of a CLIP model; reads none of them."""
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in _WEIGHTS):
        missing.append(_WEIGHTS[0])
    if missing:
        what = f"there is no {', no '.join(missing)}" if folder.is_dir() else "there is no such folder"
        raise InputError(
            f"clip {folder}: expected the folder of a CLIP model, such as a copy of openai/clip-vit-large-patch14: {what}"
        )


def _normalised(output: Any) -> np.ndarray:  # [n, E]
    embeddings = output if isinstance(output, torch.Tensor) else output.pooler_output
    vectors = embeddings.double()
    return (vectors / vectors.norm(dim=1, keepdim=True)).cpu().numpy()
