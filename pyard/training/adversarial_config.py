"""Settings of the adversarial stage."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from pyard.errors import InputError
from pyard.storage.typed import conform

# For the built-in digits, 16 tokens: narrow discriminators with short kernels, no thousands of updates of warm-up, and feature
# matching, which gains most there. `docs/quality.md` has what else was tried, and what came of it.
DIGITS_DISCRIMINATORS: dict[str, Any] = {
    "real": "digits", "width": 32, "kernel_size": 3, "weight": 3.0, "feature_matching": 30.0, "warmup_steps": 100,
}  # fmt: skip


@dataclass(frozen=True)
class AdversarialConfig:
    """The adversarial stage: discriminators on a frozen teacher's features of the student's last prediction and of real data.

    Args:
        real: real data: `digits`; a folder of pictures, one sub-folder per class in the order of the labels, as ImageNet is
            unpacked (cropped as ADM does; a student of latents encodes them with its VAE, once); for a text-to-image student, a
            folder of pictures with `metadata.jsonl`, whose lines have `file_name` and `text`; a `.safetensors` or `.npz`
            file with `images` float [n, C, ...] (-1 to 1, or latents) and `labels` [n], condition numbers; or a folder of such
            `.safetensors` (latents: see `RealData`).
        real_cache: folder for the shards that pictures are converted to; none: `real` in the run folder.
        flips: mirror a random half of the real data.
        noise_levels: real and generated samples are noised before the teacher sees them, to a level between these fractions of
            its noisiest time.
        blocks: the teacher's blocks whose features are used, numbered from 0; none: all.
        width: channels of a discriminator's layers.
        depth: residual layers of a discriminator.
        kernel_size: kernel size of these layers, in tokens; odd.
        virtual_batch: samples that batch norm normalises together; each process's share of a batch is a multiple of it.
        learning_rate: learning rate of the discriminators' AdamW.
        adam_betas: betas of the discriminators' AdamW.
        weight: weight of the generator's loss, times |grad MSE| / (|grad GAN| + 1e-4) at the last head's weight.
        max_ratio: upper limit of |grad MSE| / (|grad GAN| + 1e-4) in `weight`.
        warmup_steps: number of initial updates in which the student does not learn from the discriminators yet (weight 0).
        r1: weight of the squared gradient of the real data's logits at the heads' inputs (Mescheder et al. 2018); 0: none.
        feature_matching: weight of the squared distance of the mean hidden features (Salimans et al. 2016), beside the logits.
    """

    real: str = "digits"
    real_cache: str | None = None
    flips: bool = False
    noise_levels: tuple[float, float] = (0.0, 0.5)
    blocks: tuple[int, ...] | None = None
    width: int = 64
    depth: int = 1
    kernel_size: int = 9
    virtual_batch: int = 8
    learning_rate: float = 1e-3
    adam_betas: tuple[float, float] = (0.0, 0.99)
    weight: float = 10.0
    max_ratio: float = 1e4
    warmup_steps: int = 3000
    r1: float = 0.0
    feature_matching: float = 0.0

    @classmethod
    def of(cls, settings: dict[str, Any]) -> AdversarialConfig:
        """The configuration of settings by name; a name that is none is an InputError that names the nearest."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise InputError(f"adversarial: no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return cls(**settings)

    def __post_init__(self) -> None:
        conform(self, "adversarial")
        low, high = self.noise_levels
        if not 0 <= low <= high <= 1:
            raise InputError(
                f"adversarial: noise_levels is {self.noise_levels}; expected two increasing numbers between 0 and 1"
            )
        if self.blocks is not None and (not self.blocks or len(set(self.blocks)) < len(self.blocks) or min(self.blocks) < 0):
            raise InputError(f"adversarial: blocks is {self.blocks}; expected distinct whole numbers, 0 or larger")
        for name, least in (("width", 1), ("depth", 0), ("kernel_size", 1), ("virtual_batch", 1), ("warmup_steps", 0)):
            if getattr(self, name) < least:
                raise InputError(f"adversarial: {name} is {getattr(self, name)}; expected at least {least}")
        if self.kernel_size % 2 == 0:
            raise InputError(f"adversarial: kernel_size is {self.kernel_size}; expected an odd number")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise InputError(f"adversarial: adam_betas is {self.adam_betas}; expected two numbers, at least 0 and below 1")
        for name in ("weight", "r1", "feature_matching"):
            if getattr(self, name) < 0:
                raise InputError(f"adversarial: {name} is {getattr(self, name)}; expected at least 0")
        for name in ("learning_rate", "max_ratio"):
            if not getattr(self, name) > 0:
                raise InputError(f"adversarial: {name} is {getattr(self, name)}; expected more than 0")
