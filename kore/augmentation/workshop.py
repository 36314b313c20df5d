"""What the augmentation of an item needs, put together from the configuration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.augmentation.ask import Asker
from kore.augmentation.cache import Cache
from kore.augmentation.config import AugmentConfig
from kore.augmentation.guard import Guard, GuardedAsker, GuardedImages
from kore.augmentation.images import make_images
from kore.augmentation.limits import Accounting, Limits, Prices
from kore.augmentation.results import Results
from kore.augmentation.tasks import make_samples
from kore.augmentation.texts import Texts, load_texts
from kore.augmentation.types import ItemResult, KnowledgeItem

if TYPE_CHECKING:
    from kore.augmentation.types import Generator

IMAGE_STORE = "images"
_MADE_BY = {"tasks", "rounds", "questions", "general", "general_samples", "seed", "attempts"}
# What changes neither answers nor images; what lies at a path is in the identity of the source.
_IMAGE_TRIFLES = {"delay", "timeout", "contact", "device", "path"}


def make_generator(config: AugmentConfig, texts: Texts) -> Generator:
    """The generator that the configuration names."""
    settings = config.generator
    if settings.kind == "rules":
        from kore.augmentation.generators.rules import RulesGenerator

        return RulesGenerator(texts)
    from kore.augmentation import generators

    return generators.make_generator(settings)


@dataclass
class Workshop:
    """Texts, generator, images, cache and limits of one run. Several threads use one."""

    config: AugmentConfig
    texts: Texts
    asker: Asker
    images: Any
    results: Results
    identity: dict[str, Any]

    @classmethod
    def open(cls, config: AugmentConfig, cache: Path, generator: Generator | None = None) -> Workshop:
        """Put it together; ``cache`` is the folder of everything that is kept between runs.

        Raises:
            KoreError: A text, a model or an image source cannot be used.
        """
        texts = load_texts(config.texts)
        generator = generator or make_generator(config, texts)
        kept = Cache(cache)
        settings, limits = config.generator, config.limits
        prices = Prices(settings.price_input or 0.0, settings.price_output or 0.0)
        limit = Limits(
            limits.requests_per_minute,
            limits.tokens_per_minute,
            retries=limits.retries,
            backoff=limits.backoff,
            longest_wait=limits.longest_wait,
            prices=prices,
        )
        asker = Asker(generator, kept, limit, attempts=config.attempts, seed=config.seed, texts=texts)
        store = cache / IMAGE_STORE
        images = make_images(config.images, store, kept)
        identity = run_identity(config, texts, generator, images)
        return cls(config, texts, asker, images, Results(kept, store, identity), identity)

    @property
    def accounting(self) -> Accounting:
        return self.asker.limits.accounting

    def stop(self) -> None:
        """End all waits of the threads. What they wait for is a failure that may pass, so another run tries again."""
        self.asker.limits.stop()

    def guarded(self) -> Workshop:
        """The same, with failures that concern all items raising Stop."""
        after = self.config.limits.stop_after
        asker, images = GuardedAsker(self.asker, Guard(after)), GuardedImages(self.images, Guard(after))
        return dataclasses.replace(self, asker=asker, images=images)  # type: ignore[arg-type]

    def make(self, item: KnowledgeItem) -> ItemResult:
        """The samples of one item."""
        config = self.config
        if config.general is not None:
            from kore.augmentation.general import augment_general

            return augment_general(
                item,
                config.general,
                self.texts,
                self.asker,
                self.images,
                config.seed,
                samples=config.general_samples,
            )
        return make_samples(
            item,
            self.texts,
            self.asker,
            self.images,
            config.seed,
            rounds=config.rounds,
            questions=config.questions,
            tasks=tuple(config.tasks),
        )


def run_identity(config: AugmentConfig, texts: Texts, generator: Generator, images: Any) -> dict[str, Any]:
    """What the results of all items depend on, beside the items themselves."""
    own = config.model_dump(mode="json", include=_MADE_BY)
    source = getattr(images, "source", None)
    return {
        **own,
        "texts": texts.identity(),
        "generator": dict(generator.identity()),
        "images": config.images.model_dump(mode="json", exclude=_IMAGE_TRIFLES),
        "image_source": None if source is None else dict(source.identity()),
    }


def problems_of(images: Any) -> list[dict[str, str]]:
    """Images that could not be had, each with its reason."""
    return [{name: str(value) for name, value in vars(problem).items()} for problem in getattr(images, "problems", ())]
