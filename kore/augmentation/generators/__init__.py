"""Where answers come from: rules, a server with the OpenAI interface, a chat model in this process."""

from __future__ import annotations

from typing import Any

from kore.augmentation.types import Generator
from kore.errors import ConfigError


def make_generator(config: Any) -> Generator:
    """The generator that a configuration names.

    Args:
        config: Has ``kind`` and, where they differ from the defaults, ``model``, ``base_url``, ``api_key_env``,
            ``temperature``, ``timeout``, ``structured``, ``device`` and ``dtype``.

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

        names = ("temperature", "device", "dtype")
        return LocalGenerator(config.model, **_given(config, names))
    from kore.augmentation.generators.openai_server import OpenAIGenerator

    return OpenAIGenerator(
        config.model, **_given(config, ("base_url", "api_key_env", "temperature", "timeout", "structured"))
    )


def _given(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The named settings that there are."""
    return {name: getattr(config, name) for name in names if hasattr(config, name)}
