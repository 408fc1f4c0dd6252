"""The built-in text-to-image teacher: a small PixArt of captioned scenes, with a T5 encoder trained along.

It is a folder that diffusers' `PixArtSigmaPipeline` loads with `vae=None`: it draws pixels, so its latents are the pictures.

B pictures · n tokens · P side of a picture in pixels
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from pyard.data.captioned_scenes import SceneSetting, build_tokenizer, scene_batch, tokenizer_tokens
from pyard.data.captioned_scenes.tokenizer import END, MAX_TOKENS, PAD, UNKNOWN
from pyard.errors import InputError
from pyard.storage.files import write_text
from pyard.teachers import SCENES_TEXT
from pyard.teachers.teaching import TrainingSettings, check_share, minimise, taught_once, teaching_device

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
    from transformers import PreTrainedTokenizerFast, T5EncoderModel

_WARM_UP_STEPS = 200
_HEAD_DIM = 32
_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class ScenesTextConfig(TrainingSettings):
    """Settings of `teach`."""

    patch_size: int
    text_hidden_size: int
    text_depth: int
    matrix_learning_rate: float
    caption_dropout: float
    time_mean: float
    size: int
    cells: int
    jitter: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch_size", "text_hidden_size", "text_depth"):
            if getattr(self, name) < 1:
                raise InputError(f"teach: {name} is {getattr(self, name)}; expected at least 1")
        if not self.matrix_learning_rate > 0:
            raise InputError(f"teach: matrix_learning_rate is {self.matrix_learning_rate}; expected more than 0")
        check_share("caption_dropout", self.caption_dropout)
        if self.hidden_size % self.num_heads:
            raise InputError(f"teach: hidden_size is {self.hidden_size}; expected a multiple of num_heads, {self.num_heads}")
        if self.text_hidden_size % _HEAD_DIM:
            raise InputError(f"teach: text_hidden_size is {self.text_hidden_size}; expected a multiple of {_HEAD_DIM}")
        if self.size % self.patch_size:
            raise InputError(f"teach: size is {self.size}; expected a multiple of patch_size, {self.patch_size}")
        self.setting  # noqa: B018 - it checks itself

    @property
    def setting(self) -> SceneSetting:
        """Of the scenes."""
        return SceneSetting(size=self.size, cells=self.cells, jitter=self.jitter)


class Tokens(NamedTuple):
    """Captions as the text encoder takes them."""

    ids: torch.Tensor  # [B, n] int64
    mask: torch.Tensor  # [B, n] int64, 1 where there is a token


class ScenesTextNetwork(nn.Module):
    """The two networks of the teacher, trained as one.

    Args:
        text_encoder: captions to [B, n, text width].
        transformer: velocity of a flow, eps - x0.
    """

    def __init__(self, text_encoder: T5EncoderModel, transformer: PixArtTransformer2DModel):
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Velocities.

        Args:
            noisy: [B, 3, P, P].
            times: [B], 1 noise to 0 data.
            tokens: of B captions.
        """
        texts = self.text_encoder(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state
        predicted: torch.Tensor = self.transformer(
            noisy,
            encoder_hidden_states=texts,
            encoder_attention_mask=tokens.mask,
            timestep=times * 1000,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return predicted

    def save_pretrained(self, path: str | Path) -> None:
        """Write the folder of a pipeline, in float16."""
        path = Path(path)
        for name, part in (("text_encoder", self.text_encoder), ("transformer", self.transformer)):
            part.half().save_pretrained(path / name)
            part.float()
        # transformers loads in the dtype that the file names, diffusers in float32: the two must agree.
        file = path / "text_encoder" / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | {"dtype": "float32"}
        write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
        new_tokenizer().save_pretrained(path / "tokenizer")
        new_scheduler().save_pretrained(path / "scheduler")
        index = {
            "_class_name": "PixArtSigmaPipeline",
            "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "PixArtTransformer2DModel"],
            "vae": [None, None],
        }
        write_text(path / "model_index.json", json.dumps(index, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ScenesTextNetwork:
        """The networks of a folder, in float32."""
        from diffusers import PixArtTransformer2DModel
        from transformers import T5EncoderModel

        return cls(
            T5EncoderModel.from_pretrained(Path(path) / "text_encoder", dtype=torch.float32),
            PixArtTransformer2DModel.from_pretrained(path, subfolder="transformer"),
        ).eval()


def teach(
    out: str | Path,
    *,
    max_steps: int = 4600,
    hidden_size: int = 192,
    depth: int = 6,
    num_heads: int = 6,
    patch_size: int = 4,
    text_hidden_size: int = 128,
    text_depth: int = 2,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    matrix_learning_rate: float = 0.02,
    caption_dropout: float = 0.1,
    time_mean: float = 0.3,
    ema_decay: float = 0.998,
    size: int = 16,
    cells: int = 2,
    jitter: float = 0.5,
    seed: int = 0,
    save_every: int = 250,
    progress: bool = True,
) -> Path:
    """Train a text-to-image teacher on captioned scenes, each of which it sees once.

    A PixArt transformer predicts the velocity of a flow in pixel space from captions that a small T5 encodes; both learn
    together, the empty caption included, for classifier-free guidance. It trains in bfloat16 autocast. The weights that pyard
    ships were made by this function's defaults. A run that was stopped resumes from its last checkpoint and ends with the same
    weights as one that was not; a finished one is left as it is.

    Example: pyard teach scenes-text --out runs/scenes-text

    Args:
        out: the pipeline's folder; while it trains, checkpoints are in the folder of the same name + `.training`.
        max_steps: updates.
        hidden_size: width of the PixArt transformer.
        depth: its layers.
        num_heads: its attention heads.
        patch_size: side of a patch, in pixels.
        text_hidden_size: width of the T5 encoder.
        text_depth: its layers.
        batch_size: pictures per update.
        learning_rate: learning rate of AdamW, which trains embeddings, biases and the layers outside the blocks; both learning
            rates warm up over 200 updates, stay constant, and fall linearly to zero over the second half.
        matrix_learning_rate: learning rate of Muon (Jordan et al. 2024), which trains the matrices of the blocks.
        caption_dropout: share of the pictures whose caption is hidden, so that the network can be guided.
        time_mean: training times are the logistic function of a normal variable of this mean and standard deviation 1.
        ema_decay: decay of the average of the weights that is the result; at update n it is at most
            (1 + n) / (10 + n).
        size: side of a picture in pixels, 16 to 32.
        cells: cells along a side, each of at least 8 pixels.
        jitter: how far objects may be from the middle of their cell, from 0 (not at all) to 1 (as far as the cell has room).
        seed: random seed of the weights, the scenes and the noise.
        save_every: updates between checkpoints.
        progress: show a progress bar.

    Returns:
        The pipeline's folder.

    Raises:
        InputError: a setting out of range, or `out` holds a teacher trained with other settings.
    """
    config = ScenesTextConfig(
        max_steps=max_steps,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        batch_size=batch_size,
        learning_rate=learning_rate,
        ema_decay=ema_decay,
        seed=seed,
        patch_size=patch_size,
        text_hidden_size=text_hidden_size,
        text_depth=text_depth,
        matrix_learning_rate=matrix_learning_rate,
        caption_dropout=caption_dropout,
        time_mean=time_mean,
        size=size,
        cells=cells,
        jitter=jitter,
    )
    taught_once(out, config, lambda working: _train(config, working, save_every, progress), ScenesTextNetwork.from_pretrained)
    return Path(out)


def scenes_text_folder() -> Path:
    """The pipeline folder of the text-to-image teacher that pyard ships: `teach` with its defaults."""
    return SCENES_TEXT


def new_network(config: ScenesTextConfig) -> ScenesTextNetwork:
    """A fresh network from the settings' seed; the caller's random state stays as it is."""
    from diffusers import PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    text = T5Config(
        vocab_size=len(tokenizer_tokens()),
        d_model=config.text_hidden_size,
        d_kv=_HEAD_DIM,
        num_heads=config.text_hidden_size // _HEAD_DIM,
        d_ff=4 * config.text_hidden_size,
        num_layers=config.text_depth,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=3,
            out_channels=3,
            num_layers=config.depth,
            cross_attention_dim=config.hidden_size,
            caption_channels=config.text_hidden_size,
            sample_size=config.size,
            patch_size=config.patch_size,
            use_additional_conditions=False,
        )
        return ScenesTextNetwork(T5EncoderModel(text), transformer)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """The scenes' tokenizer as the pipeline wants it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(), pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=MAX_TOKENS
    )


def new_scheduler() -> DPMSolverMultistepScheduler:
    """The solver of the pipeline: a flow's times, deterministic, with what PixArt's pipeline asks of a scheduler."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=1.0,
        solver_order=2,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
    )


def tokenize(captions: Sequence[str]) -> Tokens:
    """Captions as the text encoder takes them; an empty one is the end of text alone, as in the pipeline."""
    encoded = build_tokenizer().encode_batch(list(captions))
    return Tokens(torch.tensor([text.ids for text in encoded]), torch.tensor([text.attention_mask for text in encoded]))


def _train(config: ScenesTextConfig, working: Path, save_every: int, progress: bool) -> ScenesTextNetwork:
    from diffusers.models.attention_processor import AttnProcessor

    device = teaching_device()
    network = new_network(config).to(device)
    # The backward pass of torch's fused attention takes ten times as long in bfloat16 on a CPU.
    network.transformer.set_attn_processor(AttnProcessor())

    def loss_of(random: torch.Generator) -> torch.Tensor:
        number = int(torch.randint(2**62, (), generator=random))
        batch = scene_batch(number, range(config.batch_size), config.setting)
        hidden = torch.rand(config.batch_size, generator=random) < config.caption_dropout
        tokens = tokenize([caption * (not hide) for caption, hide in zip(batch.captions, hidden.tolist(), strict=True)])
        clean = torch.from_numpy(batch.pictures)
        noise = torch.randn(clean.shape, generator=random)
        times = torch.sigmoid(torch.randn(config.batch_size, generator=random) + config.time_mean)
        noisy = torch.lerp(clean, noise, times[:, None, None, None])
        with torch.autocast(device.type, torch.bfloat16):
            predicted = network(noisy.to(device), times.to(device), Tokens(tokens.ids.to(device), tokens.mask.to(device)))
        return F.mse_loss(predicted.float(), (noise - clean).to(device))

    def rate(peak: float, step: int) -> float:
        return peak * min(1.0, step / _WARM_UP_STEPS, 2 * (1 - step / config.max_steps))

    matrices, others = _split_parameters(network)
    return minimise(
        network,
        loss_of,
        {
            "adamw": torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
            "muon": torch.optim.Muon(matrices, lr=config.matrix_learning_rate, weight_decay=0.0),
        },
        rate,
        config,
        working,
        save_every=save_every,
        progress=progress,
        max_gradient_norm=_MAX_GRADIENT_NORM,
    )


def _split_parameters(network: ScenesTextNetwork) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the blocks, which map activations to activations, and everything else."""
    named = list(network.named_parameters())
    layers = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Linear) and "block" in name}
    return [weight for name, weight in named if name in layers], [weight for name, weight in named if name not in layers]
