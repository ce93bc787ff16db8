"""The CLIP vision tower, computing only the layers whose output is asked for.

Parameter names are those of transformers' CLIPVisionModel (≥ 5.6), so its weights load as they are. LLaVA-1.5 reads
hidden state −2: the last layer and the final LayerNorm are never run; they keep their parameters, frozen.

Both residual adds of a layer are part of the LayerNorm that follows, the next layer's for the second. In evaluation
mode (from `eval()` until `train()` or `state_dict()`) the parameters of q, k and v lie one behind the other in one
storage, and inference computes all three in one GEMM.

Shapes: B images, N = patches + 1 tokens, D width, H heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlavaConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_fast.model.plain import is_plain
from llava_fast.ops.activation import gelu, quick_gelu
from llava_fast.ops.attention import attention, attention_weights_reference
from llava_fast.ops.norm import layer_norm
from llava_fast.ops.patch_embed import patch_embed

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def feature_layers(config: LlavaConfig, override: int | Sequence[int] | None = None) -> list[int]:
    """The hidden states of the tower that make up an image's features."""
    layers = config.vision_feature_layer if override is None else override
    return [layers] if isinstance(layers, int) else list(layers)


class VisionEmbeddings(nn.Module):
    """Owns the embedding parameters; the arithmetic is `ops.patch_embed`, which also needs the pre-LayerNorm."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=False,
        )
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2 + 1, config.hidden_size)

    def position(self, height: int, width: int) -> torch.Tensor:
        """[1 + rows · columns, D] position embeddings for an image of `height` × `width` pixels, bicubically
        interpolated where that is not the size the tower was made for (as CLIPVisionModel does on request)."""
        patch = self.patch_embedding.weight.shape[-1]
        rows, columns = height // patch, width // patch
        table_ND = self.position_embedding.weight
        side = int((table_ND.shape[0] - 1) ** 0.5)
        if (rows, columns) == (side, side):
            return table_ND
        grid = table_ND[1:].view(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat((table_ND[:1], grid.flatten(2)[0].T))


def _adjoining(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
    """Three tensors of one shape as one, if they lie one behind the other in one storage."""
    first, size = q.data_ptr(), q.nbytes
    if k.data_ptr() != first + size or v.data_ptr() != first + 2 * size or not size:
        return None
    alike = q.dtype == k.dtype == v.dtype and q.shape == k.shape == v.shape and q.stride() == k.stride() == v.stride()
    begins = q.storage_offset() * q.element_size()
    if not alike or not q.is_contiguous() or q.untyped_storage().nbytes() < begins + 3 * size:
        return None
    return q.detach().as_strided((3 * q.shape[0], *q.shape[1:]), q.stride())


def _part_first(attention: VisionAttention, *_) -> None:
    """A state dict has no shared storage: safetensors refuses it, and accelerate would leave k and v out."""
    attention._part()


class VisionAttention(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.register_state_dict_pre_hook(_part_first)

    def train(self, mode: bool = True) -> VisionAttention:
        super().train(mode)
        if mode:
            self._part()
        else:
            self._join()
        return self

    def _apply(self, fn, recurse: bool = True) -> VisionAttention:
        joined = self._joined() is not None
        super()._apply(fn, recurse)
        if joined:
            self._join()  # what was moved or converted was so one by one
        return self

    def _tensors(self, name: str) -> list[torch.Tensor]:
        return [getattr(projection, name) for projection in (self.q_proj, self.k_proj, self.v_proj)]

    def _joined(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weight [3 D, D] and bias [3 D] of q, k and v, if theirs lie so and nobody has wrapped them."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            if not is_plain(projection, nn.Linear):
                return None
        weight, bias = _adjoining(*self._tensors("weight")), _adjoining(*self._tensors("bias"))
        return None if weight is None or bias is None else (weight, bias)

    def _join(self) -> None:
        """Give the projections' parameters one storage, where nobody else has a say in where they lie.

        What is not the whole of its storage belongs to somebody, such as the flat buffer of a sharded optimiser.
        """
        if self._joined() is not None or not all(
            is_plain(projection, nn.Linear) for projection in (self.q_proj, self.k_proj, self.v_proj)
        ):
            return
        everything = [*self._tensors("weight"), *self._tensors("bias")]
        if len({(t.dtype, t.device) for t in everything}) > 1 or everything[0].device.type == "meta":
            return
        if any(t.untyped_storage().nbytes() != t.nbytes or not t.is_contiguous() for t in everything):
            return
        for name in ("weight", "bias"):
            tensors = self._tensors(name)
            with torch.inference_mode(False), torch.no_grad():
                parts = torch.cat([t.detach() for t in tensors]).split([t.shape[0] for t in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.data = part

    def _part(self) -> None:
        """Give each projection a storage of its own again: a trained parameter is nobody's view."""
        if self._joined() is not None:
            with torch.inference_mode(False):
                for parameter in [*self._tensors("weight"), *self._tensors("bias")]:
                    parameter.data = parameter.data.clone()

    def _qkv(self, x_BND: torch.Tensor) -> Sequence[torch.Tensor]:
        # A graph of gradients, or of torch.compile, has the three projections in it.
        joined = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else self._joined()
        if joined is None:
            return self.q_proj(x_BND), self.k_proj(x_BND), self.v_proj(x_BND)
        return F.linear(x_BND, *joined).chunk(3, dim=-1)

    def forward(
        self, x_BND: torch.Tensor, start_BN: torch.Tensor, end_BN: torch.Tensor, want_weights: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v = (projected.unflatten(-1, (-1, self.head_dim)) for projected in self._qkv(x_BND))
        out = attention(q, k, v, start_BN, end_BN)
        weights = None
        if want_weights:
            weights = attention_weights_reference(q, k, start_BN, end_BN, self.head_dim**-0.5)[0].to(q.dtype)
        return self.out_proj(out.flatten(2)), weights


class VisionMLP(nn.Module):
    """fc2(act(fc1(x))).

    The bias of fc1 is added by the GEMM as it writes its result, which moves no byte more; the activation then reads
    and writes once. Leaving the bias to the activation would only save a trained tower one read in backward, for its
    sum.
    """

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS.get(config.hidden_act) or ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class VisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        x_BND: torch.Tensor,
        added_BND: torch.Tensor | None,
        start_BN: torch.Tensor,
        end_BN: torch.Tensor,
        want_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The layer's input x + added (a hidden state of the tower), its output as two addends, attention weights."""
        norm1, norm2 = self.layer_norm1, self.layer_norm2
        if added_BND is None:
            y, state = layer_norm(x_BND, norm1.weight, norm1.bias, eps=norm1.eps)
        else:
            y, state = layer_norm(added_BND, norm1.weight, norm1.bias, eps=norm1.eps, residual=x_BND)
        y, weights = self.self_attn(y, start_BN, end_BN, want_weights)
        y, x_BND = layer_norm(y, norm2.weight, norm2.bias, eps=norm2.eps, residual=state)
        return state, x_BND, self.mlp(y), weights


class VisionEncoder(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionTower(nn.Module):
    """CLIP's vision model up to the last hidden state that is needed."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        if config.model_type != "clip_vision_model":
            raise ValueError(
                f"vision_config.model_type is {config.model_type!r}; only 'clip_vision_model' is supported"
            )
        if config.attention_dropout:
            raise ValueError(f"vision_config.attention_dropout is {config.attention_dropout}; only 0 is supported")
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def resolve(self, layer: int) -> int:
        """Index of a hidden state, 0 (after the pre-LayerNorm) to the number of layers, from a possibly negative one.

        Raises:
            ValueError: when there is no such hidden state.
        """
        states = len(self.encoder.layers) + 1
        if not -states <= layer < states:
            raise ValueError(f"vision_feature_layer {layer} is out of range for a tower of {states - 1} layers")
        return layer % states

    def freeze_unused(self, feature_layers: Sequence[int]) -> None:
        """Stop gradients for the parameters that no feature layer depends on."""
        used = max(self.resolve(layer) for layer in feature_layers)
        self.post_layernorm.requires_grad_(False)
        for layer in self.encoder.layers[used:]:
            layer.requires_grad_(False)

    def forward(
        self,
        pixels: torch.Tensor,
        last_layer: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        keep: Sequence[int] | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool = False,
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
        """Hidden states 0 … `last_layer` ([B, N, D] each) and, if asked for, the attention weights of each layer.

        Args:
            pixels: uint8 [B, H, W, 3], or floating [B, 3, H, W] normalised.
            last_layer: index of the last hidden state to compute (see `resolve`).
            mean, std: normalisation of uint8 pixels.
            keep: indices of the hidden states that are wanted; None stands in the place of any other. Default: all.
            interpolate_pos_encoding: accept images of another size than `config.image_size`.
        """
        height, width = pixels.shape[1:3] if pixels.dtype == torch.uint8 else pixels.shape[-2:]
        size = self.config.image_size
        if not interpolate_pos_encoding and (height, width) != (size, size):
            raise ValueError(
                f"pixel_values are {height}×{width}, but the vision tower takes {size}×{size}; "
                "pass interpolate_pos_encoding=True for other sizes"
            )
        x_BND = patch_embed(
            pixels,
            self.embeddings.patch_embedding.weight,
            self.embeddings.class_embedding,
            self.embeddings.position(height, width),
            self.pre_layrnorm.weight,
            self.pre_layrnorm.bias,
            eps=self.pre_layrnorm.eps,
            mean=mean,
            std=std,
        )
        start_BN = torch.zeros(x_BND.shape[:2], dtype=torch.int32, device=x_BND.device)
        end_BN = torch.full_like(start_BN, x_BND.shape[1])
        states, attentions, added_BND = [], [], None
        for layer in self.encoder.layers[:last_layer]:
            if added_BND is not None and layer.gradient_checkpointing and self.training:
                x_BND, added_BND = x_BND + added_BND, None  # what a checkpoint keeps is one tensor, not two
            state, x_BND, added_BND, weights = layer(x_BND, added_BND, start_BN, end_BN, output_attentions)
            states.append(state if keep is None or len(states) in keep else None)
            attentions.append(weights)
        states.append(x_BND if added_BND is None else x_BND + added_BND)
        return states, attentions if output_attentions else []
