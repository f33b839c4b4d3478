"""Chat completions of an OpenAI-compatible server, with care about what is sent where.

- The key comes from the environment, travels in one header to one address, and is in none of our messages.
- Every address that a host name resolves to is checked, and the connection goes to an address that was checked: the
  name cannot resolve to another one in between. Redirects are refused, proxies and .netrc of the environment ignored.
- Whatever fails (the network, the server, the form of the answer) is a `Failure` with a reason that can be shown.

Why not the openai package, or tenacity: the connection has to go to the checked address, which takes a transport of our
own in any case, and what is left of a client is a dozen lines of retries that an interruption must be able to end.
"""

import concurrent.futures
import contextlib
import dataclasses
import email.utils
import ipaddress
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import httpx2 as httpx
import ml_collections

from msd_jax.errors import UserError
from msd_jax.evaluation.judges.interface import Messages, Usage
from msd_jax.io.console import progress

_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses that may pass
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds between attempts; no longer wait is granted to a server
_LARGEST_ANSWER = 1_000_000  # bytes
_COMPLAINTS = (400, 404, 422)  # statuses whose body says what is wrong with the request
_LONGEST_COMPLAINT = 200  # characters


class Failure(Exception):
    """Why there is no answer, in words without secrets.

    Attributes:
      retried: whether another attempt may succeed.
      wait: seconds that the server asks to wait before it; None where it does not say.
      status: of HTTP; None where there was no answer, or a bad one.
      said: what the server says is wrong with the request, on one line; "" for nothing. It is untrusted.
    """

    def __init__(
        self,
        reason: str,
        retried: bool = False,
        wait: float | None = None,
        status: int | None = None,
        said: str = "",
    ):
        super().__init__(reason)
        self.retried, self.wait, self.status, self.said = retried, wait, status, said


@dataclasses.dataclass(frozen=True)
class Keys:
    """What the user knows an endpoint's settings by: the keys, or flags, of its URL and model, and the section."""

    url: str = "config.judge.openai.url"
    model: str = "config.judge.openai.model"
    section: str = "config.judge.openai"


class ChatEndpoint:
    """Chat completions of one server."""

    def __init__(self, config: ml_collections.ConfigDict, keys: Keys = Keys(), key_needed: bool = True):
        """
        Args:
          config: as config.judge.openai.
          keys: what errors call its parts.
          key_needed: whether the environment must hold a key where the config names its variable.

        Raises:
          UserError: it cannot work; nothing was sent.
        """
        self._config = config
        self.usage = Usage()
        self._lock = threading.Lock()
        self.stopped = threading.Event()  # set once nobody waits for answers
        try:
            url = httpx.URL(config.url.rstrip("/") + "/chat/completions")
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            raise UserError(f"{keys.url} must be the base of an OpenAI-compatible API, such as https://HOST/v1")
        if url.userinfo:
            raise UserError(f"{keys.url} must not hold a user or password; see {keys.section}.key_variable")
        if url.scheme == "http" and config.addresses == "public":
            raise UserError(
                f"{keys.url}={config.url!r} would send key and prompts in the clear; use https, or "
                f"{keys.section}.addresses='private' for a server of your own"
            )
        if not config.model:
            raise UserError(f"{keys.model} is empty: name the model to request")
        self._url, self._key = url, _key(config.key_variable, keys.section, key_needed)
        self._client = httpx.Client(
            transport=CheckedTransport(config.addresses, config.concurrency, keys.section),
            follow_redirects=False,
            trust_env=False,
            headers={
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",  # what is small on the wire stays small
                **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            },
        )

    @property
    def has_key(self) -> bool:
        """Whether requests carry a key."""
        return bool(self._key)

    def each(self, ask: Callable[[Any], Any], items: Sequence[Any]) -> Generator[tuple[int, Any], None, None]:
        """(index, ask(item)) of each item as it arrives, `concurrency` of them at a time; close it to end the rest."""
        executor = concurrent.futures.ThreadPoolExecutor(self._config.concurrency)
        try:
            futures = {executor.submit(ask, item): i for i, item in enumerate(items)}
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except BaseException:  # an interruption waits for requests in flight, not for pauses
            self.stopped.set()
            raise
        finally:
            executor.shutdown(cancel_futures=True)

    def side_by_side(
        self, ask: Callable[[Any], Any], items: Sequence[Any], what: str, keep: Callable[[int, Any], None]
    ) -> list[Any]:
        """[ask(item) for item in items], `concurrency` at a time; `keep` gets (index, result) as each arrives."""
        results: dict[int, Any] = {}
        with contextlib.closing(self.each(ask, items)) as arriving, progress(what, len(items)) as advance:
            for done, (index, result) in enumerate(arriving, 1):
                results[index] = result
                keep(index, result)
                advance(done, "")
        return [results[i] for i in range(len(items))]

    def complete(self, messages: Messages, extra: dict[str, Any]) -> str:
        """The text of the whole answer. Raises Failure once the last attempt has failed, or where it is cut off."""
        choice = self.choose(messages, extra)
        if choice.get("finish_reason") == "length":
            raise Failure("answer cut off by the token limit")
        text = choice["message"]["content"]
        if not isinstance(text, str):
            raise Failure("answer without text")
        return self.redacted(text)

    def choose(self, messages: Messages, extra: dict[str, Any]) -> dict[str, Any]:
        """The first choice of the answer, as the server gives it, with "usage". Raises Failure as `complete`.

        Args:
          messages: of the conversation.
          extra: further keys of the request, which `request` of the config overrides; None removes one.
        """
        request = {"model": self._config.model, "messages": messages} | extra | self._config.request.to_dict()
        body = json.dumps({name: value for name, value in request.items() if value is not None}).encode()
        wait = _FIRST_WAIT
        for attempt in range(self._config.retries + 1):
            try:
                return self._attempt(body)
            except Failure as failure:
                if not failure.retried or attempt == self._config.retries or (failure.wait or 0) > _LONGEST_WAIT:
                    raise
                # As long as the server asks for; else a growing pause, random so that not all return at once.
                if self.stopped.wait(failure.wait or random.uniform(0.5, 1) * wait):
                    raise
                wait = min(2 * wait, _LONGEST_WAIT)
            with self._lock:
                self.usage.retries += 1
        raise AssertionError("unreachable")

    def models(self, seconds: float) -> list[str]:
        """Names of the models that the server lists; [] where it lists none. Raises Failure where nobody answers.

        Args:
          seconds: that the answer may take.
        """
        url = self._url.copy_with(path=self._url.path.removesuffix("/chat/completions") + "/models")
        status, _, data = self._sent("GET", url, None, min(seconds, self._config.timeout))
        try:
            names = [model["id"] for model in json.loads(data)["data"]] if status == 200 else []
        except (ValueError, RecursionError, KeyError, TypeError):
            return []
        return [self.redacted(name) for name in names if isinstance(name, str)]

    def _attempt(self, body: bytes) -> dict[str, Any]:
        with self._lock:
            self.usage.requests += 1
        status, headers, data = self._sent("POST", self._url, body, self._config.timeout)
        if 300 <= status < 400:
            raise Failure(f"redirect refused (HTTP {status})", status=status)
        if status != 200:
            wait = _retry_after(headers.get("retry-after"))
            raise Failure(f"HTTP {status}", status in _RETRIED, wait, status, self._complaint(status, data))
        try:
            value = json.loads(data)
            choice = value["choices"][0]
            choice["message"]["content"]
        except (ValueError, RecursionError, KeyError, IndexError, TypeError):
            raise Failure("malformed answer from the endpoint", retried=True) from None
        usage = value.get("usage")
        self._count(usage)
        return choice | {"usage": usage}

    def _sent(
        self, method: str, url: httpx.URL, body: bytes | None, seconds: float
    ) -> tuple[int, httpx.Headers, bytes]:
        """`_exchange`, with a Failure for what happens on the network."""
        try:
            return self._exchange(method, url, body, seconds)
        except httpx.TimeoutException:
            raise Failure(f"no answer within {seconds:g} s", retried=True) from None
        except httpx.HTTPError as error:  # its text may contain addresses, and its request the key
            raise Failure(f"connection failed: {type(error).__name__}", retried=True) from None

    def _exchange(
        self, method: str, url: httpx.URL, body: bytes | None, seconds: float
    ) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body; the body is read for status 200 and for complaints about the request only."""
        deadline, limits = time.monotonic() + seconds, httpx.Timeout(seconds)
        with self._client.stream(method, url, content=body, timeout=limits) as response:
            data = b""
            if response.status_code in (200, *_COMPLAINTS):
                for part in response.iter_raw():
                    data += part
                    if len(data) > _LARGEST_ANSWER:
                        raise Failure(f"answer of more than {_LARGEST_ANSWER:,} bytes")
                    if time.monotonic() > deadline:  # httpx's own limit applies to each read
                        raise httpx.ReadTimeout("")
            return response.status_code, response.headers, data

    def _complaint(self, status: int, data: bytes) -> str:
        """What the server says of a request that it does not take, on one line; "" where it says nothing readable."""
        if status not in _COMPLAINTS:
            return ""
        try:
            value = json.loads(data)
            error = value.get("error", value)
            said = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        except (ValueError, RecursionError, AttributeError):
            return ""
        return self.redacted(" ".join(said.split()))[:_LONGEST_COMPLAINT] if isinstance(said, str) else ""

    def _count(self, usage: Any) -> None:
        if isinstance(usage, dict):
            with self._lock:
                for name in ("prompt_tokens", "completion_tokens"):
                    if type(usage.get(name)) is int and usage[name] >= 0:
                        setattr(self.usage, name, getattr(self.usage, name) + usage[name])

    def redacted(self, text: str) -> str:
        """The text without the key, which a server may repeat."""
        return text.replace(self._key, "[key]") if self._key else text

    def spent(self) -> dict[str, Any]:
        """What was requested so far and what it cost; contains nothing secret."""
        asked = {"url": self._config.url, "model": self._config.model}
        return asked | dataclasses.asdict(self.usage) | {"cost": self.cost}

    @property
    def cost(self) -> float:
        """In the currency of the configured prices."""
        prices = self._config.price_per_million_prompt_tokens, self._config.price_per_million_completion_tokens
        return (prices[0] * self.usage.prompt_tokens + prices[1] * self.usage.completion_tokens) / 1e6


ADDRESSES = ("public", "private", "any")  # of an endpoint's `addresses`


class CheckedTransport(httpx.BaseTransport):
    """Connects only to addresses of the allowed kind ("public", "private" or "any"), whatever the host's name."""

    def __init__(self, addresses: str, connections: int, section: str):
        """`section`: of the config, that says which addresses are allowed."""
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._addresses, self._section = addresses, section
        self._inner = httpx.HTTPTransport(trust_env=False, limits=limits)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        try:
            found = socket.getaddrinfo(host, request.url.port or 443, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise httpx.ConnectError("the host name does not resolve") from None
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            if not is_allowed(address, self._addresses):
                raise Failure(
                    f"{host} is at {address}, which {self._section}.addresses={self._addresses!r} does not allow"
                )
        # The Host header stays, and TLS still verifies the name.
        request.url = request.url.copy_with(host=addresses[0])
        request.extensions = {**request.extensions, "sni_hostname": host}
        return self._inner.handle_request(request)

    def close(self) -> None:
        self._inner.close()


def is_allowed(address: str, kind: str) -> bool:
    """Whether `kind` allows an IP address: "public"; "private", which adds loopback and private networks; or "any".

    Link-local addresses, where clouds serve their metadata, are allowed by "any" alone.
    """
    if kind == "any":
        return True
    ip = _embedded(ipaddress.ip_address(address.partition("%")[0]))
    if ip in _METADATA or ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        return False
    return ip.is_global or (kind == "private" and (ip.is_private or ip in _SHARED))


# Metadata outside the link-local range: AWS over IPv6, Alibaba Cloud, Oracle Cloud.
_METADATA = [ipaddress.ip_address(text) for text in ("fd00:ec2::254", "100.100.100.200", "192.0.0.192")]
_SHARED = ipaddress.ip_network("100.64.0.0/10")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _embedded(ip: Any) -> Any:
    """The IPv4 address that an IPv6 address leads to, if it does."""
    if ip.version == 4:
        return ip
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1]) or ip


def _key(variable: str, section: str, needed: bool) -> str:
    key = os.environ.get(variable, "").strip() if variable else ""
    if not key:
        if variable and needed:
            raise UserError(
                f"the environment variable {variable} ({section}.key_variable) is not set; "
                "set it, or key_variable='' for an endpoint without a key"
            )
        return ""
    if not key.isascii() or not key.isprintable() or " " in key:  # the HTTP library would quote the key in its error
        raise UserError(
            f"the environment variable {variable} does not hold a key: it contains blanks or unusual characters"
        )
    return key


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date; None for anything else."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
