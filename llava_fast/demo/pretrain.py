"""Pretrain the demo's vision tower and text model: `python -m llava_fast.demo.pretrain [--out DIR]`.

LLaVA starts from a pretrained CLIP tower and Vicuna; the demo starts from the two models that this script trains, and
which ship in `llava_fast/demo/weights`. Neither is trained on questions about pictures:

- The tower is trained like CLIP, with a contrastive loss: a picture against the captions of its batch, and a patch
  against the phrases of all objects ("a red circle at the top left").
- The text model is trained on text: a description of the board, then a caption of it or, in the `v1` template,
  questions and answers about it. The description is a sequence of *slots*, one vector each: the sum of the embeddings
  of an object's words, or of "nothing", in random order, with noise, and with repeated objects. A projector can produce
  similar vectors from patches, so looking up, comparing and counting need not be learned again from pictures.

The weights that ship come from one run of each part with the defaults, in one thread on a machine that was busy with
other things, too: the tower's 1,500 steps took 431 s (last line "tower 1500: loss 0.047"), the text model's 4,500 steps
(`--only text`) 1,888 s ("text 4500: answer loss 0.000, 1888 s"). With them the demo answered all of its 832 questions
about pictures, and 32 % where the pictures were grey.

Held-out scenes are not used. Shapes: B batch, T tokens, N patches, P phrases, D width, W words of a slot.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F

from llava_fast import LlavaConfig, LlavaForConditionalGeneration
from llava_fast.demo import world
from llava_fast.demo.world import Object, Scene
from llava_fast.ops.patch_embed import CLIP_MEAN, CLIP_STD
from llava_fast.processor.templates import get_template

WEIGHTS = Path(__file__).parent / "weights"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
SLOT_WORDS = 3  # colour, shape, place

VISION_CONFIG: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 64,
    "patch_size": 16,
    "projection_dim": 64,
}
TEXT_CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.12,  # the usual 0.02 is too small for a narrow model
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": SPECIAL_TOKENS.index("<s>"),
    "eos_token_id": SPECIAL_TOKENS.index("</s>"),
    "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where `tower` and `text` are written")
    parser.add_argument("--tower-steps", type=int, default=1500)
    parser.add_argument("--text-steps", type=int, default=4500)
    parser.add_argument("--only", choices=("tower", "text"), help="leave the other part as it is")
    options = parser.parse_args()
    if options.only != "text":
        pretrain_tower(options.out / "tower", options.tower_steps)
    if options.only != "tower":
        pretrain_text(options.out / "text", options.text_steps)


def untrained(vocab_size: int) -> LlavaForConditionalGeneration:
    """A LLaVA of the demo's size; its tower and its language model are trained separately."""
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=VISION_CONFIG, text_config={**TEXT_CONFIG, "vocab_size": vocab_size})
    return LlavaForConditionalGeneration(config).train()


def _schedule(step: int, steps: int) -> float:
    """Learning rate as a share of the peak: linear warm-up over 2 % of the steps, decay to zero over the last 40 %."""
    return min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.4 * steps))


def _save(folder: Path, weights: dict[str, torch.Tensor], config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.detach().half().contiguous() for name, tensor in weights.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------ the vision tower


PHRASES = tuple(
    [world.phrase(Object(p, c, s)) for p in range(len(world.PLACES)) for c in world.COLOURS for s in world.SHAPES]
)
NOTHING = len(PHRASES)  # the index of the phrase "nothing"
_PHRASE_INDEX = {phrase: i for i, phrase in enumerate(PHRASES)}


class CaptionEncoder(nn.Module):
    """The text encoder of the contrastive loss, not saved: encodes phrases, and captions as sets of phrases."""

    def __init__(self, width: int, shared: int) -> None:
        super().__init__()
        vocabulary = sorted({word for phrase in PHRASES for word in phrase.split()} | {"nothing"})
        index = {word: i for i, word in enumerate(vocabulary)}
        counts_PW = torch.zeros(len(PHRASES) + 1, len(vocabulary))
        for i, phrase in enumerate([*PHRASES, "nothing"]):
            for word in phrase.split():
                counts_PW[i, index[word]] += 1
        self.register_buffer("counts_PW", counts_PW)
        self.words = nn.Linear(len(vocabulary), 128)
        nn.init.normal_(self.words.weight, std=0.5)
        self.phrase = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, shared))
        self.part = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 256))
        self.caption = nn.Linear(256, shared)
        self.patch_projection = nn.Linear(width, shared)
        self.picture_projection = nn.Linear(width, shared)
        self.log_scales = nn.Parameter(torch.full((2,), math.log(10.0)))

    def forward(self, states_BND: torch.Tensor, phrases_BN: torch.Tensor, parts_BP: torch.Tensor) -> torch.Tensor:
        """The contrastive loss of a batch.

        Args:
            states_BND: the tower's last hidden state, CLS first.
            phrases_BN: index of the phrase for each patch.
            parts_BP: 1 for each phrase of a picture's caption.
        """
        words = self.words(self.counts_PW)
        phrase_PE = F.normalize(self.phrase(words), dim=-1)
        patch_BNE = F.normalize(self.patch_projection(states_BND[:, 1:]), dim=-1)
        logits = (patch_BNE @ phrase_PE.T * self.log_scales[0].exp()).flatten(0, 1)
        # Most patches show nothing, so they get a smaller weight.
        weight = torch.ones(len(PHRASES) + 1)
        weight[NOTHING] = 0.3
        local = F.cross_entropy(logits, phrases_BN.flatten(), weight)

        caption_BE = F.normalize(self.caption(parts_BP @ self.part(words)), dim=-1)
        picture_BE = F.normalize(self.picture_projection(states_BND[:, 0]), dim=-1)
        logits_BB = picture_BE @ caption_BE.T * self.log_scales[1].exp()
        same = torch.arange(len(logits_BB))
        return local + (F.cross_entropy(logits_BB, same) + F.cross_entropy(logits_BB.T, same)) / 4


def patch_phrases(scene: Scene, seed: int) -> np.ndarray:
    """[N] int64: for each patch of the rendered scene the phrase of the object that covers most of it."""
    side = VISION_CONFIG["image_size"] // VISION_CONFIG["patch_size"]
    width = world.PICTURE_PX / side
    low = np.arange(side) * width
    phrases = np.full((side, side), NOTHING)
    most = np.full((side, side), 0.06)  # a smaller share counts as nothing
    for o, placed in zip(scene, world.layout(scene, seed), strict=True):

        def overlap(centre: float, radius: float = placed.radius) -> np.ndarray:
            return np.clip(np.minimum(low + width, centre + radius) - np.maximum(low, centre - radius), 0, None) / width

        share = overlap(placed.y)[:, None] * overlap(placed.x)
        phrases[share > most] = _PHRASE_INDEX[world.phrase(o)]
        most = np.maximum(most, share)
    return phrases.ravel()


def tower_batch(rng: random.Random, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 pixels [B, H, W, 3], patch phrases [B, N] and caption phrases [B, P] of random training scenes."""
    side = VISION_CONFIG["image_size"]
    pixels, phrases, parts_BP = [], [], torch.zeros(size, len(PHRASES) + 1)
    for i in range(size):
        scene, seed = world.sample_scene(rng, held=False), rng.getrandbits(32)
        pixels.append(np.asarray(world.render(scene, seed).resize((side, side), Image.Resampling.BICUBIC)))
        phrases.append(patch_phrases(scene, seed))
        parts_BP[i, [_PHRASE_INDEX[world.phrase(o)] for o in scene]] = 1
    return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(phrases)), parts_BP


def pretrain_tower(folder: Path, steps: int, batch_size: int = 168) -> None:
    """Train a CLIP vision tower with a contrastive loss and write it as a CLIPVisionModel directory."""
    model = untrained(len(SPECIAL_TOKENS))
    tower = model.model.vision_tower
    captions = CaptionEncoder(VISION_CONFIG["hidden_size"], VISION_CONFIG["projection_dim"])
    optimizer = torch.optim.AdamW([*tower.parameters(), *captions.parameters()], betas=(0.9, 0.98), weight_decay=0.02)
    rng = random.Random(1)
    for step in track(range(steps), "vision tower"):
        pixels, phrases_BN, parts_BP = tower_batch(rng, batch_size)
        states, _ = tower(pixels, VISION_CONFIG["num_hidden_layers"], mean=CLIP_MEAN, std=CLIP_STD)
        loss = captions(tower.post_layernorm(states[-1]), phrases_BN, parts_BP)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * _schedule(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"tower {step + 1}: loss {loss.item():.3f}", flush=True)
    config = {"architectures": ["CLIPVisionModel"], **VISION_CONFIG}
    _save(folder, {f"vision_model.{name}": weight for name, weight in tower.state_dict().items()}, config)


# -------------------------------------------------------------------------------------------- the text model


def build_tokenizer() -> Tokenizer:
    """One token per word, "top-left" included, with its leading space as in GPT-2, so that decoding is exact."""
    words_and_marks = Regex(r" ?[\p{L}'-]+| ?[^\s\p{L}]|\s")
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words_and_marks, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rng = random.Random(0)
    template = get_template("v1")
    words: set[str] = set()

    def add(text: str) -> None:
        words.update(token for token, _ in split.pre_tokenize_str(text))

    for scene in world.scenes(0, 2000, held=False):
        questions = world.ask(scene, rng, len(world.KINDS))
        turns = [text for q in questions for text in (q.text, q.answer)]
        for turn in "".join(text for text, _ in template.pieces(turns)).split("</s>"):
            add(turn)
        add(f"USER: \n{questions[0].text}\n")
        add(world.caption(scene, rng))
        add(f" {world.caption(scene, rng)}")
    for word in ("nothing", *world.COLOURS, *world.SHAPES, *world.PLACES):
        add(word)
        add(f" {word}")
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return tokenizer


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "additional_special_tokens": ["<image>"],
    "clean_up_tokenization_spaces": False,
    "model_max_length": TEXT_CONFIG["max_position_embeddings"],
}

Slot = list[int]  # token ids whose embeddings are summed; a text token is a slot with one id


@dataclass
class TextSample:
    slots: list[Slot]
    labels: list[int]  # the token at each position, −1: no loss
    answers: list[bool]  # whether the token belongs to an answer or caption, not to a question


class TextWorld:
    """Training text for the text model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids = lru_cache(maxsize=None)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids))
        self.bos, self.eos = (SPECIAL_TOKENS.index(token) for token in ("<s>", "</s>"))
        self.system = get_template("v1").system

    def captioning(self, rng: random.Random) -> TextSample:
        """A description of up to three objects, then a caption of it, as in stage 1; trains look-up from slots."""
        scene = world.sample_scene(rng, held=False, weights=(1, 1, 1))
        sample = TextSample([], [], [])
        self._add(sample, [[self.bos], *self._slots(scene, rng)])
        self._learn(sample, self.ids(world.caption(scene, rng) + "\n"), answer=True)
        return sample

    def conversation(self, rng: random.Random, questions: int = 7) -> TextSample:
        """A description, then questions about it and their answers."""
        scene = world.sample_scene(rng, held=False)
        sample = TextSample([], [], [])
        # The system prompt is always the same 30 tokens, so 20 % of the samples are enough.
        opening = f"{self.system} USER: " if rng.random() < 0.2 else " USER: "
        self._add(sample, [[self.bos], *([i] for i in self.ids(opening)), *self._slots(scene, rng)])
        between = "\n"
        # All other questions can be answered by colour or place. Without more of these nothing is looked up by shape.
        asked = {q.text: q for q in [*world.ask(scene, rng, questions), *world.colours_by_shape(scene)]}
        for question in rng.sample(list(asked.values()), len(asked)):
            self._learn(sample, self.ids(f"{between}{question.text} ASSISTANT:"), answer=False)
            self._learn(sample, (*self.ids(f" {question.answer}"), self.eos), answer=True)
            between = "USER: "
        return sample

    def _slots(self, scene: Scene, rng: random.Random, count: int = 16) -> list[Slot]:
        """As many slots as a picture has patches: one to four for each object, the others nothing."""

        def words(text: str) -> Slot:
            return [i for word in text.split() for i in self.ids(f" {word}")]

        slots = []
        for o in scene:
            slots += [words(f"{o.name} {world.PLACES[o.place]}")] * rng.randint(1, min(4, count // len(scene) - 1))
        empty = world.empty_places(scene)
        while len(slots) < count:
            slots.append(words(f"nothing {world.PLACES[rng.choice(empty)]}" if rng.random() < 0.5 else "nothing"))
        rng.shuffle(slots)
        return slots

    @staticmethod
    def _add(sample: TextSample, slots: Iterable[Slot]) -> None:
        for slot in slots:
            sample.slots.append(slot)
            sample.labels.append(-1)
            sample.answers.append(False)

    @staticmethod
    def _learn(sample: TextSample, ids: Iterable[int], answer: bool) -> None:
        for i in ids:
            sample.slots.append([i])
            sample.labels.append(i)
            sample.answers.append(answer)


def text_batch(samples: list[TextSample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots [B, T, W] (−1: no word), labels [B, T] (−1: none) and answer flags [B, T], padded on the right."""
    shape = (len(samples), max(len(sample.slots) for sample in samples))
    slots = np.full((*shape, SLOT_WORDS), -1)
    labels, answers = np.full(shape, -1), np.zeros(shape, bool)
    for i, sample in enumerate(samples):
        for j, slot in enumerate(sample.slots):
            slots[i, j, : len(slot)] = slot
        labels[i, : len(sample.labels)] = sample.labels
        answers[i, : len(sample.answers)] = sample.answers
    return torch.from_numpy(slots), torch.from_numpy(labels), torch.from_numpy(answers)


def embed_slots(table_VD: torch.Tensor, slots_BTW: torch.Tensor) -> torch.Tensor:
    """[B, T, D]: summed word embeddings; sums of several words are scaled and noisy, like a projector's outputs."""
    present = slots_BTW >= 0
    embeds_BTD = (F.embedding(slots_BTW.clamp(min=0), table_VD) * present[..., None]).sum(2)
    scale = torch.empty_like(embeds_BTD[..., :1]).uniform_(0.5, 1.3)
    blur = 0.3 * table_VD.detach().std() * torch.randn_like(embeds_BTD)
    return torch.where(present.sum(2, keepdim=True) > 1, embeds_BTD * scale + blur, embeds_BTD)


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    The text model learns to look up slots in far fewer steps than with AdamW. torch.optim.Muon iterates in bf16, which
    is slow on most CPUs; this one uses fp32, and batches matrices of the same shape.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # the stub wants an overload per closure
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(tuple(matrix.shape), []).append(matrix)
            for (rows, columns), matrices in by_shape.items():
                updates = torch.stack([self._momentum(matrix, group["momentum"]) for matrix in matrices])
                updates = _orthogonal(updates if rows <= columns else updates.mT)
                updates = updates if rows <= columns else updates.mT
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _momentum(self, matrix: nn.Parameter, momentum: float) -> torch.Tensor:
        assert matrix.grad is not None
        average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
        average.lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(average, momentum)


def _orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration, quintic, with the coefficients of the Muon authors."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def text_optimizers(model: LlavaForConditionalGeneration) -> Iterator[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of the layers, AdamW for embeddings, head and norms; each with its peak rate."""
    layers = list(model.model.language_model.layers.parameters())
    rest = [model.model.language_model.embed_tokens.weight, model.model.language_model.norm.weight]
    rest += [model.lm_head.weight, *(p for p in layers if p.ndim == 1)]
    yield Muon([p for p in layers if p.ndim == 2], lr=0.005), 0.005
    yield torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0), 1e-3


def pretrain_text(folder: Path, steps: int, batch_size: int = 16) -> None:
    """Train the text model on text and write it, every 500 steps, as a Llama directory with its tokenizer."""
    tokenizer = build_tokenizer()
    model = untrained(tokenizer.get_vocab_size())
    table = model.model.language_model.embed_tokens.weight
    text = TextWorld(tokenizer)
    optimizers = list(text_optimizers(model))
    rng = random.Random(2)
    started = time.perf_counter()
    for step in track(range(steps), "text model"):
        # Captions first and conversations later, in random alternation.
        if rng.random() < 0.3 * (1 - step / steps):
            samples = [text.captioning(rng) for _ in range(2 * batch_size)]
        else:
            samples = [text.conversation(rng) for _ in range(batch_size)]
        slots_BTW, labels_BT, answers_BT = text_batch(samples)
        # Samples are padded on the right and attention is causal: no mask is needed.
        hidden_BTD = model.model(inputs_embeds=embed_slots(table, slots_BTW), use_cache=False).last_hidden_state
        learned = labels_BT[:, 1:] >= 0
        losses = F.cross_entropy(
            model.lm_head(hidden_BTD[:, :-1][learned]), labels_BT[:, 1:][learned], reduction="none"
        )
        is_answer = answers_BT[:, 1:][learned]
        loss = torch.where(is_answer, losses, 0.5 * losses).sum() / is_answer.sum()
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * _schedule(step, steps)
        model.zero_grad()
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"text {step + 1}: answer loss {losses[is_answer].mean():.3f}, {seconds:.0f} s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            _save_text(folder, model, tokenizer)


def _save_text(folder: Path, model: LlavaForConditionalGeneration, tokenizer: Tokenizer) -> None:
    weights = {f"model.{name}": weight for name, weight in model.model.language_model.state_dict().items()}
    weights["lm_head.weight"] = model.lm_head.weight
    config = {"architectures": ["LlamaForCausalLM"], **TEXT_CONFIG, "vocab_size": tokenizer.get_vocab_size()}
    _save(folder, weights, config)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
