"""Answers of a server with OpenAI's chat interface: OpenAI, vLLM, Ollama, ``transformers serve`` and others."""

from __future__ import annotations

import email.utils
import ipaddress
import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from kore.augmentation.ask import NotGenerated
from kore.augmentation.generators import without_system
from kore.augmentation.schema import json_schema, without_thoughts
from kore.augmentation.types import Reply, Request
from kore.errors import ConfigError, KoreError, Unavailable

_log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
OPENAI = "https://api.openai.com/v1"
_NO_KEY = "none"
_SHOWN = 300
_REFUSED_AT_FIRST = 3
Structured = Literal["auto", "json_schema", "json_object", "prompt", "none"]
_SIMPLER = {"json_schema": "json_object", "json_object": "prompt"}
_WIDER = {1: 4, 4: 16}


@dataclass(frozen=True)
class _Form:
    """How a server is asked: what it refuses is left out from then on.

    ``room`` is how many times the tokens of an answer it gets, since a model that reasons spends most on its thoughts.
    """

    structured: str
    limit: str = "max_tokens"
    temperature: bool = True
    seed: bool = True
    system: bool = True
    room: int = 1


def _checked_url(base_url: str | None) -> str:
    url = base_url or os.environ.get(URL_VARIABLE) or OPENAI
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            "generator.base_url: expected the address of a server, such as http://localhost:8000/v1, "
            f"got {_public(url)!r}"
        )
    if parts.username or parts.password:
        raise ConfigError(
            "generator.base_url: expected an address without user and password; put the key into an environment "
            "variable and name it in generator.api_key_env"
        )
    return url


def _public(url: str) -> str:
    """The address without anything that could be a secret."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(no address)"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def _key(variable: str | None, own_server: bool) -> str | None:
    """The key, from the environment.

    OpenAI's own variable is read without being named only for a server that the environment names or OpenAI's: a key
    must not reach another server because it happened to be set.
    """
    name = variable or KEY_VARIABLE
    if not name.isidentifier():
        raise ConfigError(
            "generator.api_key_env: expected the name of an environment variable, not the key itself; run "
            f"`export {KEY_VARIABLE}=...` and give {KEY_VARIABLE}"
        )
    if variable is None and own_server:
        return None
    value = os.environ.get(name, "").strip()
    if not value:
        raise ConfigError(
            f"generator.api_key_env: the environment variable {name} is expected to hold the server's key, it is not "
            f"set; run `export {name}=...` first"
        )
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ConfigError(
            f"generator.api_key_env: the environment variable {name} is expected to hold a key in one word of ASCII, "
            "it has spaces or other characters"
        )
    return value


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, or None."""
    for name, divisor in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / divisor
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (TypeError, ValueError, OverflowError):
                continue
        if seconds == seconds:
            return max(0.0, seconds)
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _text(value: Any) -> str:
    """The text of a message, which some servers give in parts."""
    if isinstance(value, list):
        texts = [part.get("text") for part in value if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return value if isinstance(value, str) else ""


def _short(text: str) -> str:
    return text[:_SHOWN] + ("..." if len(text) > _SHOWN else "")


def server_identity(
    model: str,
    base_url: str | None = None,
    temperature: float = 0.7,
    structured: Structured = "auto",
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the answers of a server depend on; needs no key. Raises ConfigError for a wrong address."""
    return {
        "generator": "openai",
        "model": model,
        "base_url": _public(_checked_url(base_url)),
        "temperature": temperature,
        "structured": "prompt" if structured == "none" else structured,
        **({"extra": dict(extra)} if extra else {}),
    }


class OpenAIGenerator:
    """Asks a server through the ``openai`` client. Several threads use one at once.

    The key comes from the environment and goes to the server, and nowhere else.

    Args:
        model: The server's name of the model.
        base_url: The server; by default the variable OPENAI_BASE_URL, else OpenAI's own.
        api_key_env: The environment variable with the key. By default OPENAI_API_KEY, and no key at all for a server
            given by ``base_url``: local servers need none.
        timeout: Seconds without a byte of the answer, after which it counts as failed.
        temperature: Of sampling.
        structured: How JSON is asked for: ``"json_schema"``, ``"json_object"``, in the ``"prompt"`` only (also
            ``"none"``), or ``"auto"``, the first of these that the server takes.
        extra: Further fields of every request, such as ``{"reasoning_effort": "low"}``.

    Raises:
        ConfigError: Address, key or the ``openai`` package are missing or wrong.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str | None = None,
        *,
        timeout: float = 120.0,
        temperature: float = 0.7,
        structured: Structured = "auto",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise ConfigError(
                "generator.kind openai: the package openai is expected; run `pip install 'kore-lmm[augment]'`"
            ) from None
        if structured not in ("auto", "json_schema", "json_object", "prompt", "none"):
            raise ConfigError(
                f"generator.structured: expected auto, json_schema, json_object or none, got {structured!r}"
            )
        url = _checked_url(base_url)
        self._identity = server_identity(model, base_url, temperature, structured, extra)
        own_server = bool(base_url) and urlsplit(url).hostname != urlsplit(OPENAI).hostname
        self._secret = _key(api_key_env, own_server)
        self._variable = api_key_env or KEY_VARIABLE
        self._openai = openai
        self._url = _public(url)
        self._model, self._temperature, self._timeout = model, temperature, timeout
        self._extra = dict(extra or {})
        self._structured = self._identity["structured"]
        self._form = _Form("json_schema" if structured == "auto" else self._structured)
        self._settled = structured != "auto"
        self._answered, self._refused = False, 0
        self._lock = threading.Lock()
        try:
            # No proxy leads to this machine's own servers.
            http = openai.DefaultHttpxClient(
                follow_redirects=False, timeout=timeout, trust_env=not _is_loopback(urlsplit(url).hostname or "")
            )
        except Exception as error:  # its message may hold a proxy's password
            raise ConfigError(
                f"generator.kind openai: the client cannot be set up ({type(error).__name__}); see that the variables "
                "HTTP_PROXY, HTTPS_PROXY and ALL_PROXY hold addresses such as http://host:3128"
            ) from None
        self._client = openai.OpenAI(
            api_key=self._secret or _NO_KEY, base_url=url, timeout=timeout, max_retries=0, http_client=http
        )

    def __repr__(self) -> str:
        return f"OpenAIGenerator(model={self._model!r}, base_url={self._url!r})"

    def __reduce__(self) -> Any:
        raise TypeError("an OpenAIGenerator holds a key and is not pickled; make it anew")

    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def generate(self, request: Request) -> Reply:
        """Ask the server once; once more for each parameter that it refuses, which it is then spared, and with more
        room where its thoughts take all.

        Raises:
            Unavailable: A time-out, a broken connection, too many requests, a fault of the server.
            NotGenerated: The server refuses this request.
            KoreError: The key, the model or the address is wrong, or the server has refused every request so far.
        """
        with self._lock:
            form, settled = self._form, self._settled
        cut: Reply | None = None
        while True:
            completion, error = self._create(request, form)
            if error is None:
                reply, thinks = self._reply(completion, cut)
                if thinks and form.room in _WIDER:
                    self._answered = True
                    cut, form = reply, replace(form, room=_WIDER[form.room])
                    continue
                self._settle(form)
                return reply
            simpler = self._adapted(form, error, settled)
            if simpler is None:
                problem = self._translated(error)
                if cut is not None and isinstance(problem, NotGenerated):
                    return cut  # so much room is more than the server allows
                raise problem
            form = simpler

    def _settle(self, form: _Form) -> None:
        """Keep a form that the server has answered."""
        with self._lock:
            wider = form.room > self._form.room
            self._form, self._settled, self._answered = form, True, True
        if wider:
            _log.warning("%s thinks before it answers: an answer may take %d times the tokens", self._model, form.room)

    def _create(self, request: Request, form: _Form) -> tuple[Any, Exception | None]:
        """The completion, or why there is none."""
        messages = [dict(message) for message in request.messages]
        options: dict[str, Any] = {form.limit: request.max_tokens * form.room}
        if form.temperature:
            options["temperature"] = self._temperature
        if form.seed:
            options["seed"] = request.seed
        if form.structured == "json_schema":
            schema = {"name": request.schema.__name__, "strict": True, "schema": json_schema(request.schema)}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif form.structured == "json_object":
            options["response_format"] = {"type": "json_object"}
        # Some servers take a schema and ignore it; after a failed attempt the model is shown it in any case.
        if form.structured != "json_schema" or request.attempt:
            messages = request.with_form()
        if not form.system:
            messages = without_system(messages)
        create: Any = self._client.chat.completions.create
        try:
            return create(model=self._model, messages=messages, extra_body=self._extra or None, **options), None
        except (self._openai.OpenAIError, ValueError) as error:
            # Raised anew outside of this block, without the request in the chain of its causes.
            return None, error

    def _adapted(self, form: _Form, error: Exception, settled: bool) -> _Form | None:
        """A form without what the server refuses, or None where it refuses something else."""
        status = getattr(error, "status_code", None)
        if status not in (400, 404, 415, 422, 500, 501):
            return None
        about = f"{getattr(error, 'param', None) or ''} {error}".lower()
        if "max_completion_tokens" in about and form.limit == "max_tokens":
            return replace(form, limit="max_completion_tokens")
        if form.temperature and re.search(r"\btemperature\b", about):
            return replace(form, temperature=False)
        if form.seed and re.search(r"\bseed\b", about):
            return replace(form, seed=False)
        if form.system and re.search(r"system role|role\W+system|roles must alternate", about):
            return replace(form, system=False)
        simpler = _SIMPLER.get(form.structured)
        if self._structured != "auto" or simpler is None or status == 404:
            return None
        named = re.search(r"response_format|json_schema|json_object|schema|structured|guided|grammar", about)
        return replace(form, structured=simpler) if named or (status != 500 and not settled) else None

    def _reply(self, completion: Any, cut: Reply | None) -> tuple[Reply, bool]:
        """The reply, with what ``cut`` before it took, and whether its thoughts left no room for an answer."""
        choices: Any = getattr(completion, "choices", None)
        message = getattr(choices[0], "message", None) if choices else None
        if message is None:
            raise Unavailable(
                f"{self._url}: the server answers, but not with a chat completion; see that generator.base_url is the "
                "address of its interface, which often ends in /v1"
            )
        usage = getattr(completion, "usage", None)
        ended = getattr(choices[0], "finish_reason", None)
        content = _text(getattr(message, "content", None))
        thoughts = _text(getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None))
        details = getattr(usage, "completion_tokens_details", None)
        answer = without_thoughts(content)
        thinks = bool(thoughts or answer != content or getattr(details, "reasoning_tokens", None))
        if not content and ended == "stop":
            content = thoughts  # where the answer goes when a server takes all of it for thoughts
        problem = ""
        if refusal := _text(getattr(message, "refusal", None)):
            problem = f"The model refuses: {_short(refusal)}"
        elif ended == "content_filter":
            problem = "The service's filter holds the answer back."
        elif ended == "length":
            problem = "The answer is cut off at the longest one allowed; give a shorter one."
        reply = Reply(
            content,
            prompt_tokens=int(getattr(usage, "prompt_tokens", 0) or 0) + (cut.prompt_tokens if cut else 0),
            completion_tokens=int(getattr(usage, "completion_tokens", 0) or 0) + (cut.completion_tokens if cut else 0),
            problem=problem,
        )
        return reply, ended == "length" and (thinks or not answer.strip())

    def _said(self, error: Exception) -> str:
        """What the server says, short and without the key."""
        body = getattr(error, "body", None)
        named = (body.get(name) for name in ("message", "detail", "error")) if isinstance(body, dict) else ()
        text = " ".join(str(next(filter(None, named), None) or error).split())
        if self._secret:
            text = text.replace(self._secret, "(key)")
        return _short(text)

    def _translated(self, error: Exception) -> KoreError:
        """The error as one that says what to do."""
        openai, where = self._openai, self._url
        if isinstance(error, openai.APITimeoutError):
            return Unavailable(f"{where}: no answer within {self._timeout:g} s (generator.timeout)")
        if isinstance(error, openai.APIConnectionError):
            return Unavailable(f"{where}: the connection fails; see that the server runs there")
        status = getattr(error, "status_code", None)
        if isinstance(error, openai.APIResponseValidationError | ValueError) or status is None:
            return Unavailable(f"{where}: the server's answer is no valid JSON ({type(error).__name__})")
        said = self._said(error)
        if status == 401:
            if self._secret is None:
                return KoreError(
                    f"{where}: the server wants a key and none is sent; put it into an environment variable and name "
                    "that in generator.api_key_env"
                )
            return KoreError(f"{where}: the server refuses the key in {self._variable}; set it to a valid one")
        if status == 403:
            return KoreError(
                f"{where}: the server does not allow this with the key in {self._variable} ({said}); choose another "
                "model or ask for access"
            )
        if status == 404:
            return KoreError(
                f"{where}: the server knows no model {self._model!r}, or nothing at this address ({said}); see "
                "generator.model, and that generator.base_url ends as the server's interface does, often in /v1"
            )
        if 300 <= status < 400:
            target = _public(error.response.headers.get("location", ""))  # type: ignore[attr-defined]
            return KoreError(
                f"{where}: the server sends on to {target or 'another address'}, which is not followed; if it is the "
                "right one, set generator.base_url to it"
            )
        if status == 402 or (status == 429 and getattr(error, "code", None) in ("insufficient_quota", "billing")):
            return KoreError(f"{where}: there is no credit left ({said}); add some and run it again to go on")
        if status in (408, 409, 425, 429) or status >= 500:
            response = getattr(error, "response", None)
            what = "too many requests" if status == 429 else f"error {status}"
            passing = Unavailable(f"{where}: {what} ({said})")
            passing.retry_after = _retry_after(response.headers) if response is not None else None
            return passing
        refused = f"{where}: the server refuses the request with status {status} ({said})"
        with self._lock:
            self._refused += 1
            hopeless = not self._answered and self._refused >= _REFUSED_AT_FIRST
        if hopeless:
            return KoreError(
                f"{refused}, as it did with every one so far; see the settings of generator and the server"
            )
        return NotGenerated(refused, [said])
