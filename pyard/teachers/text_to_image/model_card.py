"""The README of a student that was converted for other programs: what it is, and code to draw with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyard.models.card import PROMPT, front_matter
from pyard.models.student_config import StudentConfig, TextSource
from pyard.teachers.text_to_image.families import PipelineFamily
from pyard.teachers.text_to_image.stock_sampling import StockSampling

Kind = Literal["transformer", "lora", "adapter"]

_WHAT = {
    "transformer": "the whole transformer, for diffusers' `from_pretrained`",
    "lora": "a LoRA, for `load_lora_weights` of diffusers and for ComfyUI",
    "adapter": "an adapter folder of PEFT, as this pipeline has no `load_lora_weights`",
}


@dataclass(frozen=True)
class Card:
    """The contents of a model card.

    Args:
        kind: what is in the folder.
        folder: its path.
        config: the student's configuration.
        text: the source of the student's text encoders.
        family: the pipeline's family.
        transformer: name of the transformer's class in diffusers.
        base: folder of the pipeline with which the student is used.
        sampling: how the stock pipeline visits the student's times, at the usual size.
        dtype: dtype of the weights, such as `bfloat16`.
        sizes: how the stock pipeline visits the student's times, by (height, width) in pixels; the usual size first.
        about: further lines about the folder's contents.
        pipeline_warns: whether the pipeline's `load_lora_weights` warns about every LoRA without additions for the text
            encoders.
        replacement: the transformer to which a LoRA belongs, if it is not the pipeline's: a folder or a single file.
    """

    kind: Kind
    folder: Path
    config: StudentConfig
    text: TextSource
    family: PipelineFamily
    transformer: str
    base: Path
    sampling: StockSampling
    dtype: str
    sizes: Mapping[tuple[int, int], StockSampling]
    about: tuple[str, ...] = ()
    pipeline_warns: bool = False
    replacement: Path | None = None

    def render(self) -> str:
        """The card as Markdown; its Python code block draws a picture."""
        steps = self.config.grid.num_steps
        told = self.sampling.told_error
        lora = self.kind != "transformer"
        lines = [
            *front_matter(
                library="diffusers", task="text-to-image", tags=["diffusion", "distillation", "few-step", *["lora"] * lora],
                base=self.base, relation="adapter" if lora else "finetune",
            ),
            f"# A {steps}-step student of {self.base.name}", "",
            f"Distilled with pyard: {steps} steps, one pass each, no guidance. This folder holds {_WHAT[self.kind]}.", "",
            "```python", *self.code(), "```", "",
            "| | |", "|---|---|",
            f"| base | `{self.base}`, a {self.family.pipeline} |",
            f"| sha256 of its transformer and scheduler | `{self.config.teacher_fingerprint}` |",
            f"| sizes, height x width | {', '.join(f'{h} x {w}' for h, w in self.sizes)} |",
            *(f"| {line} |" for line in self.about),
            f"| times | {self._times()} |",
            *(f"| {line} |" for line in self._comfy()),
            "",
        ]  # fmt: skip
        if self.kind == "lora" and self.pipeline_warns:
            lines.append(
                "diffusers reports that it found no LoRA keys for the text encoders: this LoRA only changes the transformer.\n"
            )
        if told:
            lines.append(
                "The teacher's scheduler passed rounded times to the network. This one passes the exact times, which differ "
                f"by up to {told:.1g}, so pictures differ slightly from pyard's.\n"
            )
        return "\n".join(lines)

    def code(self) -> list[str]:
        """The Python code that draws a picture."""
        scheduler, pipeline = type(self.sampling.scheduler).__name__, self.family.pipeline
        imports = sorted({scheduler, pipeline, *([self.transformer] if self.kind == "transformer" or self.replacement else [])})
        lines = ["import torch", f"from diffusers import {', '.join(imports)}"]
        if self.kind == "adapter":
            lines.append("from peft import PeftModel")
        folder, base, dtype = f'"{self.folder}"', f'"{self.base}"', f"torch.{self.dtype}"
        lines.append("")
        more = ""
        if self.kind == "transformer" or self.replacement is not None:
            place = folder if self.replacement is None else f'"{self.replacement}"'
            method = "from_single_file" if self.replacement is not None and self.replacement.is_file() else "from_pretrained"
            lines.append(f"transformer = {self.transformer}.{method}({place}, torch_dtype={dtype})")
            more = ", transformer=transformer"
        lines.append(f"pipe = {pipeline}.from_pretrained({base}{more}, torch_dtype={dtype})")
        if self.kind == "lora":
            lines.append(f"pipe.load_lora_weights({folder})")
        elif self.kind == "adapter":
            lines.append(f"pipe.transformer = PeftModel.from_pretrained(pipe.transformer, {folder}).merge_and_unload()")
        lines.append(f'pipe.scheduler = {scheduler}.from_pretrained({folder}, subfolder="scheduler")')
        settings = ", ".join(f"{name}={value!r}" for name, value in self.arguments().items())
        # By name: the first argument of FLUX.2's pipelines is a picture.
        lines.append(f'image = pipe(prompt="{PROMPT}", {settings}).images[0]')
        return lines

    def arguments(self) -> dict[str, Any]:
        """The arguments of the pipeline's call, besides the prompt."""
        height, width = next(iter(self.sizes))
        found: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": self.config.grid.num_steps}
        if self.family.without_guidance is not None:
            name, value = self.family.without_guidance
            found[name] = value
        if "guidance" in self.text.constants:
            found["guidance_scale"] = self.text.constants["guidance"]
        for name, times in self.sampling.arguments.items():
            found[name] = [int(time) for time in times] if name == "timesteps" else times
        if self.text.max_sequence_length not in (None, self.family.max_sequence_length):
            found["max_sequence_length"] = self.text.max_sequence_length
        if self.family.has_resolution_bins:
            found["use_resolution_binning"] = False
        return found

    def _times(self) -> str:
        name = type(self.sampling.scheduler).__name__
        if not self.sampling.arguments:
            return f"`scheduler/` ({name}) visits the student's times in {self.config.grid.num_steps} steps by itself"
        passed = next(iter(self.sampling.arguments))
        said = f"`scheduler/` ({name}) takes them from `{passed}=` as they are, unshifted; pass it in every call"
        if not self._differ():
            return said
        each = (f"{one.arguments[passed]} for {h} x {w}" for (h, w), one in self.sizes.items())
        return f"{said}: {'; '.join(each)}"

    def _differ(self) -> bool:
        """Whether the times differ between sizes."""
        return any(one.sigmas != self.sampling.sigmas for one in self.sizes.values())

    def _comfy(self) -> list[str]:
        guidance = self.text.constants.get("guidance")
        told = "" if guidance is None else f", FluxGuidance {guidance:g}"
        fixed = f"sampler `euler`, {self.config.grid.num_steps} steps, cfg 1{told}; sigmas"
        if not self._differ():
            return [f"ComfyUI | {fixed} {_listed(self.sampling)}"]
        return [f"ComfyUI, {h} x {w} | {fixed} {_listed(one)}" for (h, w), one in self.sizes.items()]


def _listed(sampling: StockSampling) -> str:
    return ", ".join(f"{sigma:.6g}" for sigma in sampling.sigmas)
