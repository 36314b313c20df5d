"""The ``images`` section of the augmentation's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

KINDS = ("none", "folder", "commons", "google", "serpapi")
Kind = Literal["none", "folder", "commons", "google", "serpapi"]


class ImageSettings(BaseModel):
    """Where images are searched, and which are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind = "none"
    """``none``: no search, every task uses the original image. ``folder``: a folder of images or a saved Hugging Face
    dataset. ``commons``: Wikimedia Commons. ``google``: Programmable Search (GOOGLE_API_KEY and GOOGLE_CSE_ID in the
    environment), which Google means to end in January 2027. ``serpapi``: SerpApi's Google Images (SERPAPI_API_KEY in
    the environment)."""
    path: Path | None = None
    """Of ``folder``: images with or without metadata.jsonl or metadata.csv, a ``save_to_disk`` dataset, or
    parquet."""
    clip: str | None = None
    """A CLIP model, directory or hub id, that measures how similar found images are to the original one."""
    index: bool = False
    """Of ``folder``: search by the CLIP model's text embeddings instead of file names and captions."""
    device: str = "auto"
    results: int = Field(default=5, ge=1, le=50)
    """Images fetched for a search."""
    keep: int = Field(default=2, ge=1)
    """Images kept of these."""
    allow: tuple[str, ...] = ()
    """Hosts that images may be downloaded from: ``example.org``, ``*.example.org``, or ``*`` for any public host.
    Needed by ``google`` and ``serpapi``, whose results lie anywhere; ``commons`` has its own host."""
    contact: str = ""
    """Your e-mail address or web page, told to servers in the User-Agent. Wikimedia demands one."""
    rights: str = ""
    """Licence filter of ``google`` (its ``rights``) or ``serpapi`` (its ``licenses``)."""
    delay: float = Field(default=1.0, ge=0)
    """Seconds between two requests to one host."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds for one download."""
    max_bytes: int = Field(default=32 * 1024 * 1024, ge=1)
    max_pixels: int = Field(default=50_000_000, ge=1)
    max_side: int = Field(default=2048, ge=16)
    """Larger images are stored reduced to this many pixels on the longer side."""

    @field_validator("allow")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from kore.fetch import Allowlist

        return Allowlist(value).hosts

    @model_validator(mode="after")
    def _complete(self) -> ImageSettings:
        if self.kind == "folder" and self.path is None:
            raise ValueError("kind folder needs path, the folder or dataset to search")
        if self.index and (self.kind != "folder" or self.clip is None):
            raise ValueError("index needs kind folder and a clip model")
        if self.kind in ("google", "serpapi") and not self.allow:
            raise ValueError(f"kind {self.kind} needs allow, the hosts to download from; ['*'] is any public host")
        if self.kind == "commons" and "@" not in self.contact and "://" not in self.contact:
            raise ValueError(
                "kind commons needs contact, an e-mail address or the URL of a page: Wikimedia asks every program for "
                f"one; got {self.contact!r}"
            )
        return self
