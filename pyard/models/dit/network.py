"""A class-conditional diffusion transformer with adaLN-Zero (Peebles & Xie 2023, section 3.2 and figure 3).

A student reuses every part: all tensors have a dimension S of steps, which is 1 in a teacher.

    B batch · S steps · T tokens per step · D hidden · H heads · P patch · C channels
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from pyard import ops
from pyard.conditions import Condition
from pyard.errors import InputError
from pyard.models.backbone import AttentionShape, Backbone, Denoiser
from pyard.models.dit.config import DiTConfig
from pyard.models.history import History

# (q, k, v), each [B, H, S*T, Dh], to [B, H, S*T, Dh]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def patchify(x: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[..., C, H, W] to tokens [..., T, C*P*P], row by row, channels first in a token."""
    *lead, channels, height, width = x.shape
    rows, columns = height // patch_size, width // patch_size
    x = x.reshape(*lead, channels, rows, patch_size, columns, patch_size)
    x = x.movedim((-4, -2), (-5, -4))  # [..., H/P, W/P, C, P, P]
    return x.reshape(*lead, rows * columns, channels * patch_size**2)


def unpatchify(tokens: torch.Tensor, patch_size: int, channels: int) -> torch.Tensor:
    """Tokens [..., T, P*P*C], channels last in a token (DiT's order), to [..., C, H, W]."""
    *lead, count, _ = tokens.shape
    side = int(count**0.5)
    x = tokens.reshape(*lead, side, side, patch_size, patch_size, channels)  # [..., h, w, p, q, C]
    x = x.movedim(-1, -5).movedim(-2, -3)  # [..., C, h, p, w, q]
    return x.reshape(*lead, channels, side * patch_size, side * patch_size)


def sincos_position_embedding(side: int, dim: int) -> torch.Tensor:
    """Fixed 2-D embedding [side*side, dim]: the first half of the channels encodes the column, the second the row."""
    place = torch.arange(side, dtype=torch.float64)
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = place[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, dim/2]
    columns = axis[None].expand(side, side, -1)
    rows = axis[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, dim).float()


def without_variance(head: Mapping[str, torch.Tensor], patch_size: int, channels: int) -> dict[str, torch.Tensor]:
    """The tensors of a head with the rows of its first C output channels only."""
    kept = dict(head)
    for name in ("linear.weight", "linear.bias"):
        rows = head[name].unflatten(0, (patch_size**2, -1))  # channels are last in a token
        kept[name] = rows[:, :channels].flatten(0, 1).clone()
    return kept


class TimeEmbedding(nn.Module):
    """Times to conditioning vectors: sinusoids, then a two-layer MLP."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.frequency_size, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, times: torch.Tensor) -> torch.Tensor:  # [...] -> [..., D]
        config = self.config
        times = times * config.time_scale + config.time_offset
        sinusoids = ops.timestep_embedding(times, config.frequency_size, freq_shift=config.freq_shift)
        return self.fc2(F.silu(self.fc1(sinusoids.to(self.fc1.weight.dtype))))


class Attention(nn.Module):
    """Multi-head self-attention; the caller provides the attention pattern."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, attend: Attend | None) -> torch.Tensor:  # [B, S, T, D] -> [B, S, T, D]
        batch, steps, tokens, hidden = x.shape
        # Without a history every step is a sample of its own, so S folds into the batch.
        rows = (batch * steps, tokens) if attend is None else (batch, steps * tokens)
        qkv = self.qkv(x).view(*rows, 3, self.num_heads, hidden // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [rows, H, tokens, Dh]
        out = ops.block_attention(q, k, v, tokens) if attend is None else attend(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, steps, tokens, hidden))


class Block(nn.Module):
    """adaLN-Zero block: modulated LayerNorm, attention, gate; modulated LayerNorm, MLP, gate."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        assert config.mlp_norm_eps is not None
        self.eps, self.mlp_eps = config.norm_eps, config.mlp_norm_eps
        self.modulation = nn.Linear(config.hidden_size, 6 * config.hidden_size)
        self.attention = Attention(config)
        mlp_size = round(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, config.hidden_size)

    def forward(
        self,
        x: torch.Tensor,  # [B, S, T, D]
        condition: torch.Tensor,  # [B, S, D], after SiLU
        attend: Attend | None = None,
        modulation: torch.Tensor | None = None,  # [B, S, 6D]: self.modulation(condition), where it is known already
    ) -> torch.Tensor:  # [B, S, T, D]
        modulation = self.modulation(condition) if modulation is None else modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        dtype = ops.dtype_of_linears(x)  # norms come as the linear layers behind them want them
        branch = self.attention(ops.modulated_layer_norm(x, shift1, scale1, self.eps, dtype), attend)
        x, normal = ops.gated_residual_modulated_layer_norm(x, gate1, branch, shift2, scale2, self.mlp_eps, dtype)
        hidden = self._activate(normal)
        return ops.gated_residual(x, gate2, self.fc2(hidden))

    def _activate(self, x: torch.Tensor) -> torch.Tensor:  # [B, S, T, D] -> [B, S, T, mlp]
        # An adapter that stands in for the layer (LoRA) does more than multiply by its weight.
        if type(self.fc1) is nn.Linear and ops.takes_native("gelu_tanh", x):
            return ops.gelu_tanh(F.linear(x, self.fc1.weight), self.fc1.bias)
        return F.gelu(self.fc1(x), approximate="tanh")


class Head(nn.Module):
    """Final layer: modulated LayerNorm and a linear map to patches."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        assert config.out_channels is not None
        self.eps = config.norm_eps
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:  # [B,S,T,D], [B,S,D] -> [B,S,T,P*P*C_out]
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.linear(ops.modulated_layer_norm(x, shift, scale, self.eps, ops.dtype_of_linears(x)))


class Trunk(Backbone):
    """Everything of a DiT below its head: embeddings and blocks, for any number of steps."""

    config_class = DiTConfig
    row_arguments = ("x", "condition", "modulation")
    folds_steps = False
    config: DiTConfig
    pos_embed: torch.Tensor

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        side = config.input_size // config.patch_size
        self.patch_embed = nn.Linear(config.in_channels * config.patch_size**2, config.hidden_size)
        self.register_buffer("pos_embed", sincos_position_embedding(side, config.hidden_size))
        self.time_embed = TimeEmbedding(config)
        self.label_embed = nn.Embedding(config.num_classes + config.has_null_label, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(
        self,
        x: torch.Tensor,  # [B, S, C, H, W]
        times: torch.Tensor,  # [B or 1, S]
        condition: Condition,  # label int64 [B]
        heads: Sequence[nn.Module],  # S of them, or one
        history: History | None = None,
    ) -> torch.Tensor:  # [B, S, C_out, H, W]
        known = "step_vectors" in condition  # by `prepare`
        vectors = condition["step_vectors"] if known else self.step_vectors(times, condition["label"])
        modulations = [condition[f"modulation.{i}"] for i in range(len(self.blocks))] if known else None
        tokens = self.run_blocks(self.embed(x.to(self.patch_embed.weight.dtype)), vectors, history, modulations)
        return self.unembed(run_heads(heads, tokens, vectors), self.config.sample_shape)

    @property
    def dit_blocks(self) -> list[Block]:
        """The blocks, typed as `Block`."""
        return [cast(Block, block) for block in self.blocks]

    def embed(self, x: torch.Tensor) -> torch.Tensor:  # [B, S, C, H, W] -> [B, S, T, D]
        return self.patch_embed(patchify(x, self.config.patch_size)) + self.pos_embed

    def unembed(self, tokens: torch.Tensor, sample_shape: tuple[int, ...]) -> torch.Tensor:  # [..., T, P*P*C] -> [..., C, H, W]
        return unpatchify(tokens, self.config.patch_size, tokens.shape[-1] // self.config.patch_size**2)

    def step_vectors(self, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # [B or 1, S], [B] -> [B, S, D]
        """Embedding of time and class for every step, after SiLU: the input of every adaLN layer."""
        return F.silu(self.time_embed(times) + self.label_embed(labels)[:, None])

    def conditioning(self, times: torch.Tensor, condition: Condition) -> torch.Tensor:  # [B], B rows -> [B, D]
        return self.step_vectors(times[:, None], condition["label"])[:, 0]

    def run_blocks(
        self,
        x: torch.Tensor,  # [B, S, T, D]
        vectors: torch.Tensor,  # [B, S, D]
        history: History | None = None,
        modulations: Sequence[torch.Tensor] | None = None,  # L times [B, S, 6D]; None: each block computes its own
    ) -> torch.Tensor:  # [B, S, T, D]
        """Run the blocks; the lowest ones attend to the history, the others within each step."""
        remembering = 0 if history is None else history.layers
        for i, block in enumerate(self.blocks):
            attend = None if history is None or i >= remembering else functools.partial(history.attend, i)
            x = block(x, vectors, attend, None if modulations is None else modulations[i])
        return x

    def prepare(self, times: torch.Tensor, condition: Condition) -> list[Condition]:
        """Compute the modulations of all steps with one matrix product per block.

        So their weights, a third of a DiT's, are read once.
        """
        vectors = self.step_vectors(times, condition["label"])  # [B, S, D]
        known = {"step_vectors": vectors}
        known |= {f"modulation.{i}": block.modulation(vectors) for i, block in enumerate(self.dit_blocks)}  # [B, S, 6D]
        # Contiguous: BLAS rounds strided rows by their address.
        return [
            Condition({**condition, **{name: tensor[:, s : s + 1].contiguous() for name, tensor in known.items()}})
            for s in range(times.shape[1])
        ]

    def features(
        self,
        x: torch.Tensor,  # [B, C, H, W]
        times: torch.Tensor,  # [B]
        condition: Condition,
        head: nn.Module,
        blocks: Sequence[int],
    ) -> list[torch.Tensor]:  # K times [B, T, D]
        vectors = self.step_vectors(times[:, None], condition["label"])
        tokens, seen = self.embed(x[:, None].to(self.patch_embed.weight.dtype)), {}
        for i, block in enumerate(self.blocks[: max(blocks) + 1]):
            tokens = block(tokens, vectors)
            seen[i] = tokens[:, 0]
        return [seen[i] for i in blocks]

    def attention_shapes(self, layers: int, sample_shape: tuple[int, ...]) -> list[AttentionShape]:
        self.check_sample(sample_shape)
        return [AttentionShape(self.config.num_heads, self.config.tokens_per_step, self.config.head_dim)] * layers

    def new_head(self) -> Head:
        return Head(self.config)

    @classmethod
    def without_weights(cls) -> torch.device:
        return torch.device("meta")

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def has_null_class(self) -> bool:
        return self.config.has_null_label

    def for_student(self, head: nn.Module) -> tuple[Trunk, nn.Module]:
        """Copies of trunk and head without the variance that a teacher may predict: a student's head has C output channels."""
        trunk, config = copy.deepcopy(self), self.config
        if config.out_channels == config.in_channels:
            return trunk, copy.deepcopy(head)
        trunk.config = dataclasses.replace(config, out_channels=config.in_channels)
        with torch.device(next(head.parameters()).device):
            narrow = Head(trunk.config)
        narrow.load_state_dict(without_variance(head.state_dict(), config.patch_size, config.in_channels))
        return trunk, narrow


def dit_trunk(network: Denoiser, wanted: str) -> Trunk:
    """The trunk of a network that must be a DiT; if it is not, the InputError says what needs one."""
    if not isinstance(network.trunk, Trunk):
        raise InputError(f"{wanted}: expected a DiT, found a network of the family {network.trunk.family()}")
    return network.trunk


def run_heads(heads: Sequence[nn.Module], x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Apply each step's head to its tokens: [B, S, T, D], [B, S, D] -> [B, S, T, P*P*C]."""
    if len(heads) == 1:
        tokens: torch.Tensor = heads[0](x, vectors)
        return tokens
    # Steps first, so that every head multiplies contiguous slices: BLAS rounds strided ones by their address, and a
    # resumed run must repeat every bit.
    x, vectors = x.transpose(0, 1).contiguous(), vectors.transpose(0, 1).contiguous()
    per_step = [head(x[s].unsqueeze(1), vectors[s].unsqueeze(1)).squeeze(1) for s, head in enumerate(heads)]
    return torch.stack(per_step).transpose(0, 1)


class DiT(Denoiser):
    """The teacher's network: predicts from x_t, t and class.

    A new one is initialised as adaLN-Zero prescribes: gates and head are zero, so every block is the identity.
    """

    trunk: Trunk
    head: Head

    def __init__(self, config: DiTConfig):
        super().__init__(Trunk(config))
        self._initialise()

    @property
    def config(self) -> DiTConfig:
        """Sizes."""
        return self.trunk.config

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        time = self.trunk.time_embed
        for weight in (self.trunk.label_embed.weight, time.fc1.weight, time.fc2.weight):
            nn.init.normal_(weight, std=0.02)
        modulations = [module.modulation for module in self.modules() if isinstance(module, Block | Head)]
        for layer in (*modulations, self.head.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
