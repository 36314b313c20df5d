"""Where answers come from: rules, a server with the OpenAI interface, a chat model in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kore.augmentation.types import Generator, Reply, Request
from kore.errors import ConfigError, KoreError


def make_generator(config: Any) -> Generator:
    """The generator that a configuration names.

    Args:
        config: Has ``kind`` and, where they differ from the defaults, ``model``, ``base_url``, ``api_key_env``,
            ``temperature``, ``timeout``, ``structured``, ``extra``, ``device`` and ``dtype``.

    Raises:
        ConfigError: Something is missing or wrong.
        ModelError: A local model cannot be loaded.
    """
    kind = config.kind
    if kind == "rules":
        from kore.augmentation.generators.rules import RulesGenerator

        return RulesGenerator()
    if kind not in ("openai", "local"):
        raise ConfigError(f"generator.kind: expected rules, openai or local, got {kind!r}")
    if not config.model:
        what = "the server's name of it" if kind == "openai" else "a directory or a hub id"
        raise ConfigError(f"generator.model: expected a chat model, {what}, got nothing")
    if kind == "local":
        from kore.augmentation.generators.local import LocalGenerator

        return LocalGenerator(config.model, **_given(config, ("temperature", "device", "dtype")))
    from kore.augmentation.generators.openai_server import OpenAIGenerator

    names = ("base_url", "api_key_env", "temperature", "timeout", "structured", "extra")
    return OpenAIGenerator(config.model, **_given(config, names))


class Unasked:
    """In place of the server of a configuration where nothing is asked: needs neither key nor client."""

    def __init__(self, config: Any) -> None:
        from kore.augmentation.generators.openai_server import server_identity

        self._identity = server_identity(
            config.model, **_given(config, ("base_url", "temperature", "structured", "extra"))
        )

    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def generate(self, request: Request) -> Reply:
        """Raises KoreError: this asks nothing."""
        raise KoreError("a generator that is not to be asked was asked")


def without_system(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The messages with what the system says at the head of the first other one: for models that know no such role."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    rest = [dict(message) for message in messages if message["role"] != "system"]
    rest[0]["content"] = "\n\n".join([*system, rest[0]["content"]])
    return rest


def _given(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The named settings that there are."""
    return {name: getattr(config, name) for name in names if hasattr(config, name)}
