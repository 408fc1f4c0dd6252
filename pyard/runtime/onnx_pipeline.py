"""A text-to-image student in onnxruntime: draws pictures from prompts with only numpy and onnxruntime.

n pictures · C channels · h, w sides of a sample · H, W sides of a picture in pixels
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pyard.diffusion.noise import standard_normal
from pyard.errors import InputError
from pyard.runtime.device_buffers import run_on_device
from pyard.runtime.onnx_student import OnnxStudent
from pyard.runtime.pipeline_folder import CONFIG_NAME, Arrays, PictureSize, check_tensors, read_config
from pyard.runtime.prompts import PromptEncoder
from pyard.runtime.sessions import Provider, choose_providers, open_session
from pyard.storage.typed import checked


class OnnxPipeline:
    """A text-to-image student in a folder written by `python -m pyard.export --onnx DIR/`.

    Each graph is opened once, when it is first needed. Any number of threads may use a pipeline at once.

    Example:
        pipeline = OnnxPipeline.from_folder("sd35-onnx")
        pictures = pipeline.sample(["a red circle", "a blue square"], seed=0)  # uint8 [2, H, W, 3]
        for preview in pipeline.stream(["a red circle"]):                     # after each step, a coarse one first
            show(preview[0])

    Args:
        folder: the pipeline's folder.
        providers, threads: as in `OnnxStudent`.
        share: other pipelines; components that one of them has already opened from the same files are used again.

    Attributes:
        sizes: sizes of the pictures that can be drawn; the first is the usual one.
        num_steps: S.
        constants: further conditions that are the same for every prompt.

    Raises:
        InputError: the folder does not exist, has missing or truncated files, or was written by a newer pyard; or a provider is
            unknown.
    """

    @checked("OnnxPipeline")
    def __init__(
        self,
        folder: str | Path,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        *,
        share: Sequence[OnnxPipeline] = (),
    ):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.sizes = tuple(
            PictureSize(**{**size, "sample_shape": tuple(size["sample_shape"])}) for size in self.config["sizes"]
        )
        self.num_steps: int = self.config["num_steps"]
        self.constants: dict[str, float] = self.config["constants"]
        self._providers, self._threads = choose_providers(providers), threads
        self._opened: dict[str, Any] = {}
        self._lock = threading.RLock()
        self._share = [other for other in share if (other._providers, other._threads) == (self._providers, threads)]
        text = self.config["text"]
        self._prompts = None if text is None else PromptEncoder(self.folder, text, self._text_encoder)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        *,
        share: Sequence[OnnxPipeline] = (),
    ) -> OnnxPipeline:
        """Open the pipeline of a folder; the arguments are those of the class."""
        return cls(folder, providers, threads, share=share)

    def encode(self, prompts: str | Sequence[str]) -> dict[str, NDArray[Any]]:
        """Encode prompts as a condition, which `sample` and `stream` accept instead of the prompts.

        Returns:
            tokens float32 [n, tokens, D], mask bool [n, tokens] and, by family, pooled float32 [n, E] and constants [n].

        Raises:
            InputError: there are no prompts, the folder has no text encoders, or `tokenizers` is not installed.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"prompts: found {prompts!r:.60}; expected a string, or a list of at least one")
        if self._prompts is None:
            raise InputError(f"{self.folder} was exported without text encoders; give condition=… with embeddings")
        return self._complete(self._prompts.encode(texts))

    @checked("sample")
    def sample(
        self,
        prompts: str | Sequence[str] | None = None,
        seed: int = 0,
        *,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        noise: NDArray[np.float32] | None = None,
        condition: Mapping[str, NDArray[Any]] | None = None,
        output_type: Literal["np", "pil"] = "np",
    ) -> Any:
        """Draw a picture for each prompt, or for each row of a condition.

        Picture i starts from the noise of `(seed, i)`, as in `pyard.sample`, whatever the batch size.

        Args:
            prompts: one text or a list of texts.
            seed: random seed of the noise, 0 to 2**64 - 1.
            height, width: size of the pictures in pixels; None: the usual size, or if only one of them is given, the size that
                has it.
            batch_size: number of pictures drawn together, which limits memory. None: all at once.
            noise: initial noise, float32 [n, C, h, w], to use instead of the seed's.
            condition: instead of prompts, `tokens` float32 [n, tokens, D], `mask` bool [n, tokens] (if missing, all tokens are
                text) and, depending on the family, `pooled` float32 [n, E], as returned by `encode`.
            output_type: `np` for an array, `pil` for a list of Pillow images.

        Returns:
            uint8 [n, H, W, 3], or n images.

        Raises:
            InputError: both or neither of prompts and condition are given; the student was not trained on the size; shapes are
                wrong; or `pil` is requested and Pillow is not installed.
        """
        tensors, count = self._condition(prompts, condition)
        size = self._size(height, width)
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1, or None for all at once")
        rows = batch_size or count
        student = self._student(size, size.sampler or size.step)
        pictures = []
        for start in range(0, count, rows):
            part = {name: array[start : start + rows] for name, array in tensors.items()}
            index = np.arange(start, min(start + rows, count))
            begin = self._noise(noise, seed, index, size, count)
            pictures.append(self._decode(size, student.sample_on_device(begin, part)))
        drawn = np.concatenate(pictures)
        return drawn if output_type == "np" else as_images(drawn)

    def latents(
        self, condition: Arrays, noise: NDArray[np.float32], *, height: int | None = None, width: int | None = None
    ) -> NDArray[np.float32]:
        """Draw samples without decoding them, float32 [n, C, h, w]; the arguments are those of `sample`."""
        tensors, count = self._condition(None, condition)
        size = self._size(height, width)
        begin = self._noise(noise, 0, np.arange(count), size, count)
        latents: NDArray[np.float32] = self._student(size, size.sampler or size.step).sample_on_device(begin, tensors).numpy()
        return latents

    @checked("stream")
    def stream(
        self,
        prompts: str | Sequence[str] | None = None,
        seed: int = 0,
        *,
        height: int | None = None,
        width: int | None = None,
        noise: NDArray[np.float32] | None = None,
        condition: Mapping[str, NDArray[Any]] | None = None,
    ) -> Iterator[NDArray[np.uint8]]:
        """Draw pictures and return a preview after each of the S steps; the last one is the result of `sample`.

        Args:
            prompts, seed, height, width, noise, condition: as in `sample`.

        Returns:
            An iterator over S arrays uint8 [n, H, W, 3]; each is computed when it is requested.

        Raises:
            InputError: as in `sample`; or the folder has no graph of single steps.
        """
        tensors, count = self._condition(prompts, condition)
        size = self._size(height, width)
        if size.step is None:
            raise InputError(f"{self.folder} only has the form sampler; export it with --form both to see each step")
        begin = self._noise(noise, seed, np.arange(count), size, count)
        student = self._student(size, size.step)
        return (self._decode(size, outputs["prediction"]) for _, outputs in student.steps_on_device(begin, tensors))

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            InputError: a file differs; the message names the first one.
        """
        for name, about in self.config["files"].items():
            with (self.folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != about["sha256"]:
                raise InputError(f"{self.folder / name}: its checksum differs from {CONFIG_NAME}; copy the folder again")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{size.width} x {size.height}" for size in self.sizes)
        return f"{self.folder}: {self.num_steps} steps, {sizes} pixels, {self.config['precision']}, on {self._providers[0][0]}"

    def _condition(self, prompts: str | Sequence[str] | None, condition: Arrays | None) -> tuple[dict[str, NDArray[Any]], int]:
        if (prompts is None) == (condition is None):
            raise InputError(f"found {'neither' if prompts is None else 'both'} prompts and condition=…; expected one of them")
        tensors = self.encode(prompts) if prompts is not None else self._complete(condition or {})
        return tensors, len(tensors["tokens"])

    def _complete(self, condition: Arrays) -> dict[str, NDArray[Any]]:
        """Add a missing mask and missing constants, and check the shapes."""
        tokens = condition.get("tokens")
        if not isinstance(tokens, np.ndarray) or tokens.ndim != 3 or not len(tokens):
            found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
            raise InputError(f"condition['tokens']: found {found}; expected float32 [n, tokens, D], n at least 1")
        whole = {"mask": np.ones(tokens.shape[:2], dtype=bool), **condition}
        for name, value in self.constants.items():
            whole.setdefault(name, np.full(len(tokens), value, dtype=np.float32))
        return check_tensors(whole, self.config["conditions"])

    def _size(self, height: int | None, width: int | None) -> PictureSize:
        for size in self.sizes:
            if height in (None, size.height) and width in (None, size.width):
                return size
        known = ", ".join(f"{size.height} x {size.width}" for size in self.sizes)
        raise InputError(f"height {height}, width {width}: this student draws {known} pixels (height x width)")

    def _noise(
        self, noise: NDArray[np.float32] | None, seed: int, index: NDArray[Any], size: PictureSize, count: int
    ) -> NDArray[np.float32]:
        if noise is None:
            return standard_normal(seed, index, size.sample_shape)
        if not isinstance(noise, np.ndarray) or noise.dtype != np.float32 or noise.shape != (count, *size.sample_shape):
            found = f"{noise.dtype} {list(noise.shape)}" if isinstance(noise, np.ndarray) else type(noise).__name__
            raise InputError(f"noise: found {found}; expected float32 {[count, *size.sample_shape]}")
        return noise[index]

    def _decode(self, size: PictureSize, sample: Any) -> NDArray[np.uint8]:
        if size.decoder is None:
            return to_pictures(sample.numpy())
        session = self._session(size.decoder)
        device = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        pictures: NDArray[np.uint8] = run_on_device(session, {"latent": sample}, device)["image"].numpy()
        return pictures

    def _text_encoder(self, name: str) -> onnxruntime.InferenceSession:
        return self._session(f"{name}/model.onnx")

    def _session(self, place: str) -> onnxruntime.InferenceSession:
        return self._open(place, lambda path: open_session(path, self._providers, self._threads, False))

    def _student(self, size: PictureSize, place: str | None) -> OnnxStudent:
        if place is None:
            raise InputError(f"{self.folder}: there is no graph for {size.height} x {size.width} pixels; export it again")
        student: OnnxStudent = self._open(place, lambda path: OnnxStudent(path, self._providers, self._threads))
        return student

    def _open(self, place: str, make: Any) -> Any:
        with self._lock:
            if place not in self._opened:
                same = (other._opened_as(place, self._checksums(place)) for other in self._share)
                found = next((one for one in same if one is not None), None)
                self._opened[place] = make(self.folder / place) if found is None else found
            return self._opened[place]

    def _opened_as(self, place: str, checksums: dict[str, str]) -> Any:
        """The component at a place, opened if necessary; None: it is another component."""
        if self._checksums(place) != checksums:
            return None
        if place.startswith("transformer/"):
            return self._student(self.sizes[0], place)
        return self._session(place)

    def _checksums(self, place: str) -> dict[str, str]:
        """Checksums of a graph and of its weights' file, if it has one."""
        folder = place.rpartition("/")[0]
        files: dict[str, Any] = self.config["files"]
        return {
            name: about["sha256"]
            for name, about in files.items()
            if name == place or (name.rpartition("/")[0] == folder and not name.endswith(".onnx"))
        }


def as_images(pictures: NDArray[np.uint8]) -> list[Any]:  # [n, H, W, C]
    """Convert pictures to Pillow images."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError("output_type='pil' needs Pillow: pip install pillow, or use output_type='np'") from None
    return [Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture) for picture in pictures]


def to_pictures(samples: NDArray[np.float32]) -> NDArray[np.uint8]:  # [n, C, H, W] -> [n, H, W, C]
    """Convert pictures from -1 ... 1 to 8 bits, rounded to the nearest level."""
    levels = np.clip(np.rint((samples.astype(np.float64) + 1) * 127.5), 0, 255).astype(np.uint8)
    return levels.transpose(0, 2, 3, 1)
