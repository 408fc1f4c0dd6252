"""The text encoders of a diffusers pipeline, used through the pipeline's own `encode_prompt`."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyard.conditions.prompts import Encoded
from pyard.errors import InputError
from pyard.models.pretrained import check_config
from pyard.storage.reading import read_object, reading
from pyard.teachers.text_to_image.components import text_components
from pyard.teachers.text_to_image.families import PipelineFamily
from pyard.teachers.text_to_image.pipelines import pipeline_family


class PipelineTextEncoder:
    """A `TextEncoder` that encodes prompts in the same way as a diffusers pipeline.

    Tokenizers and text encoders are read when the first text is encoded. No other component of the pipeline is ever read.

    Example:
        encoder = PipelineTextEncoder("stable-diffusion-3.5-medium", dtype=torch.bfloat16, device="cuda")
        (encoded,) = encoder.encode(["a red circle"])
        encoded.tensors["tokens"].shape    # (333, 4096)
        encoder.free()

    Args:
        folder: the pipeline's folder.
        family: the pipeline's family; None: the one in the folder's index.
        max_sequence_length: limit of text tokens; None: the pipeline's.
        dtype: dtype of the encoders' weights.
        variant: variant of the encoders' weights, such as `fp16`; None: those without a variant, or else those that exist.
        device: the device that the encoders run on.
        transformer: settings of the transformer, from which SD3's pipeline takes the width if it has no T5; None: those in the
            folder.
        leave_out: names of components that are not read, because they are replaced by others.

    Raises:
        InputError: a component is missing, no component has the variant, or the pipeline does not allow the limit.
    """

    def __init__(
        self,
        folder: str | Path,
        family: PipelineFamily | None = None,
        *,
        max_sequence_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        device: str | torch.device = "cpu",
        transformer: Mapping[str, Any] | None = None,
        leave_out: Container[str] = (),
    ):
        self.folder = Path(folder)
        self.family = pipeline_family(self.folder) if family is None else family
        self.max_sequence_length = self.family.max_sequence_length if max_sequence_length is None else max_sequence_length
        longest = self.family.longest_sequence
        if self.max_sequence_length < 1 or (longest is not None and self.max_sequence_length > longest):
            limit = "" if longest is None else f" to {longest}"
            raise InputError(f"max_sequence_length is {max_sequence_length}; {self.family.pipeline} takes 1{limit}")
        self.dtype = dtype
        self.device = torch.device(device)
        self._transformer = transformer
        self._components = [part for part in text_components(self.folder, self.family, variant) if part.name not in leave_out]
        self._pipeline: Any = None

    @classmethod
    def of_components(
        cls,
        family: PipelineFamily,
        components: dict[str, Any],
        *,
        max_sequence_length: int | None = None,
        device: str | torch.device = "cpu",
        transformer: Mapping[str, Any] | None = None,
    ) -> PipelineTextEncoder:
        """An encoder that uses tokenizers and text encoders in memory, on their own device.

        Args:
            family: the family of their pipeline.
            components: tokenizers and text encoders, by their names in the pipeline.
            max_sequence_length: limit of text tokens; None: the pipeline's.
            device: the encoders' device.
            transformer: settings of the transformer, from which SD3's pipeline takes the width if it has no T5.
        """
        made = cls.__new__(cls)
        made.folder, made.family, made.device, made._components = Path(), family, torch.device(device), []
        made.max_sequence_length = family.max_sequence_length if max_sequence_length is None else max_sequence_length
        made._transformer = transformer
        made._pipeline = made._empty_pipeline(components)
        return made

    def components(self) -> dict[str, Any]:
        """Tokenizers and text encoders, by their names in the pipeline."""
        if self._pipeline is None:
            self._pipeline = self._load()
        names = self.family.encoders
        return {name: getattr(self._pipeline, name) for name in names if getattr(self._pipeline, name, None) is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the pipeline's class that determine the embeddings, besides files, limit and dtype."""
        with _quiet():
            return self.family.encode.settings(self._empty_pipeline({}))

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that determines an embedding. Each file of weights is read once per process, but not loaded.

        Folders with the same files have the same fingerprint, wherever they are.
        """
        about = {
            "pipeline": self.family.pipeline,
            "max_sequence_length": self.max_sequence_length,
            "dtype": str(self.dtype),
            "settings": self.settings,
            "files": {name: digest for part in self._components for name, digest in part.digests().items()},
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode texts as one batch.

        Args:
            texts: prompts or negative prompts.

        Returns:
            For each text, on the CPU in the encoder's dtype: `tokens` [n, D]; `pooled` [E] for SD3 and Flux; and whether one of
            the tokenizers cut it. For SD3 and Flux, n is the padded length, because their transformers attend to padding.

        Raises:
            InputError: the transformers library cannot read one of the components, or they fail on a text.
        """
        if not texts:
            return []
        with _quiet():
            if self._pipeline is None:
                self._pipeline = self._load()
            given = list(texts)
            with reading(
                self.folder, "its tokenizers or text encoders are damaged, or do not fit each other", what="as text encoders"
            ):
                tensors = self.family.encode.encode(self._pipeline, given, self.max_sequence_length, self.device)
                cut = self._cut(given)
        return [
            # Copies: a view would keep the tensors of the whole batch.
            Encoded({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in one.items()}, is_cut)
            for one, is_cut in zip(tensors, cut, strict=True)
        ]

    def to(self, device: str | torch.device) -> None:
        """Encode on another device from now on."""
        if torch.device(device) != self.device:
            self.free()
            self.device = torch.device(device)

    def free(self) -> None:
        """Drop the text encoders; the next `encode` reads them again."""
        self._pipeline = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _cut(self, texts: list[str]) -> list[bool]:
        """For each text, whether a tokenizer cuts it."""
        found = [False] * len(texts)
        for tokenizer, given, limit in self.family.encode.limits(self._pipeline, texts, self.max_sequence_length):
            lengths = [len(ids) for ids in tokenizer(given).input_ids]
            found = [one or length > limit for one, length in zip(found, lengths, strict=True)]
        return found

    def _load(self) -> Any:
        loaded = {part.name: part.load(self.dtype) for part in self._components}
        for part in self._components:
            if not part.is_tokenizer:
                loaded[part.name].to(self.device)
        return self._empty_pipeline(loaded)

    def _empty_pipeline(self, components: dict[str, Any]) -> Any:
        """A pipeline of these components, without transformer, VAE and scheduler."""
        import diffusers

        kind = getattr(diffusers, self.family.pipeline, None)
        if kind is None:
            raise InputError(f"diffusers {diffusers.__version__} has no {self.family.pipeline}; upgrade it")
        names = [name for name, one in inspect.signature(kind.__init__).parameters.items() if one.kind != one.VAR_KEYWORD]
        pipeline = kind(**{name: components.get(name) for name in names if name != "self"})
        if self.family.backbone == "sd3" and components and "text_encoder_3" not in components:
            # Without T5 the pipeline fills its tokens with zeros of the width that the transformer expects.
            file = self.folder / "transformer" / "config.json"
            config = self._transformer or read_object(file, "the configuration of a transformer")
            check_config(config, file, {})
            with reading(file, "not an SD3Transformer2DModel", RuntimeError), torch.device("meta"):
                pipeline.transformer = diffusers.SD3Transformer2DModel.from_config(dict(config))
        return pipeline


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warning for every cut text, because the number of cut texts is reported at the end."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    bar = transformers_logging.is_progress_bar_enabled()
    try:
        for library in libraries:
            library.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
