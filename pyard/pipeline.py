"""A student as a diffusers pipeline, so that it can be saved and used like other diffusers models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor

from pyard.conditions import Condition
from pyard.errors import InputError
from pyard.models.backbone import Backbone
from pyard.models.card import CARD_NAME, may_write_card, student_card
from pyard.models.codec import AUTOENCODERS, LatentCodec, require_latent_codec
from pyard.models.hub import local_folder, push_folder
from pyard.models.pretrained import check_files, check_model_folder
from pyard.models.student import Student
from pyard.sampling.call_arguments import check_call, given_embeddings, text_of, warn_of_ignored
from pyard.sampling.draw import condition_numbers as numbers_of
from pyard.sampling.prompts import encode_prompts, shape_of_pixels, text_encoder_of
from pyard.storage.files import write_text
from pyard.storage.reading import read_object
from pyard.teachers.text_to_image import PIPELINES, PipelineTextEncoder

_HERE = "pyard.pipeline"  # where diffusers looks for this module's classes


class StudentModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A `Student` that diffusers can save and load as a component, which must be a subclass of diffusers' base classes.

    Its folder has the format of a student's folder, so `pyard.Student.from_pretrained` and this class read each other's
    folders.

    Args:
        student: the student.
    """

    config_name = "config.json"

    def __init__(self, student: Student):
        super().__init__()
        self.student = student
        self.register_to_config(**student.config.to_json())

    def forward(self, history: torch.Tensor, condition: Condition | torch.Tensor) -> torch.Tensor:
        """The parallel pass of the student."""
        return self.student(history, condition)

    @apply_forward_hook
    def rollout(self, noise: torch.Tensor, condition: Condition) -> Iterator[torch.Tensor]:
        """The student's predictions, step by step. As with `forward`, an offload hook first moves the student to its device."""
        return self.student.rollout(noise, condition)

    def save_pretrained(self, save_directory: str | Path, **unused: Any) -> None:
        """Write the student's folder, with all weights, but without its VAE, which is a separate component."""
        codec, self.student.codec = self.student.codec, None
        try:
            self.student.save_named(save_directory, merge=True, card=False)
        finally:
            self.student.codec = codec

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> StudentModel:
        """Read a student's folder. Only diffusers' loading option for the dtype applies; `network` is that of `Student`."""
        return cls(_cast(Student.from_pretrained(path, network=options.get("network")), options)).eval()


# Components of a text-to-image pipeline's folder that encode prompts.
TEXT_COMPONENTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")


class ARDPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A diffusers pipeline that draws images from prompts, class labels or other conditions with a few-step student.

    Example:
        pipe = pyard.ARDPipeline.from_pretrained("runs/sd35-4")
        images = pipe("a red circle above a blue square", generator=torch.manual_seed(0)).images

        pipe = pyard.ARDPipeline.from_pretrained("runs/imagenet")
        images = pipe(class_labels=[207, "tench"]).images

    Args:
        student: the student as a component.
        vae: the autoencoder of a student in latent space (`pyard.models.codec.LatentCodec` lists the supported ones).
        tokenizer, text_encoder, tokenizer_2, text_encoder_2, tokenizer_3, text_encoder_3: for a text-to-image student, the
            components of its teacher's pipeline.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->student->vae"
    _optional_components = ["vae", *TEXT_COMPONENTS]  # noqa: RUF012 (diffusers' own form)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    student: StudentModel
    vae: ModelMixin | None

    def __init__(
        self,
        student: StudentModel | Student,
        vae: ModelMixin | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        tokenizer_2: Any = None,
        text_encoder_2: Any = None,
        tokenizer_3: Any = None,
        text_encoder_3: Any = None,
    ):
        super().__init__()
        student = StudentModel(student) if isinstance(student, Student) else student
        if vae is None and student.student.codec is not None:
            vae = require_latent_codec(student.student.codec, "a pipeline").vae
        self.register_modules(
            student=student,
            vae=vae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            tokenizer_3=tokenizer_3,
            text_encoder_3=text_encoder_3,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        network: type[Backbone] | str | None = None,
        pipeline: str | Path | None = None,
        **kwargs: Any,
    ) -> ARDPipeline:
        """Read a pipeline's folder, or a run folder or student's folder written by `pyard.train`.

        Args:
            pretrained_model_name_or_path: the folder, or its name on the Hugging Face hub.
            network: class of the student's backbone, if it is not one of pyard's families, or "package.module:Class".
            pipeline: for a text-to-image student's run folder, the diffusers pipeline from which its text encoders are read,
                and for a LoRA student also the frozen weights; None: its teacher's pipeline, at its path during training.
            kwargs: options of `diffusers.DiffusionPipeline.from_pretrained`; for a run or student's folder, `dtype`, and
                components to use in place of the folder's, such as `vae`. Without `dtype`, text encoders have the dtype in
                which they encoded the trajectories' prompts.

        Raises:
            InputError: there is no student, an option is unknown, the folder's index names components that pyard's pipelines do
                not have, or text encoders are missing.
        """
        names = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        path = local_folder(pretrained_model_name_or_path, **{name: kwargs[name] for name in names if name in kwargs})
        if not (path / cls.config_name).is_file():
            components = {name: kwargs[name] for name in ("vae", *TEXT_COMPONENTS) if name in kwargs}
            unknown = sorted(kwargs.keys() - {*components, *names, "dtype", "torch_dtype"})
            if unknown:
                raise InputError(
                    f"ARDPipeline.from_pretrained: {path} holds a student, for which {unknown[0]} means nothing; "
                    f"expected dtype, or components: vae, {', '.join(TEXT_COMPONENTS)}"
                )
            student = _cast(Student.from_pretrained(path, network=network, base=pipeline), kwargs)
            if student.config.text is None:
                return cls(student, **components)
            encoder = text_encoder_of(student, folder=pipeline, dtype=_dtype_of(kwargs), leave_out=components)
            return cls(student, **{**encoder.components(), **components})
        # diffusers imports what the index names, but a folder must not name code to run.
        index = read_object(path / cls.config_name, "the index of a pipeline")
        known = {"student": [[_HERE, "StudentModel"]], "vae": [["diffusers", kind] for kind in AUTOENCODERS]}
        for name, component in index.items():
            if name in TEXT_COMPONENTS and isinstance(component, list) and component[:1] == ["transformers"]:
                if str(component[-1]).startswith("Auto"):  # transformers would ask whether to run the folder's code
                    raise InputError(
                        f"{path / cls.config_name}: {name} is {component}; expected the name of a transformers class"
                    )
                continue
            if not name.startswith("_") and component not in (*known.get(name, ()), [None, None]):
                raise InputError(
                    f"{path / cls.config_name}: {name} is {component}; expected {known.get(name, 'no such component')}"
                )
        if "student" not in kwargs:
            kwargs["student"] = StudentModel.from_pretrained(path / "student", network=network, **kwargs)
        if _dtype_of(kwargs) is None:
            kwargs["torch_dtype"] = _dtypes_of_encoders(kwargs["student"].student)
        for name in index:
            if name != "student":
                check = check_model_folder if (path / name / "config.json").exists() else check_files
                check(path / name)
        try:
            return super().from_pretrained(str(path), **kwargs)
        except Exception as error:  # as in read_pretrained
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: diffusers cannot read this pipeline: {' '.join(str(error).split())[:400]}") from None

    def save_pretrained(
        self, save_directory: str | Path, *arguments: Any, push_to_hub: bool = False, repo_id: str | None = None, **options: Any
    ) -> None:
        """Write the pipeline's folder with a model card. A README.md there that pyard did not write is kept.

        Args:
            save_directory: the folder.
            arguments, options: arguments of `diffusers.DiffusionPipeline.save_pretrained`.
            push_to_hub: also upload the folder, as the method `push_to_hub` does.
            repo_id: repository to upload to; None: the folder's name, in your namespace.
        """
        folder = Path(save_directory)
        upload = {key: options.pop(key) for key in ("private", "token", "commit_message", "create_pr") if key in options}
        self._save(folder, None, *arguments, **options)
        if push_to_hub:
            self.push_to_hub(repo_id or folder.name, **upload, **options)

    def _save(self, folder: Path, name: str | None, *arguments: Any, **options: Any) -> None:
        super().save_pretrained(str(folder), *arguments, **options)
        if may_write_card(folder):
            write_text(folder / CARD_NAME, student_card(self.student.student, name, pipeline=True))

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> str:
        """Upload the pipeline's folder to the Hugging Face hub; returns the address of the commit.

        Args:
            repo_id: `owner/name`; created if it does not exist. A README.md there that pyard did not write is kept.
            commit_message: None: "Upload ARDPipeline".
            private: whether a new repository is private; None: the owner's default.
            token: access token of the hub; None: that of `hf auth login`.
            create_pr: open a pull request instead of committing.
            options: options of `diffusers.DiffusionPipeline.save_pretrained`.
        """
        return push_folder(
            lambda folder, name: self._save(folder, name, **options),
            repo_id,
            private=private,
            token=token,
            message=commit_message or "Upload ARDPipeline",
            create_pr=create_pr,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        class_labels: list[int | str] | None = None,
        condition_numbers: list[int] | None = None,
        condition: Condition | None = None,
        sample_shape: tuple[int, ...] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images. Give exactly one of prompt, prompt_embeds, class_labels, condition_numbers and condition.

        Args:
            prompt: a text, or a list of texts.
            height, width: size of the images in pixels; None: the student's usual size.
            num_images_per_prompt: images of each prompt, side by side in the result.
            generator: generator of the initial noise, as in every diffusers pipeline; one, or one for each image.
            latents: initial noise [n, C, h, w] to use instead of the generator's.
            prompt_embeds: token embeddings [n, tokens, D] to use instead of prompts, or a list of [tokens, D].
            output_type: `pil`, `np` (float32 [n, H, W, C], 0 to 1), `pt` ([n, C, H, W], 0 to 1) or `latent` (the student's own
                samples).
            return_dict: return an `ImagePipelineOutput` with `images`, else a tuple of them.
            callback_on_step_end: called with (pipeline, step, time, {"latents": ...}) after each step. Latents that it returns
                are not used, because a student's next step continues from its own history.
            negative_prompt: ignored with a warning: guidance was distilled into the student.
            num_inference_steps: the student's own number of steps; it has no other.
            guidance_scale: ignored with a warning, as negative_prompt is, unless it is the embedded guidance of its training.
            true_cfg_scale: ignored with a warning, unless it is 1.
            pooled_prompt_embeds: pooled embeddings [n, E] to use with prompt_embeds, if the student's family has them.
            prompt_embeds_mask: bool [n, tokens], which of prompt_embeds are text and not padding; None: all.
            prompt_attention_mask: another name for prompt_embeds_mask.
            max_sequence_length: that of the student's training, which has no other.
            callback_on_step_end_tensor_inputs: only `latents` can be given to the callback.
            class_labels: class numbers, or names if the student has class names.
            condition_numbers: row numbers of the student's table of conditions.
            condition: the condition's tensors, with n rows.
            sample_shape: [C, h, w] to draw, if the student was trained on several; None: that of `latents`, or the usual one.

        Raises:
            InputError: not exactly one kind of condition was given, labels are out of range, the student was not trained on the
                shape, or images were requested from a student in latent space that has no VAE.
        """
        student, device = self.student.student, self._execution_device
        given = (prompt, prompt_embeds, class_labels, condition_numbers, condition)
        if sum(value is not None for value in given) != 1:
            raise InputError("expected one of prompt, prompt_embeds, class_labels, condition_numbers and condition")
        check_call(
            student,
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            callback_inputs=callback_on_step_end_tensor_inputs,
            output_type=output_type,
        )
        warn_of_ignored(student, negative_prompt, guidance_scale, true_cfg_scale)
        if prompt is not None:
            texts = [prompt] if isinstance(prompt, str) else prompt
            if not isinstance(texts, Sequence) or not all(isinstance(one, str) for one in texts):
                raise InputError(f"prompt is {prompt!r:.60}; expected a text or a list of texts")
            condition = encode_prompts(self._text_encoder(), texts, text_of(student).constants)
        elif prompt_embeds is not None:
            mask = prompt_attention_mask if prompt_embeds_mask is None else prompt_embeds_mask
            condition = given_embeddings(student, prompt_embeds, pooled_prompt_embeds, mask)
        elif condition is None:
            wanted: Sequence[int | str] | None = condition_numbers if class_labels is None else class_labels
            assert wanted is not None
            condition = student.require_conditions().take(numbers_of(wanted, student))
        condition = condition.repeat(num_images_per_prompt).to(device)
        if sample_shape is None:
            sample_shape = tuple(latents.shape[1:]) if latents is not None else shape_of_pixels(student, height, width)
        shape = (condition.batch_size, *student.trained_shape(sample_shape))
        if latents is None:
            if isinstance(generator, list) and len(generator) != shape[0]:
                raise InputError(f"generator is a list of {len(generator)}; expected one generator, or {shape[0]} of them")
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise InputError(f"latents of shape {tuple(latents.shape)}; expected {shape}")
        times = student.config.grid_of(shape[1:]).embed_times
        with self.progress_bar(total=student.num_steps) as bar:
            for step, prediction in enumerate(self.student.rollout(latents.to(device), condition)):
                sample = prediction.float()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, times[step], {"latents": sample})
                bar.update()
        if output_type != "latent":
            sample = self._images(sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=sample) if return_dict else (sample,)

    def enable_sequential_cpu_offload(self, *arguments: Any, **options: Any) -> None:
        """Refused: a student's steps use the weights of several layers at once."""
        raise InputError(
            "enable_sequential_cpu_offload: the steps of a student use weights of several layers at once; "
            "use enable_model_cpu_offload, which moves whole components"
        )

    def _text_encoder(self) -> PipelineTextEncoder:
        text = text_of(self.student.student)
        components = {name: getattr(self, name, None) for name in TEXT_COMPONENTS}
        if components["tokenizer"] is None or components["text_encoder"] is None:
            raise InputError(
                "prompt: this pipeline has no text encoders; use ARDPipeline.from_pretrained, or pass prompt_embeds"
            )
        return PipelineTextEncoder.of_components(
            PIPELINES[text.pipeline],
            {name: one for name, one in components.items() if one is not None},
            max_sequence_length=text.max_sequence_length,
            device=self._execution_device,
            transformer=getattr(self.student.student.config.network, "transformer", None),
        )

    def _images(self, sample: torch.Tensor, output_type: str) -> Any:
        if self.vae is not None:
            sample = LatentCodec(self.vae).decode(sample)
        elif sample.ndim != 4 or sample.shape[1] not in (1, 3):
            raise InputError(
                f"this student draws samples of shape {tuple(sample.shape[1:])} and has no VAE; pass vae=…, or use "
                "output_type='latent'"
            )
        images = (sample / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array


def _dtype_of(options: Mapping[str, Any]) -> Any:
    # diffusers is renaming torch_dtype to dtype and passes on either.
    return options.get("dtype") or options.get("torch_dtype")


def _cast(student: Student, options: Mapping[str, Any]) -> Student:
    dtype = _dtype_of(options)
    return student.to(dtype) if isinstance(dtype, torch.dtype) else student


def _dtypes_of_encoders(student: Student) -> dict[str, torch.dtype]:
    """Dtypes of a pipeline's components, as diffusers takes them: text encoders are read as for the trajectories' prompts."""
    told = None if student.config.text is None else student.config.text.read_with.get("dtype")
    return {} if told is None else {name: getattr(torch, told) for name in TEXT_COMPONENTS if name.startswith("text_encoder")}
