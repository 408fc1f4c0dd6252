"""Encodes prompts with text encoders in onnxruntime, as the tensors that a text-to-image student is conditioned on.

B batch · n tokens · D width of a token
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pyard.errors import InputError

Arrays = dict[str, NDArray[Any]]


class PromptEncoder:
    """Tokenizers and text encoders of an exported pipeline.

    Args:
        folder: the pipeline's folder.
        layout: `text` of its `config.json` (`pyard.export.text_encoders.TextLayout`).
        open_session: returns the session of a text encoder by its name; called once for each, when it is first needed.
    """

    def __init__(self, folder: Path, layout: Mapping[str, Any], open_session: Callable[[str], onnxruntime.InferenceSession]):
        self._folder, self._layout, self._open = folder, layout, open_session
        self._tokenizers: dict[str, Any] = {}
        self._lock = threading.Lock()  # a tokenizer is set up once

    def encode(self, texts: Sequence[str]) -> Arrays:
        """Encode texts: tokens float32 [B, n, D], mask bool [B, n] and, if the student takes it, pooled float32 [B, E].

        Raises:
            InputError: the package `tokenizers` is not installed.
        """
        found: dict[tuple[str, str], NDArray[Any]] = {}
        mask: NDArray[Any] = np.ones((len(texts), 1), dtype=bool)
        for settings in self._layout["encoders"]:
            inputs = self.inputs(settings, texts)
            given = inputs["attention_mask"]
            session = self._open(settings["name"])
            names = {tensor.name for tensor in session.get_inputs()}
            outputs = session.run(list(settings["outputs"]), {n: a for n, a in inputs.items() if n in names})
            found |= {(settings["name"], output): array for output, array in zip(settings["outputs"], outputs, strict=True)}
            mask = given.astype(bool)
            if settings["dropped"]:
                mask = mask[:, settings["dropped"] :]
                found[settings["name"], "tokens"] = found[settings["name"], "tokens"][:, settings["dropped"] :]
        rows = [self._row(row, found, len(texts)) for row in self._layout["tokens"]]
        width = max(row.shape[2] for row in rows)
        tokens = np.concatenate([np.pad(row, ((0, 0), (0, 0), (0, width - row.shape[2]))) for row in rows], axis=1)
        if self._layout["masked"]:
            tokens = tokens * mask[..., None]  # as in training, where padding is zero
        else:
            mask = np.ones(tokens.shape[:2], dtype=bool)
        condition = {"tokens": np.ascontiguousarray(tokens, dtype=np.float32), "mask": mask}
        if self._layout["pooled"]:
            vectors = [found[name, "pooled"] for name in self._layout["pooled"]]
            condition["pooled"] = np.concatenate(vectors, axis=1, dtype=np.float32)
        return condition

    def _row(self, row: Sequence[Any], found: Mapping[tuple[str, str], NDArray[Any]], count: int) -> NDArray[Any]:
        if not isinstance(row[0], str):
            return np.zeros((count, *row), dtype=np.float32)
        return np.concatenate([found[name, "tokens"] for name in row], axis=2, dtype=np.float32)

    def inputs(self, settings: Mapping[str, Any], texts: Sequence[str]) -> Arrays:
        """The inputs of one text encoder, input_ids and attention_mask, int64 [B, n]; `settings` is its entry in the layout."""
        texts = [text.lower().strip() for text in texts] if settings["plain"] else list(texts)
        whole = [f"{settings['prefix']}{text}{settings['suffix']}" for text in texts]
        rows = [encoded.ids for encoded in self._tokenizer(settings).encode_batch(whole)]
        longest = settings["max_length"] if settings["pads_to"] == "max_length" else max(len(row) for row in rows)
        ids = np.full((len(rows), longest), settings["pad"], dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), None) if settings["pads_left"] else slice(0, len(row))
            ids[i, place], mask[i, place] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    def _tokenizer(self, settings: Mapping[str, Any]) -> Any:
        name = settings["tokenizer"]
        with self._lock:
            if name not in self._tokenizers:
                try:
                    import tokenizers
                except ImportError:
                    raise InputError(
                        "prompts as text need the package tokenizers: pip install tokenizers, or give embeddings: condition=…"
                    ) from None
                made = tokenizers.Tokenizer.from_file(str(self._folder / name / "tokenizer.json"))
                made.no_padding()
                made.enable_truncation(settings["max_length"])
                self._tokenizers[name] = made
            return self._tokenizers[name]
