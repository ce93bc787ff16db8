"""What the report calls operations, shapes and providers. A name that is not listed here is shown as in the records."""

from collections.abc import Callable

OPERATIONS = {
    "attention": "Attention, packed samples",
    "attention_build": "Attention, packed samples, ranges or masks included",
    "attention_gqa": "Attention, packed samples, grouped queries",
    "attention_images": "Attention, packed samples, image tokens see each other",
    "attention_images_build": "Attention, image tokens see each other, ranges or masks included",
    "attention_sample": "Attention, one sample",
    "attention_tower": "Attention of the vision tower",
    "cache_write": "Cache write with rotary embedding",
    "decode_attention": "Attention of one new token",
    "decode_attention_gqa": "Attention of one new token, grouped queries",
    "gelu": "GELU",
    "host_decoding_dynamic": "Host time of a decoding step, dynamic cache (launches left out)",
    "host_decoding_static": "Host time of a decoding step, static cache (launches left out)",
    "host_tower": "Host time of tower and projector (launches left out)",
    "image_rows": "Decoded images to rows of the language model",
    "int8_attention": "Attention of one new token, int8 cache",
    "layer_norm": "LayerNorm with residual",
    "loss": "Head and cross entropy",
    "loss_frozen_head": "Head and cross entropy, head frozen",
    "merge": "Token embeddings and image features",
    "patch_embed": "Patch embedding",
    "projector": "Projector",
    "quick_gelu": "QuickGELU",
    "resize": "Resizing images",
    "rms_norm": "RMSNorm with residual",
    "rotary": "Rotary embedding",
    "swiglu": "SwiGLU",
    "tower": "Vision tower",
    "train_step_full": "Training step, stage 2: language model and projector",
    "train_step_projector": "Training step, stage 1: projector",
}

THREADS = {"one_thread": "one thread", "two_threads": "two threads"}
GENERATION = {
    "decoding": "One decoding step",
    "generate": "Answers of 32 tokens to text",
    "generate_image": "Answers of 32 tokens about an image",
    "prefill": "Prefill of a prompt with an image",
}
OPERATIONS |= {
    f"{op}_{key}": f"{title}, {threads}" for op, title in GENERATION.items() for key, threads in THREADS.items()
}

PROVIDERS = {
    "reference": "llava-fast",
    "triton": "llava-fast (Triton)",
    "triton-device": "llava-fast (Triton, resizing too)",
    "cuda": "llava-fast (CUDA)",
    "hf": "transformers",
    "hf_rows": "transformers, labelled rows only",
    "torch": "PyTorch",
    "compile": "torch.compile",
    "flash_attn": "flash-attn",
    "flash_attn_3": "FlashAttention-3",
    "flex": "FlexAttention",
    "liger": "Liger",
    "linear": "transformers, convolution as a product",
    "pil": "PIL",
    "sdpa_cudnn": "PyTorch, cuDNN attention",
    "sdpa_flash": "PyTorch, flash attention",
    "varlen": "PyTorch, varlen attention",
    "xformers": "xformers",
}

IMAGE_TOKENS = 576  # of an image of LLaVA-1.5


def count(number: int, noun: str) -> str:
    """`1 image`, `8 images`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _rows(rows: int, width: int) -> str:
    return f"{count(rows, 'token')}, width {width}"


def _tokens(tokens: int, heads: int, dim: int) -> str:
    return f"{count(tokens, 'token')}, {heads} heads of {dim}"


def _pack(batch: int, tokens: int, heads: int, dim: int) -> str:
    return (f"{count(batch, 'pack')} of " if batch > 1 else "") + _tokens(tokens, heads, dim)


def _decode(batch: int, filled: int, heads: int, dim: int) -> str:
    return f"batch of {batch}, {count(filled, 'token')} in the cache, {heads} heads of {dim}"


def _decode_gqa(batch: int, filled: int, heads: int, key_heads: int, dim: int) -> str:
    return f"{_decode(batch, filled, heads, dim)}, {count(key_heads, 'key head')}"


def _loss(rows: int, labelled: int, vocabulary: int, width: int) -> str:
    return f"{rows} tokens, {labelled} with labels, width {width}, vocabulary {vocabulary}"


def _train_step(samples: int, tokens: int, hidden: int, mlp: int, layers: int, vocabulary: int) -> str:
    sample = f"{IMAGE_TOKENS} image + {tokens - IMAGE_TOKENS} text tokens"
    return (f"{samples} × ({sample})" if samples > 1 else sample) + f"; {layers} layers, width {hidden}, MLP {mlp}"


def _generation(batch: int, tokens: int, hidden: int, mlp: int, layers: int, vocabulary: int) -> str:
    return f"batch of {batch}, {count(tokens, 'token')}; {layers} layers, width {hidden}, MLP {mlp}"


def _host(batch: int, tokens: int, width: int, layers: int) -> str:
    return f"{count(tokens, 'token')}; {layers} layers, width {width}"


# The arguments are the dimensions of a record's shape.
SHAPES: dict[str, Callable[..., str]] = {
    "attention": _pack,
    "attention_build": _pack,
    "attention_gqa": lambda batch, tokens, heads, key_heads, dim: (
        f"{_pack(batch, tokens, heads, dim)}, {count(key_heads, 'key head')}"
    ),
    "attention_images": _pack,
    "attention_images_build": _pack,
    "attention_sample": lambda _, tokens, heads, dim: _tokens(tokens, heads, dim),
    "attention_tower": lambda images, tokens, heads, dim: f"{count(images, 'image')} of {_tokens(tokens, heads, dim)}",
    "cache_write": _tokens,
    "decode_attention": _decode,
    "decode_attention_gqa": _decode_gqa,
    "gelu": _rows,
    "host_decoding_dynamic": _host,
    "host_decoding_static": _host,
    "host_tower": _host,
    "image_rows": lambda images, side: f"{count(images, 'image')} of {side} × {side} pixels",
    "int8_attention": _decode_gqa,
    "layer_norm": _rows,
    "loss": _loss,
    "loss_frozen_head": _loss,
    "merge": lambda samples, tokens, width: (
        f"{count(samples, 'sample')} of {IMAGE_TOKENS} image + {tokens - IMAGE_TOKENS} text tokens, width {width}"
    ),
    "patch_embed": lambda images, side, patch, width: (
        f"{count(images, 'image')} of {side} × {side} pixels, patches of {patch} × {patch}, width {width}"
    ),
    "projector": lambda tokens, vision, width: f"{tokens} image tokens, width {vision} to {width}",
    "quick_gelu": _rows,
    "resize": lambda images, side: f"{count(images, 'image')} to {side} × {side} pixels",
    "rms_norm": _rows,
    "rotary": _tokens,
    "swiglu": _rows,
    "tower": lambda images, tokens, width: f"{count(images, 'image')} of {tokens} tokens, width {width}",
    "train_step_full": _train_step,
    "train_step_projector": _train_step,
    **{f"{op}_{threads}": _generation for op in GENERATION for threads in THREADS},
}


def operation(op: str) -> str:
    """`rms_norm` -> `RMSNorm with residual`."""
    return OPERATIONS.get(op, op.replace("_", " ").capitalize())


def provider(name: str) -> str:
    """`reference` -> `llava-fast`."""
    return PROVIDERS.get(name, name)


def case(op: str, shape: str, dtype: str) -> str:
    """`4096x512` of RMSNorm in `bf16` -> `4096 tokens, width 512; bf16`."""
    text = SHAPES[op](*map(int, shape.split("x"))) if op in SHAPES else shape.replace("x", " × ")
    return f"{text}; {dtype}"
