"""The configuration of an augmentation: every key, its type and its default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from kore.augmentation.images.settings import ImageSettings
from kore.augmentation.types import TASKS, Task

Export = Literal["llava", "sharegpt", "openai", "plain"]


def _listed(value: Any) -> Any:
    """Names separated by commas, as a list."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class GeneratorSettings(Section):
    """Who writes the answers."""

    kind: Literal["rules", "openai", "local"] = "rules"
    """"rules": sentences and questions by templates, from ``facts``; no model. "openai": any server with the OpenAI
    interface. "local": a Hugging Face chat model in this process."""
    model: str | None = None
    """The name that the server knows, or for "local" a model directory or hub id."""
    base_url: str | None = None
    """The server's address, such as http://localhost:8000/v1; null: OpenAI's own."""
    api_key_env: str | None = None
    """The environment variable that holds the key, which itself is never written anywhere. null: OPENAI_API_KEY, and no
    key for a server that ``base_url`` names."""
    temperature: float = Field(default=0.7, ge=0, le=2)
    timeout: float = Field(default=120.0, gt=0)
    """Seconds to wait for an answer."""
    structured: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    """How the server is asked for JSON; "auto" takes the strictest that it accepts."""
    extra: dict[str, Any] = {}
    """Further fields of each request to a server, such as {reasoning_effort: low} or
    {chat_template_kwargs: {enable_thinking: false}}. They are written into the cache, so none is a secret."""
    device: str = "auto"
    """For "local": auto, cpu, cuda, ..."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    price_input: float | None = Field(default=None, ge=0)
    """Of a million tokens asked, in any currency; with ``price_output`` the cost is counted."""
    price_output: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _without_secrets(self) -> GeneratorSettings:
        # Of the whole section, so that no message repeats the value of a field.
        if self.api_key_env is not None and not self.api_key_env.isidentifier():
            raise ValueError("api_key_env: expected the name of an environment variable, not the key itself")
        if self.base_url is not None:
            try:
                address = urlsplit(self.base_url)
            except ValueError:
                raise ValueError("base_url: not a valid address") from None
            if address.username or address.password or address.query:
                raise ValueError("base_url: holds a user name, password or query; the key goes into api_key_env")
            if address.scheme not in ("http", "https") or not address.hostname:
                raise ValueError("base_url: expected an address such as http://localhost:8000/v1")
        return self

    @model_validator(mode="after")
    def _complete(self) -> GeneratorSettings:
        if self.kind != "rules" and not self.model:
            what = "the name the server knows" if self.kind == "openai" else "a model directory or hub id"
            raise ValueError(f"model: kind {self.kind} needs {what}")
        if self.extra and self.kind != "openai":
            raise ValueError(f"extra: kind {self.kind} sends no requests; set kind to openai or leave it out")
        if self.kind == "rules" and (self.model or self.base_url):
            given = "model" if self.model else "base_url"
            raise ValueError(f"{given}: kind rules uses none; set kind to openai or local")
        if (self.price_input is None) != (self.price_output is None):
            raise ValueError("price_input and price_output: expected both or neither")
        return self


class LimitSettings(Section):
    """How much is asked of a server."""

    requests_per_minute: int | None = Field(default=None, gt=0)
    tokens_per_minute: int | None = Field(default=None, gt=0)
    retries: int = Field(default=5, ge=0)
    """Repetitions of a request that failed in passing."""
    backoff: float = Field(default=1.0, ge=0)
    """Seconds before the first repetition; twice as many before each further one."""
    longest_wait: float = Field(default=120.0, gt=0)
    """Seconds that one wait may last; a server that asks for a longer one is given up."""
    stop_after: int | None = Field(default=20, ge=1)
    """Stop when so many requests in a row are given up, or three where none was ever answered; null: never."""


class AugmentConfig(Section):
    """From knowledge to conversations: who generates, where images come from, what is made."""

    generator: GeneratorSettings = GeneratorSettings()
    images: ImageSettings = ImageSettings()
    limits: LimitSettings = LimitSettings()
    texts: Path | None = None
    """A folder of templates and prompts that replace the library's own of the same name."""
    tasks: Annotated[list[Task], BeforeValidator(_listed), Field(min_length=1)] = list(TASKS)
    rounds: int = Field(default=10, ge=1, le=10)
    """Most generated rounds of a dialogue, after its first one."""
    questions: int = Field(default=5, ge=1, le=5)
    """Most visual questions of an item."""
    general: str | None = None
    """A general augmentation in place of the tasks, for comparison: text-aware, text-agnostic, image-aware or
    image-agnostic."""
    general_samples: int = Field(default=8, ge=1, le=100)
    """Conversations that a general augmentation makes of an item."""
    seed: int = 0
    workers: int = Field(default=4, ge=1, le=256)
    """Items worked on at a time."""
    attempts: int = Field(default=3, ge=1, le=10)
    """Times that an answer is asked for before it is given up."""
    export: Annotated[list[Export], BeforeValidator(_listed)] = ["llava"]
    """What is written: "llava" always; "sharegpt" with dataset_info.json for LLaMA-Factory, "openai" messages, "plain"
    the texts without augmentation."""
    name: str = Field(default="kore_knowledge", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$")
    """The data set's name in dataset_info.json."""
    openai_images: Literal["path", "data"] = "path"
    """In openai.jsonl: paths relative to it, or the images themselves as data URLs."""
    quality: bool = True
    """Write the quality report."""
    image_root: Path | None = None
    """Folder that the image paths of the knowledge are relative to; null: that of the file."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    columns: dict[str, str] = {}
    """The file's names of columns, such as {title: headline}."""
    max_items: int | None = Field(default=None, ge=1)
    """Take only the first so many items."""

    @field_validator("tasks", "export")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("one is named twice")
        return value

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        from kore.augmentation.items import COLUMNS

        for name in value:
            if name not in COLUMNS:
                raise ValueError(f"knowledge has no column {name!r}; it has {', '.join(COLUMNS)}")
        return value

    @field_validator("general")
    @classmethod
    def _known_method(cls, value: str | None) -> str | None:
        if value is not None:
            from kore.augmentation.general import GENERAL

            if value not in GENERAL:
                raise ValueError(f"expected one of {', '.join(GENERAL)}")
        return value
