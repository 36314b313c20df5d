"""The only path by which KORE opens images, and the only one by which it reaches the network.

Local images are opened inside the data root, capped in bytes and pixels. The network is off unless the caller hands
over an :class:`Allowlist`; every address is checked after the name look-up and after each redirect.
"""

from kore.fetch.addresses import Allowlist, Refused, is_public, redact
from kore.fetch.download import Answered, Download, Downloader, DownloadLimits, Unfit, download, download_json
from kore.fetch.images import (
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    DecodedImage,
    decode_image,
    image_kind,
    image_size,
    open_image,
    resolve_image,
)

__all__ = [
    "MAX_IMAGE_BYTES",
    "MAX_IMAGE_PIXELS",
    "Allowlist",
    "Answered",
    "DecodedImage",
    "Download",
    "DownloadLimits",
    "Downloader",
    "Refused",
    "Unfit",
    "decode_image",
    "download",
    "download_json",
    "image_kind",
    "image_size",
    "is_public",
    "open_image",
    "redact",
    "resolve_image",
]
