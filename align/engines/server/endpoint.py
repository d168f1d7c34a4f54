"""One OpenAI-compatible endpoint: a JSON body in, its JSON answer out, or what went wrong sorted by what can be done.

Knows what the server can do beyond the bare protocol (`Abilities`) and how it has fared. Who is asked, and when again,
is decided in `server_fleet`. Keys come from the environment, go into one header, and are struck out of every message.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from align.config import Server
from align.engines.server.events import OnTexts, collect
from align.errors import UserError

if TYPE_CHECKING:
    import httpx

# A server's message is shown up to this many characters.
MAX_MESSAGE = 300
# Retry-After is honoured up to this long.
MAX_RETRY_AFTER_S = 300.0
CHECK_TIMEOUT_S = 10.0


class RetryLaterError(Exception):
    """What may heal: the network, a busy or a broken server. `wait_s` is what the server asked for.

    `status` is the answer's, None where there was none; `gone`: the server no longer has the model.
    """

    def __init__(
        self, reason: str, *, status: int | None = None, wait_s: float | None = None, gone: bool = False
    ) -> None:
        super().__init__(reason)
        self.status, self.wait_s, self.gone = status, wait_s, gone

    @property
    def busy(self) -> bool:
        """The server is well but has too much to do."""
        return self.status == 429


class RefusedError(Exception):
    """The server understood and will not (400, 413, 422): asking again would change nothing."""


class NotServedError(Exception):
    """The server is up and does not have the model."""


@dataclass
class Abilities:
    """What a server does beyond the bare protocol; found out by asking, once (`server_probe`).

    several: `n` gives that many choices. extras: `top_k` and `repetition_penalty` are taken. token_ids:
    choices come with their tokens. token_log_probs: they come with log-probabilities when asked for. top_log_probs: so
    many alternatives per token, 0 for none. continues: an assistant turn that has begun is continued.
    """

    several: bool = False
    extras: bool = False
    token_ids: bool = False
    token_log_probs: bool = False
    top_log_probs: int = 0
    continues: bool = False

    def in_words(self) -> str:
        """What a server can do, for a log line."""
        words = [
            "n" if self.several else "one sample a request",
            *(["top_k"] if self.extras else []),
            *([f"top_logprobs {self.top_log_probs}"] if self.top_log_probs else []),
            *(["continues a partial answer"] if self.continues else []),
        ]
        return ", ".join(words)


@dataclass(eq=False)
class Endpoint:
    """An endpoint, what it can do and how it fares. Times are of `time.monotonic`, in seconds."""

    url: str
    model: str | None
    key: str | None = field(default=None, repr=False)
    check_model: bool = True
    abilities: Abilities = field(default_factory=Abilities)
    probed: bool = False
    alive: bool = True
    in_flight: int = 0
    requests: set[asyncio.Task[Any]] = field(default_factory=set, repr=False)
    """What it has been asked and not yet answered, while requests are made."""
    max_model_len: int | None = None
    """Tokens of prompt and response together, where the server says."""
    root: str | None = None
    """The folder that it serves, where the server says."""
    failures_in_a_row: int = 0
    failed_checks: int = 0
    not_before: float = 0.0
    out_since: float = 0.0
    last_error: str = "not asked yet"
    num_answers: int = 0
    num_failures: int = 0
    has_ended: Callable[[], bool] = lambda: False
    """Whether it will never answer again, where that is known: a server that was started here and not restarted."""

    def __str__(self) -> str:
        return self.url

    async def post(
        self, client: httpx.AsyncClient, body: dict[str, Any], timeout_s: float, *, on_texts: OnTexts | None = None
    ) -> dict[str, Any]:
        """The answer to a chat completion with this body (`model` is added).

        `on_texts` gets what each choice says while it is written, where the server streams.

        Raises:
            RetryLaterError, RefusedError: see there.
            UserError: the key is missing or wrong, or the address is another one.
        """
        body = {"model": self.model} | ({"stream": True} if on_texts is not None else {}) | body
        answer = await self._exchange(client, "POST", "/chat/completions", body, timeout_s, on_texts)
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list) or not answer["choices"]:
            raise RetryLaterError(f"answered without choices ({self.readable(json.dumps(answer))})")
        return answer

    async def check(self, client: httpx.AsyncClient) -> None:
        """See that the server answers and (`check_model`) has the model; without a name, take the only one that it has.

        Raises:
            RetryLaterError: it does not answer.
            NotServedError: it has other models.
            UserError: the key or the address is wrong.
        """
        try:
            listed = await self._exchange(client, "GET", "/models", None, CHECK_TIMEOUT_S)
            entries = {str(entry["id"]): entry for entry in listed["data"]}
            models = {name: entry.get("root") for name, entry in entries.items()}
        except (RefusedError, RetryLaterError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, RetryLaterError) and (self.check_model or error.status is None):
                raise
            if not self.check_model:
                return
            raise NotServedError(f"does not list its models at {self.url}/models ({error})") from None
        if not self.check_model:
            return
        if self.model is None and len(models) == 1:
            (self.model,) = models
        names = [name for name, root in models.items() if any(_same_model(self.model, other) for other in (name, root))]
        if not names:
            has = ", ".join(repr(name) for name in models) or "nothing"
            raise NotServedError(f"serves {has}" + (f", not {self.model!r}" if self.model else ": say which is meant"))
        self.model = names[0]
        room, self.root = entries[self.model].get("max_model_len"), models[self.model]
        self.max_model_len = room if isinstance(room, int) else None

    def readable(self, text: str) -> str:
        """A server's words on one line, cut to length, without the key."""
        if self.key:
            text = text.replace(self.key, "[key]")
        text = re.sub(r"\s+", " ", text).strip()
        return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "..."

    async def _exchange(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        timeout_s: float,
        on_texts: OnTexts | None = None,
    ) -> Any:
        import httpx

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            # httpx's own limits are for each read; this one is for the whole answer.
            async with (
                asyncio.timeout(timeout_s),
                client.stream(method, self.url + path, json=body, headers=headers) as response,
            ):
                if on_texts is not None and response.is_success and _is_stream(response):
                    return await collect(response.aiter_lines(), on_texts)
                await response.aread()
        except (TimeoutError, httpx.TimeoutException):
            raise RetryLaterError(f"no answer within {timeout_s:g} s") from None
        except httpx.InvalidURL as error:
            raise UserError(f"no address ({error})", where=self.url, fix="name the right one") from None
        except httpx.ConnectError as error:
            raise RetryLaterError(f"cannot be reached ({self.readable(str(error))})") from None
        except httpx.RequestError as error:
            reason = self.readable(str(error)) or type(error).__name__
            raise RetryLaterError(f"the connection broke ({reason})") from None
        except (EOFError, ValueError) as error:
            raise RetryLaterError(f"its stream is not a whole answer ({self.readable(str(error))})") from None
        self._check_status(response, path)
        try:
            return response.json()
        except ValueError:
            raise RetryLaterError(f"answered with something else than JSON ({self.readable(response.text)})") from None

    def _check_status(self, response: httpx.Response, path: str) -> None:
        status = response.status_code
        if status < 300:
            return
        said = f"{status}: {self.readable(_message(response))}"
        if status < 400:
            raise UserError(
                f"it redirects to {self.readable(response.headers.get('location', 'nowhere'))}",
                where=self.url,
                fix="name the right address",
            )
        if status in (401, 403):
            given = "the key was refused" if self.key else "it wants a key"
            raise UserError(
                f"{given} ({said})", where=self.url, fix="set api_key_env to the variable that holds the key"
            )
        if status in (408, 425, 429) or status >= 500:
            wait_s = _retry_after(response.headers.get("retry-after"))
            raise RetryLaterError(said, status=status, wait_s=wait_s)
        if status == 404 and path == "/chat/completions":
            raise RetryLaterError(said, status=status, gone=True)
        raise RefusedError(said)


def endpoints_of(servers: Sequence[Server], model: str | None) -> list[Endpoint]:
    """Endpoints with their keys; `model` is the name where a server gives none.

    Raises:
        UserError: an environment variable that should hold a key does not, or a server is named twice.
    """
    endpoints = [
        Endpoint(base_url(server.url), server.model or model, _key(server), server.check_model) for server in servers
    ]
    for endpoint in endpoints:
        if [(other.url, other.model) for other in endpoints].count((endpoint.url, endpoint.model)) > 1:
            raise UserError(
                f"the server {endpoint.url} is duplicated", fix="name each once; server.concurrency gives it more to do"
            )
        if endpoint.model is None and not endpoint.check_model:
            raise UserError(f"the server {endpoint.url} needs the name of its model", fix="set model beside its url")
    return endpoints


def _same_model(wanted: str | None, served: str | None) -> bool:
    """Whether two names are one, or two ways to write one path.

    >>> _same_model("./policy/", "policy"), _same_model("policy-0", "policy-1")
    (True, False)
    """
    if wanted is None or served is None:
        return False
    return wanted == served or os.path.abspath(wanted) == os.path.abspath(served)


def base_url(url: str) -> str:
    """The address below which `/chat/completions` lies.

    >>> base_url("http://gpu1:8000"), base_url("http://gpu1:8000/v1/"), base_url("https://host/openai/v1")
    ('http://gpu1:8000/v1', 'http://gpu1:8000/v1', 'https://host/openai/v1')
    """
    return url.rstrip("/") if urlsplit(url).path.strip("/") else url.rstrip("/") + "/v1"


def _key(server: Server) -> str | None:
    if server.api_key_env is None:
        return None
    key = os.environ.get(server.api_key_env, "").strip()
    # Anything else would be refused further down with the key in the message.
    if not key or not re.fullmatch(r"[!-~]+", key):
        found = "holds something that cannot be a key" if key else "is empty or not set"
        raise UserError(
            f"the environment variable {server.api_key_env} {found}",
            where=server.url,
            fix="export it with the server's key, or leave api_key_env out",
        )
    return key


def _is_stream(response: httpx.Response) -> bool:
    return response.headers.get("content-type", "").startswith("text/event-stream")


def _message(response: httpx.Response) -> str:
    """What a server says is wrong, under any of the names in use."""
    try:
        said = response.json()
    except ValueError:
        return response.text
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(name):
            said = said[name]
    return said if isinstance(said, str) else json.dumps(said)


def _retry_after(header: str | None) -> float | None:
    """Seconds from a Retry-After header, which gives seconds or a date.

    >>> _retry_after("7"), _retry_after("soon"), _retry_after("1e9")
    (7.0, None, 300.0)
    """
    if header is None:
        return None
    try:
        wait_s = float(header)
    except ValueError:
        try:
            wait_s = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(wait_s, 0.0), MAX_RETRY_AFTER_S)
