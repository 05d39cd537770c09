"""A model that sees, as mlx-vlm loads it: its language model for batches, its vision tower for the images of a prompt.

mlx_lm's batching calls the language model as it calls any model, on mlx_lm's caches, so that after its prompt a row
with images is a row like others. An image becomes embeddings once; they are kept by its content. Families whose
positions are of several dimensions (mRoPE) go on counting, after an image, from another number than that of the tokens:
the difference lies among the row's caches, so that it joins, leaves and is kept with them.

Only families that were tried are here: for the others a model is what mlx_lm makes of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from mlxd_client.errors import InvalidParams, ModelInvalid

from ..store.safetensors import tensor_types
from .images import Picture
from .templates import rendering

HOW_TO_INSTALL = "install mlxd with its extra `vision` to have images seen"


@dataclass(frozen=True, slots=True)
class Family:
    """`processor` is mlx-vlm's class; `marker` its attribute that names what a template puts for an image; `turned`:
    positions are of several dimensions."""

    processor: str
    marker: str = "image_token"
    turned: bool = False


FAMILIES = {
    "qwen2_vl": Family("Qwen2VLProcessor", turned=True),
    "qwen2_5_vl": Family("Qwen2_5_VLProcessor", turned=True),
    "qwen3_vl": Family("Qwen3VLProcessor", turned=True),
    "gemma3": Family("Gemma3Processor", marker="boi_token"),
    "idefics3": Family("Idefics3Processor"),
    "smolvlm": Family("SmolVLMProcessor"),
}


def family_of(folder: Path, config: dict[str, Any]) -> Family | None:
    """The family of a model that sees; None for others, and where a converter has left out what sees.

    Raises:
        SafetensorsError: a weight file is none.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or not isinstance(config.get("vision_config"), dict):
        return None
    names = (name for file in folder.glob("model*.safetensors") for name in tensor_types(file))
    return family if any("vision" in name or "visual" in name for name in names) else None


def installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("mlx_vlm", "PIL", "requests"))


def load_seeing(folder: Path, config: dict[str, Any], family: Family) -> tuple[LanguageModel, Vision]:
    """The model in `folder`, its weights not yet in memory. Raises what mlx-vlm raises, and ModelInvalid."""
    refuse_sidecars(folder, config)
    utils = importlib.import_module("mlx_vlm.utils")
    kind = config["model_type"]
    processing = importlib.import_module(f"mlx_vlm.models.{kind}.processing_{kind}")
    whole = utils.load_model(folder, lazy=True, trust_remote_code=False)
    processor = getattr(processing, family.processor).from_pretrained(str(folder), trust_remote_code=False)
    return LanguageModel(whole, turned=family.turned), Vision(whole, processor, family)


def refuse_sidecars(folder: Path, config: dict[str, Any]) -> None:
    """Raises ModelInvalid for what mlx-vlm would do at a folder's word: run its code, open files elsewhere, take up
    weight files that nobody checked, or change them."""
    text = config.get("text_config")
    for name, where in (("model_file", config), ("ple_storage", text if isinstance(text, dict) else {})):
        if where.get(name):
            raise ModelInvalid(f"config.json: {name} is not taken from a model's folder", file="config.json")
    if (folder / "offload_index.json").exists():
        raise ModelInvalid("weights that are loaded piece by piece are not taken", file="offload_index.json")
    for file in folder.glob("*.safetensors"):
        if not file.name.startswith("model"):
            raise ModelInvalid("a weight file that is not named model*.safetensors", file=file.name)
        if "F8_E8M0" in tensor_types(file).values():
            raise ModelInvalid("weights of type F8_E8M0 are not taken together with a vision tower", file=file.name)


class LanguageModel(nn.Module):  # type: ignore[misc]
    """What generates in a model that sees, called as mlx_lm calls a model.

    Args:
        whole: mlx-vlm's model, the vision tower included.
        turned: see Family.
    """

    def __init__(self, whole: Any, *, turned: bool) -> None:
        super().__init__()
        self.whole = whole
        self._turned = turned

    @property
    def layers(self) -> Any:
        return self.whole.language_model.layers

    @property
    def vocabulary(self) -> int:
        """Rows of the embeddings: not every config gives them."""
        language = self.whole.language_model
        rows: int = getattr(language, "model", language).embed_tokens.weight.shape[0]
        return rows

    def make_cache(self) -> list[Any]:
        """Caches of mlx_lm, one for each layer; for turned positions one more, with how far they are off."""
        make = getattr(self.whole.language_model, "make_cache", None)
        made = [KVCache() for _ in self.layers] if make is None else [_plain_cache(cache) for cache in make()]
        return [*made, ArraysCache(1)] if self._turned else made

    def __call__(self, tokens: mx.array, cache: list[Any], **seen: Any) -> mx.array:
        """Logits, [rows, tokens, vocabulary].

        Args:
            seen: of tokens that are images in part: inputs_embeds, position_ids and whatever else the family's
                language model takes.
        """
        if self._turned:
            *cache, off = cache
            if off[0] is None:
                off[0] = mx.zeros((tokens.shape[0], 1), dtype=mx.int32)
            if "position_ids" not in seen:
                seen["position_ids"] = _positions(tokens, cache[0].offset, off[0])
        logits: mx.array = self.whole.language_model(tokens, cache=cache, **seen).logits
        return logits


def _positions(tokens: mx.array, offset: Any, off: mx.array) -> mx.array:
    """Positions of text that follows what the caches hold: the same number in each of the three dimensions."""
    rows, length = tokens.shape
    start = (offset[:, None] if isinstance(offset, mx.array) else offset) + off
    return mx.broadcast_to(start + mx.arange(length), (3, rows, length))


def _plain_cache(cache: Any) -> Any:
    """mlx_lm's cache of the same kind: mlx-vlm's are copies of them that batching does not know."""
    name = type(cache).__name__
    if name == "KVCache":
        return KVCache()
    if name == "RotatingKVCache":
        return RotatingKVCache(cache.max_size, keep=cache.keep)
    raise ModelInvalid(f"the model's cache of kind {name} cannot be batched")


Features = tuple[mx.array, ...]


@dataclass(slots=True)
class Sight:
    """The images of one prompt.

    Attributes:
        tokens: the prompt's, with as many for each image as it has embeddings.
        places: where those are among them, in order.
        namespace: of these images in this order; the same tokens mean something else in another.
        inputs: what mlx-vlm's processor made of text and images.
        features: of each image, once looked at: first its embeddings [places, width], then what goes to deeper layers.
    """

    tokens: list[int]
    places: list[int]
    namespace: bytes
    pictures: list[Picture]
    inputs: dict[str, Any]
    keep: bool = True
    features: list[Features] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """How many tokens it takes until the last image is read."""
        return self.places[-1] + 1


class FeatureCache:
    """The features of images by content, within a budget of bytes; those used longest ago go first."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = self.hits = self.misses = 0
        self._kept: OrderedDict[bytes, Features] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, digest: bytes) -> Features | None:
        features = self._kept.get(digest)
        if features is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(digest)
        return features

    def keep(self, digest: bytes, features: Features) -> None:
        weight = _weight(features)
        if digest in self._kept or weight > self.budget_bytes:
            return
        self._kept[digest] = features
        self.nbytes += weight
        while self.nbytes > self.budget_bytes:
            self.nbytes -= _weight(self._kept.popitem(last=False)[1])


class Vision:
    """What turns the images of a prompt into embeddings.

    Args:
        whole: mlx-vlm's model.
        processor: mlx-vlm's, for this family.

    Attributes:
        features: kept ones; the engine says how many bytes of them.
    """

    def __init__(self, whole: Any, processor: Any, family: Family) -> None:
        self._whole = whole
        self._processor = processor
        self._turned = family.turned
        config = whole.config
        index = getattr(config, "image_token_index", None)
        self._token: int = getattr(config, "image_token_id", None) if index is None else index  # type: ignore[assignment]
        self._marker: str = getattr(processor, family.marker)
        # What stands for what is seen once it is expanded, and for what is not taken: no text may bring it along.
        marks = {processor.tokenizer.decode([self._token]), getattr(processor, "video_token", None)}
        self._foreign: list[str] = [mark for mark in marks - {self._marker} if mark]
        self._prepare = importlib.import_module("mlx_vlm.utils").prepare_inputs
        self.features = FeatureCache(0)

    @property
    def template(self) -> str | None:
        """The chat template that lies with the processor."""
        found = getattr(self._processor, "chat_template", None) or self._processor.tokenizer.chat_template
        return found if isinstance(found, str) else None

    def fits(self, tokenizer: Any) -> bool:
        """Whether the chat template takes parts, and puts the marker where an image is."""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "probe"}]}
        text: Any = None
        with contextlib.suppress(Exception), rendering():
            text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        return isinstance(text, str) and text.count(self._marker) == 1 and "probe" in text

    def prepare(self, text: str, pictures: list[Picture], *, keep: bool) -> Sight:
        """What a rendered prompt and its images are to the model; nothing is looked at yet.

        Args:
            keep: features may be kept, and taken from those that are.

        Raises:
            InvalidParams: the text holds the model's own marker, or the processor does not take these images.
        """
        if text.count(self._marker) != len(pictures) or any(mark in text for mark in self._foreign):
            raise InvalidParams("a text holds one of the model's own marks of an image", field="messages")
        inputs = self._process(text, pictures)
        if len(pictures) > 1:
            inputs.pop("pixel_values", None)  # each will be looked at by itself
        tokens: list[int] = inputs["input_ids"][0].tolist()
        places = [index for index, token in enumerate(tokens) if token == self._token]
        if not places or places[-1] == len(tokens) - 1:
            raise ModelInvalid("the model's chat template, or processor, leaves images no place before the answer")
        digest = hashlib.sha256(b"".join(picture.digest for picture in pictures)).digest()
        return Sight(tokens, places, digest, pictures, inputs, keep)

    def look(self, sight: Sight) -> bool:
        """Look at one image, or find it among those that are kept. Returns whether there are more."""
        picture = sight.pictures[len(sight.features)]
        features = self.features.find(picture.digest) if sight.keep else None
        if features is None:
            alone = len(sight.pictures) == 1
            features = self._see(sight.inputs if alone else self._process(self._marker, [picture]))
            mx.eval(features)
            if sight.keep:
                self.features.keep(picture.digest, features)
        sight.features.append(features)
        if len(sight.features) < len(sight.pictures):
            return True
        self._place(sight)
        return False

    def read(self, model: LanguageModel, sight: Sight, cache: list[Any], start: int, end: int) -> None:
        """Read some of the prompt's tokens into caches that hold those before."""
        seen: dict[str, Any] = {"inputs_embeds": sight.kwargs["inputs_embeds"][:, start:end]}
        if self._turned:
            seen["position_ids"] = sight.kwargs["position_ids"][..., start:end]
            cache[-1][0] = sight.kwargs["off"]
        deeper = sight.kwargs["deeper"]
        first, last = (sum(place < at for place in sight.places) for at in (start, end))
        if deeper and last > first:
            seen["visual_pos_masks"] = sight.kwargs["mask"][:, start:end]
            seen["deepstack_visual_embeds"] = [layer[first:last] for layer in deeper]
        model(sight.inputs["input_ids"][:, start:end], cache, **seen)

    def _process(self, text: str, pictures: Iterable[Picture]) -> dict[str, Any]:
        images = [picture.image for picture in pictures]
        try:
            made: dict[str, Any] = self._prepare(self._processor, images=images, prompts=text, add_special_tokens=False)
        except Exception as error:  # sides too long for their width, and what else a processor does not like
            raise InvalidParams(f"the model takes no such image: {error}", field="messages") from None
        return made

    def _see(self, inputs: dict[str, Any]) -> Features:
        """The features of the only image of a prompt."""
        rest = {name: value for name, value in inputs.items() if name not in _NOT_SEEN}
        tokens = inputs["input_ids"]
        made = self._whole.get_input_embeddings(
            tokens, inputs["pixel_values"], mask=inputs.get("attention_mask"), **rest
        )
        places = mx.array([index for index, token in enumerate(tokens[0].tolist()) if token == self._token])
        deeper = made.deepstack_visual_embeds
        return (made.inputs_embeds[0, places], *(() if deeper is None else deeper))

    def _place(self, sight: Sight) -> None:
        """Put the features where they belong in the prompt. Raises InvalidParams where they do not fit."""
        tokens = sight.inputs["input_ids"]
        if sum(features[0].shape[0] for features in sight.features) != len(sight.places):
            raise InvalidParams("a text holds one of the model's own marks of an image", field="messages")
        layers = [mx.concatenate(list(parts)) for parts in zip(*sight.features, strict=True)]
        embeddings = self._whole.get_input_embeddings(tokens, None).inputs_embeds
        embeddings[0, mx.array(sight.places)] = layers[0].astype(embeddings.dtype)
        sight.kwargs |= {"inputs_embeds": embeddings, "deeper": layers[1:], "mask": tokens == self._token}
        if self._turned:
            positions, off = self._whole.language_model.get_rope_index(
                tokens, sight.inputs["image_grid_thw"], None, sight.inputs.get("attention_mask")
            )
            sight.kwargs |= {"position_ids": positions, "off": off.astype(mx.int32)}
        sight.inputs = {"input_ids": tokens}  # the pixels have served


_NOT_SEEN = {"input_ids", "pixel_values", "attention_mask"}


def _weight(features: Sequence[mx.array]) -> int:
    return sum(part.nbytes for part in features)
