"""Many endpoints as one: a body in, an answer from whichever endpoint is free and well out.

Each endpoint has a bounded number of requests in flight. What may heal is tried again, elsewhere if possible, after
pauses that double; an endpoint that fails again and again is taken out, rests, and comes back when it answers a check.
Only when all are out does the work stop, with what each of them said last.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from align.config import ServerSettings
from align.engines.server.chat import Choice, num_prompt_tokens, read_choices
from align.engines.server.endpoint import Endpoint, NotServedError, RefusedError, RetryLaterError
from align.engines.server.events import OnTexts
from align.engines.server.probe import probe
from align.errors import UserError
from align.log import log
from align.monitoring.cost import count_tokens
from align.versions import install_extra

ResultT = TypeVar("ResultT")
ItemT = TypeVar("ItemT")

# An endpoint that fails so many times running is taken out.
FAILURES_BEFORE_OUT = 3
LONGEST_PAUSE_S = 60.0
LONGEST_COOLDOWN_S = 300.0

Build = Callable[[Endpoint], dict[str, Any] | None]


class UnansweredError(Exception):
    """A request failed as often as it may be tried."""


@dataclass(frozen=True)
class Answer:
    """Who answered, what, and the texts in it."""

    endpoint: Endpoint
    data: dict[str, Any]
    choices: list[Choice]


class Fleet:
    """Endpoints that serve the same model. `run` is the way in; `post` is for what runs within it."""

    def __init__(self, endpoints: Sequence[Endpoint], settings: ServerSettings) -> None:
        self.endpoints = list(endpoints)
        self.settings = settings
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._reviving: set[asyncio.Task[None]] = set()
        self._jitter = random.Random()
        self._client: Any = None
        self.context: int | None = None
        """Positions that the model itself has, where known."""

    @property
    def num_slots(self) -> int:
        """Requests that may be in flight at a time."""
        return len(self.endpoints) * self.settings.concurrency

    def check(self) -> None:
        """See that the servers are there and have the model; wait for them up to `wait_s`.

        One that cannot be reached is taken out as long as another one can.

        Raises:
            UserError: no server answers, or one has another model.
        """
        asyncio.run(self._check())

    def run(self, work: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """The result of `work`, in an event loop of its own."""

        async def within() -> ResultT:
            async with _client() as self._client:
                self._waiting.clear()
                for endpoint in self.endpoints:
                    if endpoint.alive:
                        self._wake_when_rested(endpoint)
                    else:
                        self._revive(endpoint)
                try:
                    return await work()
                finally:
                    await _cancel(self._reviving)
                    self._reviving.clear()

        return asyncio.run(within())

    async def each(self, items: Iterable[ItemT], work: Callable[[ItemT], Awaitable[None]]) -> None:
        """Do `work` on all items: on twice as many at a time as there are slots,
        so that images are made ready ahead."""
        rest = iter(items)

        async def worker() -> None:
            for item in rest:
                await work(item)

        tasks = {asyncio.ensure_future(worker()) for _ in range(2 * self.num_slots)}
        try:
            await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)

    async def post(
        self, build: Build, *, prefer: Endpoint | None = None, on_texts: OnTexts | None = None
    ) -> Answer | None:
        """The answer to a chat completion; `build` makes its body for the endpoint that is to answer.

        `prefer` answers if it is free, since it has the prompt in its cache. None where `build` gives None: this
        endpoint cannot do it. `on_texts` gets what each choice says so far, from the beginning again where an endpoint
        breaks off; whoever reads along sees where an answer was cut for want of room.

        Raises:
            RefusedError: the server will not answer this.
            UnansweredError: it failed too often.
            UserError: all servers are out, or a key is wrong.
        """
        for tries in range(1, self.settings.max_attempts + 1):
            endpoint = await self._take(prefer)
            try:
                if not endpoint.probed:
                    await _unless_taken_out(endpoint, probe(endpoint, self._client, self.settings))
                    self._wake(self.settings.concurrency)
                body = build(endpoint)
                if body is None:
                    return None
                asked = endpoint.post(self._client, body, self.settings.timeout_s, on_texts=on_texts)
                data = await _unless_taken_out(endpoint, asked)
                if on_texts is None:
                    self._check_room(endpoint, body, data)
                answer = Answer(endpoint, data, read_choices(data))
                self._worked(endpoint)
                _count(data.get("usage"))
                return answer
            except RetryLaterError as fault:
                self._failed(endpoint, fault)
                last = f"{endpoint}: {fault}"
                prefer = None
            finally:
                endpoint.in_flight -= 1
                self._wake(1)
            if tries < self.settings.max_attempts:
                await asyncio.sleep(self._pause_s(tries))
        raise UnansweredError(f"{last} ({self.settings.max_attempts} tries)")

    def _check_room(self, endpoint: Endpoint, body: dict[str, Any], data: dict[str, Any]) -> None:
        """Raises UserError where the server had to cut the answer: vLLM lowers max_tokens to what is left, silently.

        A model's own context is no fault of the server's: a model in this process ends there too.
        """
        read, room, wanted = num_prompt_tokens(data), endpoint.max_model_len, body["max_tokens"]
        if room is None or read is None or read + wanted <= room:
            return
        if self.context is not None and room >= self.context:
            return
        raise UserError(
            f"the server has room for {room} tokens; a prompt of {read} and max_new_tokens {wanted} need"
            f" {read + wanted}",
            where=endpoint.url,
            fix=f"serve it with --max-model-len {read + wanted} or more (vllm.max_model_len where stages start it)",
        )

    async def _check(self) -> None:
        deadline = time.monotonic() + self.settings.wait_s
        said_last = ""
        async with _client() as client:
            while True:
                faults = await asyncio.gather(*(_fault(endpoint, client) for endpoint in self.endpoints))
                named = [(e, fault) for e, fault in zip(self.endpoints, faults, strict=True) if fault is not None]
                wrong = [(e, fault) for e, fault in named if isinstance(fault, NotServedError)]
                if not wrong and len(named) < len(self.endpoints):
                    for endpoint, fault in named:
                        self._take_out(endpoint, str(fault))
                    return
                said = _list((endpoint, str(fault)) for endpoint, fault in wrong or named)
                if time.monotonic() >= deadline:
                    raise UserError(
                        ("a server does not have the model:\n" if wrong else "no server answers:\n") + said,
                        fix="serve the model under this name (docs/serving.md), or set server.wait_s to wait for it",
                    )
                if said != said_last:
                    log.info("waiting up to %g s for the servers:\n%s", self.settings.wait_s, said)
                    said_last = said
                await asyncio.sleep(min(2.0, self.settings.wait_s))

    async def _take(self, prefer: Endpoint | None) -> Endpoint:
        """The least busy endpoint that has a slot free, with the slot taken; waits for one.

        An endpoint that has not been probed has a single slot: whoever takes it, probes.
        """
        while True:
            self._stop_if_all_are_out()
            now = time.monotonic()
            free = [
                endpoint
                for endpoint in self.endpoints
                if endpoint.alive
                and endpoint.in_flight < (self.settings.concurrency if endpoint.probed else 1)
                and endpoint.not_before <= now
            ]
            if free:
                endpoint = prefer if prefer in free else min(free, key=lambda endpoint: endpoint.in_flight)
                endpoint.in_flight += 1
                return endpoint
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter

    def _wake(self, count: int) -> None:
        while self._waiting and count:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    def _wake_when_rested(self, endpoint: Endpoint) -> None:
        # A little later than that: a clock that is early would leave everybody waiting.
        rest_s = endpoint.not_before - time.monotonic() + 0.05
        asyncio.get_running_loop().call_later(rest_s, self._wake, self.settings.concurrency)

    def _worked(self, endpoint: Endpoint) -> None:
        endpoint.num_answers += 1
        endpoint.failures_in_a_row = 0

    def _failed(self, endpoint: Endpoint, fault: RetryLaterError) -> None:
        endpoint.num_failures += 1
        if endpoint.alive:
            # Of one that is out already, why it went counts.
            endpoint.last_error = str(fault)
        if fault.wait_s is not None:
            endpoint.not_before = max(endpoint.not_before, time.monotonic() + fault.wait_s)
            self._wake_when_rested(endpoint)
        if fault.busy:
            return
        endpoint.failures_in_a_row += 1
        if endpoint.alive and (fault.gone or endpoint.failures_in_a_row >= FAILURES_BEFORE_OUT):
            self._take_out(endpoint, str(fault))
            self._revive(endpoint)

    def _take_out(self, endpoint: Endpoint, reason: str) -> None:
        endpoint.alive, endpoint.probed, endpoint.failed_checks = False, False, 0
        endpoint.out_since, endpoint.last_error = time.monotonic(), reason
        endpoint.not_before = endpoint.out_since + self.settings.cooldown_s
        log.warning("taken out: %s: %s", endpoint, reason)
        # What still waits for it would hold the one slot in which it is probed when it is back.
        for request in endpoint.requests:
            request.cancel()

    def _revive(self, endpoint: Endpoint) -> None:
        self._reviving.add(asyncio.ensure_future(self._check_now_and_then(endpoint)))

    async def _check_now_and_then(self, endpoint: Endpoint) -> None:
        """Until an endpoint that is out answers again; pauses double."""
        pause = self.settings.cooldown_s
        while True:
            await asyncio.sleep(max(0.0, endpoint.not_before - time.monotonic()))
            try:
                fault = await _fault(endpoint, self._client)
            except UserError as error:
                fault = error
            if fault is None:
                endpoint.alive, endpoint.not_before = True, 0.0
                # One more failure is enough to take it out again.
                endpoint.failures_in_a_row = FAILURES_BEFORE_OUT - 1
                log.info("back again: %s", endpoint)
                self._wake(self.settings.concurrency)
                return
            endpoint.last_error = str(fault)
            endpoint.failed_checks += 1
            pause = min(2 * pause, LONGEST_COOLDOWN_S)
            endpoint.not_before = time.monotonic() + pause
            if self._all_are_out():
                self._wake(len(self._waiting))

    def _all_are_out(self) -> bool:
        """Whether every endpoint is out and failed a check, the last one for `wait_s` or longer."""
        if not all(not endpoint.alive and endpoint.failed_checks for endpoint in self.endpoints):
            return False
        if all(endpoint.has_ended() for endpoint in self.endpoints):
            return True
        return time.monotonic() - max(endpoint.out_since for endpoint in self.endpoints) >= self.settings.wait_s

    def _stop_if_all_are_out(self) -> None:
        if self._all_are_out():
            raise UserError(
                "no server is left:\n" + _list((endpoint, endpoint.last_error) for endpoint in self.endpoints),
                fix="start them again; the same command resumes, what is finished is kept",
            )

    def _pause_s(self, tries: int) -> float:
        pause = min(self.settings.backoff_s * 2 ** (tries - 1), LONGEST_PAUSE_S)
        return pause * self._jitter.uniform(0.5, 1.5)


def _count(usage: Any) -> None:
    """Count the tokens of an answer, where the server says how many."""
    said = usage if isinstance(usage, dict) else {}
    numbers = [said.get(name) for name in ("prompt_tokens", "completion_tokens")]
    read, written = (number if isinstance(number, int) else 0 for number in numbers)
    count_tokens(read=read, written=written)


async def _unless_taken_out(endpoint: Endpoint, request: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Raises RetryLaterError where the endpoint is taken out before the request is answered."""
    task = asyncio.ensure_future(request)
    endpoint.requests.add(task)
    try:
        return await task
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if endpoint.alive or (current is not None and current.cancelling()):
            task.cancel()
            raise
        raise RetryLaterError("it was taken out before it answered") from None
    finally:
        endpoint.requests.discard(task)


async def _fault(endpoint: Endpoint, client: Any) -> Exception | None:
    try:
        await endpoint.check(client)
    except (RetryLaterError, NotServedError, RefusedError) as error:
        return error
    return None


def _list(said: Iterable[tuple[Endpoint, str]]) -> str:
    return "\n".join(f"  - {endpoint}: {words}" for endpoint, words in said)


def _client() -> Any:
    try:
        import httpx
    except ImportError:
        raise UserError(
            "servers are spoken to with httpx, which is not installed", fix=install_extra("servers")
        ) from None
    # The fleet bounds the connections itself.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    try:
        # This machine is not reached through a proxy.
        here = dict.fromkeys(("all://127.0.0.1", "all://localhost"))
        certificates = _certificates(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
        return httpx.AsyncClient(timeout=None, limits=limits, mounts=here, verify=certificates)
    except (ImportError, ValueError, OSError, httpx.InvalidURL):
        # What is said of them may hold a proxy's password.
        raise UserError(
            "the proxies or certificates that the environment names cannot be used",
            where="HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE or SSL_CERT_DIR",
            fix="correct or unset them; a SOCKS proxy needs pip install 'httpx[socks]'",
        ) from None


@functools.cache
def _certificates(file: str | None, folder: str | None) -> ssl.SSLContext:
    """Those that connections trust; read once for what the environment names, as that takes longer than many a request.

    httpx itself finds `file` and `folder` (SSL_CERT_FILE, SSL_CERT_DIR).
    """
    import httpx

    return httpx.create_ssl_context()


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
