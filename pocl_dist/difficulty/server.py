"""Greedy answers from an OpenAI-compatible server (vLLM, SGLang, TGI, `transformers serve`).

With the standard library alone. Loads no torch.
"""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import cast

from pocl_dist.errors import ConfigError, MismatchError, UnavailableError, WorkerError
from pocl_dist.files import JSONValue

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
# Busy, or not able to right now; anything else stays as it is when it is asked again.
_RETRIED = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Server:
    """Where the server is and how it is asked."""

    url: str  # base of the API, with its version
    model: str
    timeout_seconds: float
    retries: int
    api_key: str | None = field(default=None, repr=False)  # in no log and no traceback


@dataclass(frozen=True)
class ServerPrompt:
    """One row's prompt in the form that the server takes."""

    example_id: str
    content: list[int] | str | list[dict[str, str]]  # token ids, text, messages
    token_ids: tuple[int, ...]  # what the server must see


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nothing: the key would go along to another host."""

    def redirect_request(self, *_: object, **__: object) -> None:
        """Returns no request, so that the reply counts as an error."""


_OPENER = urllib.request.build_opener(_NoRedirect)


class _RefusedError(Exception):
    """A reply with an error status."""

    def __init__(self, status: int, text: str, wait_seconds: float | None) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status
        self.wait_seconds = wait_seconds


def _wait_asked(error: urllib.error.HTTPError) -> float | None:
    """Returns the seconds of `Retry-After`; None without it, or for a date."""
    text = error.headers.get("Retry-After", "")
    return min(float(text), LONGEST_WAIT_SECONDS) if text.isdigit() else None


def _exchange(server: Server, path: str, body: dict[str, JSONValue] | None) -> dict[str, JSONValue]:
    """Returns the JSON reply of one request: POST with a body, else GET."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if server.api_key is not None:
        headers["Authorization"] = f"Bearer {server.api_key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url.rstrip("/") + path, data, headers)
    try:
        with _OPENER.open(request, timeout=server.timeout_seconds) as reply:
            text = reply.read()
    except urllib.error.HTTPError as error:
        detail = " ".join(error.read(2000).decode(errors="replace").split())[:500]
        if server.api_key:
            detail = detail.replace(server.api_key, "***")  # some servers repeat it
        raise _RefusedError(error.code, detail, _wait_asked(error)) from None
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise MismatchError(f"measure.server_url: {server.url}{path} gave no JSON object")
    return cast("dict[str, JSONValue]", value)


def check_reachable(server: Server) -> None:
    """Raises UnavailableError (69) when nothing answers at the URL, ConfigError (64) for the key.

    Any other reply will do: not every server lists its models.
    """
    try:
        _exchange(server, "/models", None)
    except _RefusedError as error:
        _check_key(server, error)
    except MismatchError:
        pass  # something answers; the first prompt tells what
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(
            f"measure.server_url: {server.url} is not reachable: {error}"
        ) from None


def _check_key(server: Server, error: _RefusedError) -> None:
    if error.status in (401, 403):
        given = "the key that was sent" if server.api_key else "a request without a key"
        raise ConfigError(
            f"measure.server_key_variable: {server.url} refuses {given} ({error})"
        ) from None


def _body(server: Server, prompt: ServerPrompt, max_new_tokens: int) -> dict[str, JSONValue]:
    is_chat = not isinstance(prompt.content, str) and isinstance(prompt.content[0], dict)
    return {
        "model": server.model,
        "messages" if is_chat else "prompt": cast("JSONValue", prompt.content),
        "max_tokens": max_new_tokens,
        "temperature": 0.0,
    }


def ask(
    server: Server,
    prompt: ServerPrompt,
    max_new_tokens: int,
    is_given_up: threading.Event | None = None,
) -> str:
    """Returns the greedy answer to a prompt; no new attempt follows once `is_given_up` is set.

    Raises MismatchError (78) when the server counts or returns other prompt tokens than ours,
    ConfigError (64) for a request that it refuses (model, key, form of the prompt), and
    UnavailableError (69) when it still fails after `retries` new attempts.
    """
    body = _body(server, prompt, max_new_tokens)
    path = "/chat/completions" if "messages" in body else "/completions"
    wait_seconds = FIRST_WAIT_SECONDS
    for attempt in range(server.retries + 1):
        try:
            reply = _exchange(server, path, body)
            _check_drift(server, prompt, reply)
            return _text_of(server, reply)
        except _RefusedError as error:
            _check_key(server, error)
            if error.status not in _RETRIED:
                raise ConfigError(
                    f"measure.server_url: {server.url}{path} refuses row {prompt.example_id!r} "
                    f"for measure.server_model {server.model!r} with {error}; is it the model's "
                    "name there, and does the server take this measure.server_prompt?"
                ) from None
            last: Exception = error
            wait_seconds = error.wait_seconds or wait_seconds
        except (OSError, http.client.HTTPException) as error:  # lost, timed out, refused
            last = error
        if attempt == server.retries or (is_given_up or threading.Event()).wait(wait_seconds):
            break
        wait_seconds = min(2 * wait_seconds, LONGEST_WAIT_SECONDS)
    raise UnavailableError(
        f"measure.server_url: {server.url}{path} failed {attempt + 1} times "
        f"for row {prompt.example_id!r} with measure.server_model {server.model!r}, last with: "
        f"{type(last).__name__.strip('_')}: {last}"
    ) from None


def _check_drift(server: Server, prompt: ServerPrompt, reply: dict[str, JSONValue]) -> None:
    """Raises MismatchError (78) unless the server's prompt is our tokens, as far as it tells."""
    usage = reply.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    where = f"row {prompt.example_id!r}: {server.model!r} at {server.url}"
    if count is None:
        raise MismatchError(
            f"{where} does not count prompt tokens (usage.prompt_tokens): drift cannot be told"
        )
    if count != len(prompt.token_ids):
        raise MismatchError(
            f"{where} saw {count} prompt tokens, we have {len(prompt.token_ids)}: another "
            "tokenizer or chat template, or special tokens added twice"
        )
    seen = _first_choice(server, reply).get("prompt_token_ids", reply.get("prompt_token_ids"))
    if isinstance(seen, list) and tuple(seen) != prompt.token_ids:  # vLLM, if it is set up so
        first = next(
            place
            for place, pair in enumerate(zip(seen, prompt.token_ids, strict=True))
            if pair[0] != pair[1]
        )
        raise MismatchError(
            f"{where} saw token {seen[first]} at position {first}, we have "
            f"{prompt.token_ids[first]}: another tokenizer"
        )


def _first_choice(server: Server, reply: dict[str, JSONValue]) -> dict[str, JSONValue]:
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise WorkerError(f"measure.server_url: {server.url} gave a reply without choices")
    return choice


def _text_of(server: Server, reply: dict[str, JSONValue]) -> str:
    choice = _first_choice(server, reply)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    return str(text or "").strip()
