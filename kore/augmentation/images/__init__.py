"""Images for the augmentation: search, download, storage, similarity, choice."""

from __future__ import annotations

from pathlib import Path

from kore.augmentation.cache import Cache
from kore.augmentation.images.choose import Similarity, choose
from kore.augmentation.images.finder import Images, Problem
from kore.augmentation.images.settings import ImageSettings
from kore.augmentation.images.similarity import Clip, ClipSimilarity
from kore.augmentation.images.store import ImageStore
from kore.augmentation.types import ImageSource
from kore.fetch import Allowlist, Downloader, DownloadLimits

__all__ = [
    "Clip",
    "ClipSimilarity",
    "ImageSettings",
    "ImageStore",
    "Images",
    "Problem",
    "Similarity",
    "choose",
    "make_images",
    "make_source",
]


def make_source(settings: ImageSettings, scratch: Path, clip: Clip | None = None) -> ImageSource | None:
    """The search that the settings name, None for ``none``.

    Args:
        settings: Of images.
        scratch: A folder for what a search keeps between runs.
        clip: The model for a folder's index.

    Raises:
        ConfigError: A key is missing in the environment.
        DataError: The folder or data set cannot be used.
    """
    if settings.kind == "folder":
        from kore.augmentation.images.folder import FolderSource

        assert settings.path is not None
        return FolderSource(settings.path, scratch, clip if settings.index else None)
    if settings.kind == "none":
        return None
    from kore.augmentation.images import commons, google, serpapi
    from kore.augmentation.images.service import api_downloader

    if settings.kind == "commons":
        return commons.Commons(api_downloader(commons.API, settings))
    if settings.kind == "google":
        return google.Google(api_downloader(google.API, settings), settings.rights)
    return serpapi.SerpApi(api_downloader(serpapi.API, settings), settings.rights)


def make_images(settings: ImageSettings, folder: Path, cache: Cache) -> Images:
    """All that finds and keeps images, by the settings.

    With kind ``none`` the search finds nothing, and the store only copies original images. The network is reached for
    the kinds that search there, and for no other.

    Args:
        settings: Of images.
        folder: The store.
        cache: Of searches and downloads.

    Raises:
        As :func:`make_source`.
    """
    from kore.augmentation.images import commons

    download = None
    if settings.kind in ("commons", "google", "serpapi"):
        hosts = settings.allow or commons.HOSTS
        limits = DownloadLimits(settings.max_bytes, settings.timeout, delay=settings.delay, attempts=2)
        download = Downloader(Allowlist(hosts), limits, contact=settings.contact)
    caps = {"max_bytes": settings.max_bytes, "max_pixels": settings.max_pixels, "max_side": settings.max_side}
    store = ImageStore(folder, download, **caps)
    clip = Clip(settings.clip, settings.device, cache) if settings.clip else None
    source = make_source(settings, cache.folder / "index", clip)
    return Images(source, store, cache, clip, settings.results, settings.keep)
