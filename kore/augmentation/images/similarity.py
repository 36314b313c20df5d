"""CLIP: how alike two images are, and how well an image fits a text."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import file_sha256
from kore.augmentation.cache import Cache
from kore.errors import ModelError
from kore.fetch import open_image
from kore.models import load_image_processor

if TYPE_CHECKING:
    import numpy
    import torch

_REMEMBERED = 4096


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Clip:
    """Unit embeddings of images and texts by a CLIP model, loaded when they are first asked for.

    On a CPU images go through the model one at a time, so that an embedding does not depend on its neighbours; on a GPU
    in batches. Several threads may use it at once; the model works for one of them at a time.

    Args:
        model: A directory written by ``save_pretrained``, or a hub id.
        device: ``"auto"`` (the first CUDA device, else the CPU) or a torch device name.
        cache: Where image embeddings are kept between runs, by the image's sha256.
        batch_size: Images at a time on a GPU.
    """

    def __init__(self, model: str, device: str = "auto", cache: Cache | None = None, batch_size: int = 32) -> None:
        self._path, self._device, self._cache, self._batch_size = model, device, cache, batch_size
        self._known: dict[str, numpy.ndarray] = {}
        self._lock = threading.Lock()
        self._model: Any = None
        self._processor: Any = None
        self._tokenizer: Any = None
        self._weights = ""

    def identity(self) -> dict[str, str]:
        """The model by its weights. Loads it.

        Raises:
            ModelError: It cannot be loaded.
        """
        with self._lock:
            self._load()
            return {"model": "clip", "weights": self._weights}

    def similarities(self, original: Path, others: Sequence[Path]) -> list[float]:
        """Cosine similarity of each of the others to the original.

        Raises:
            ModelError: The model cannot be loaded.
            DataError: An image cannot be read.
        """
        first, *rest = self.images([original, *others])
        return [float(first.astype("float64") @ other.astype("float64")) for other in rest]

    def images(self, paths: Sequence[Path], shas: Sequence[str] | None = None) -> list[numpy.ndarray]:
        """Unit embeddings of image files, float32. Raises as :meth:`similarities`.

        Args:
            paths: The files.
            shas: The sha256 of each file, where it is known; computed otherwise.
        """
        keys = list(shas) if shas is not None else [file_sha256(path) for path in paths]
        with self._lock:
            missing = {key: path for key, path in zip(keys, paths) if not self._recall(key)}
            for group in _groups(list(missing.items()), self._batch()):
                pixels = [open_image(path) for _, path in group]
                for (key, _), embedding in zip(group, self._embed_images(pixels)):
                    self._known[key] = self._keep(key, embedding)
            found = [self._known[key] for key in keys]
            if len(self._known) > _REMEMBERED:
                self._known.clear()
            return found

    def text(self, text: str) -> numpy.ndarray:
        """The unit embedding of a text, cut to what the model reads. Raises ModelError as :meth:`similarities`."""
        import torch

        with self._lock:
            self._load()
            longest = self._model.config.text_config.max_position_embeddings
            inputs = self._tokenizer([text], return_tensors="pt", truncation=True, max_length=longest)
            inputs = {name: inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
            with torch.inference_mode():
                return _unit(self._model.get_text_features(**inputs))[0]

    def _batch(self) -> int:
        self._load()
        return 1 if self._model.device.type == "cpu" else self._batch_size

    def _embed_images(self, pixels: Sequence[Any]) -> numpy.ndarray:
        import torch

        inputs = self._processor(images=list(pixels), return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            return _unit(self._model.get_image_features(pixel_values=inputs["pixel_values"]))

    def _key(self, sha256: str) -> dict[str, str]:
        return {"model": self._weights, "image": sha256}

    def _recall(self, sha256: str) -> bool:
        if sha256 in self._known:
            return True
        self._load()
        stored = self._cache.get("embedding", self._key(sha256)) if self._cache else None
        if not isinstance(stored, str):
            return False
        self._known[sha256] = _unpack(stored)
        return True

    def _keep(self, sha256: str, embedding: numpy.ndarray) -> numpy.ndarray:
        if self._cache is None:
            return embedding
        return _unpack(self._cache.put("embedding", self._key(sha256), base64.b64encode(embedding.tobytes()).decode()))

    def _load(self) -> None:
        if self._model is not None:
            return
        import torch
        import transformers

        device = ("cuda" if torch.cuda.is_available() else "cpu") if self._device == "auto" else self._device
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._path)
            self._processor = load_image_processor(self._path, pillow=True)
            loaded: Any = transformers.CLIPModel.from_pretrained(self._path, output_loading_info=True)
            model, loading = loaded
            missing = [name for name in loading["missing_keys"] if not name.endswith("position_ids")]
            model = model.float().to(device).eval()
        except Exception as error:
            reason = f"{type(error).__name__}: {_first_line(error)}"
            raise ModelError(f"{self._path}: the CLIP model cannot be loaded ({reason})") from error
        if missing:
            raise ModelError(f"{self._path}: not a whole CLIP model, its checkpoint lacks {missing[0]}")
        self._weights = _fingerprint(model)
        self._model = model


def _groups(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _unit(features: Any) -> numpy.ndarray:
    import torch

    # From transformers 5 on the features come inside an output object.
    tensor: torch.Tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1).cpu().numpy()


def _unpack(text: str) -> numpy.ndarray:
    import numpy

    return numpy.frombuffer(base64.b64decode(text), dtype=numpy.float32)


def _fingerprint(model: Any) -> str:
    """A hash of names, shapes and up to 64 values of each weight."""
    import hashlib

    import torch

    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        index = torch.linspace(0, max(flat.numel() - 1, 0), min(flat.numel(), 64), dtype=torch.float64).long()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(flat[index.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


ClipSimilarity = Clip
"""The :class:`~kore.augmentation.images.choose.Similarity` by CLIP."""
