"""What `ARDPipeline` is called with: arguments of diffusers' pipelines that a student has, ignores or refuses."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from pyard.conditions import Condition
from pyard.errors import InputError
from pyard.models.student import Student
from pyard.models.student_config import TextSource
from pyard.storage.numbers import whole_number
from pyard.teachers.text_to_image import PIPELINES

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_MOST_IMAGES = 2**16


def check_call(
    student: Student,
    *,
    num_inference_steps: Any,
    num_images_per_prompt: Any,
    max_sequence_length: Any,
    callback_inputs: Sequence[str],
    output_type: Any,
) -> None:
    """Raise an InputError for what a student cannot do, before it draws."""
    if num_inference_steps not in (None, student.num_steps):
        raise InputError(f"num_inference_steps is {num_inference_steps}; this student draws in {student.num_steps} steps")
    whole_number("num_images_per_prompt", num_images_per_prompt, 1, _MOST_IMAGES)
    if output_type not in _OUTPUT_TYPES:
        raise InputError(f"output_type is {output_type!r}; expected pil, np, pt or latent")
    if list(callback_inputs) not in ([], ["latents"]):
        raise InputError(f"callback_on_step_end_tensor_inputs is {list(callback_inputs)}; expected ['latents']")
    if max_sequence_length is not None:
        text = text_of(student)
        own = text.max_sequence_length or PIPELINES[text.pipeline].max_sequence_length
        if max_sequence_length != own:
            raise InputError(f"max_sequence_length is {max_sequence_length}; this student was trained with {own}")


def warn_of_ignored(student: Student, negative_prompt: Any, guidance_scale: Any, true_cfg_scale: Any) -> None:
    """Warn once of the arguments that would guide a teacher; a student has its teacher's guidance in its weights."""
    text = student.config.text
    own_guidance = {None, 0, 1} if text is None else {None, 0, 1, text.constants.get("guidance")}
    ignored = [
        *["negative_prompt"] * bool(negative_prompt),
        *["guidance_scale"] * (guidance_scale not in own_guidance),
        *["true_cfg_scale"] * (true_cfg_scale not in {None, 0, 1}),
    ]
    if ignored:
        names = " and ".join(ignored) + (" is" if len(ignored) == 1 else " are")
        warnings.warn(f"{names} ignored: the student has its teacher's guidance in its weights", stacklevel=3)


def text_of(student: Student) -> TextSource:
    """Where a student's text encoders are; an InputError if it does not draw from prompts."""
    if student.config.text is None:
        raise InputError("prompt: this student was not made from a text-to-image pipeline; give class_labels or a condition")
    return student.config.text


def given_embeddings(
    student: Student, tokens: torch.Tensor | list[torch.Tensor], pooled: torch.Tensor | None, mask: torch.Tensor | None
) -> Condition:
    """The condition of embeddings that the caller computed.

    Args:
        student: a student made from a text-to-image pipeline.
        tokens: [n, tokens, D], or a list of [tokens, D], as Z-Image's `encode_prompt` returns them.
        pooled: [n, E], if the student's family has them.
        mask: bool [n, tokens], which tokens are text; None: all.

    Raises:
        InputError: they do not fit the student.
    """
    text = text_of(student)
    if isinstance(tokens, list):
        tokens, mask = _padded(tokens, mask)
    wanted = PIPELINES[text.pipeline].encode.shape(getattr(student.config.network, "transformer", {}), 1)
    n = len(tokens)
    found = {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled, "prompt_embeds_mask": mask}
    expected = {
        "prompt_embeds": f"[n, tokens, {wanted.width}]",
        "pooled_prompt_embeds": "none" if wanted.pooled is None else f"[{n}, {wanted.pooled}]",
        "prompt_embeds_mask": f"[{n}, {tokens.shape[1] if tokens.ndim > 1 else 'tokens'}], or none",
    }
    fits = {
        "prompt_embeds": tokens.ndim == 3 and tokens.shape[2] == wanted.width and 0 not in tokens.shape,
        "pooled_prompt_embeds": (None if pooled is None else tuple(pooled.shape))
        == (None if wanted.pooled is None else (n, wanted.pooled)),
        "prompt_embeds_mask": mask is None or tuple(mask.shape) == tuple(tokens.shape[:2]),
    }
    for name, is_right in fits.items():
        if not is_right:
            shape = "none" if found[name] is None else list(found[name].shape)  # type: ignore[union-attr]
            raise InputError(f"{name}: found {shape}; expected {expected[name]}")
    tensors = {"tokens": tokens, "mask": torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool()}
    if pooled is not None:
        tensors["pooled"] = pooled
    return Condition({**tensors, **{name: torch.full((n,), value) for name, value in text.constants.items()}})


def _padded(tokens: list[torch.Tensor], mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of several lengths as one tensor, and which of its rows are text."""
    if mask is not None or not tokens or any(one.ndim != 2 for one in tokens) or len({one.shape[1] for one in tokens}) > 1:
        shapes = [list(one.shape) for one in tokens]
        raise InputError(f"prompt_embeds: found a list of {shapes}; expected tensors [tokens, D], and no mask")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(one), dtype=torch.bool) for one in tokens], batch_first=True)
    return torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), mask
