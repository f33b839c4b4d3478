"""A judge behind an OpenAI-compatible endpoint: a rubric judge such as GPT-4o, or a guard that vLLM serves.

What it is careful about:

- The key comes from the environment, travels in one header to one address, and is in no message of ours.
- Every address that a host name resolves to is checked, and the connection goes to an address that was checked: a
  name cannot turn into another one in between. Redirects are refused, proxies and .netrc of the environment ignored.
- Whatever fails, be it the network, the server or the form of the answer, leaves the response unjudged.
"""

import collections
import concurrent.futures
import dataclasses
import email.utils
import hashlib
import ipaddress
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx2 as httpx
import ml_collections

from msd_jax.errors import UserError
from msd_jax.evaluation.judges import formats
from msd_jax.evaluation.judges.interface import Judgement, Keep, Response, Verdict, ignore
from msd_jax.evaluation.judges.rules import RulesJudge
from msd_jax.io.console import log, progress
from msd_jax.parallel import distributed

_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses that may pass
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds between attempts; a server that asks for more is given up
_LARGEST_ANSWER = 1_000_000  # bytes


@dataclasses.dataclass
class Usage:
    """What the requests of a judge came to; tokens as the server counts them."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unjudged: int = 0


class Failure(Exception):
    """Why there is no answer, in words that hold nothing secret."""

    def __init__(self, reason: str, retried: bool = False, wait: float | None = None):
        super().__init__(reason)
        self.retried, self.wait = retried, wait


class Endpoint:
    """Chat completions of one server.

    Args of the constructor are config.judge.openai's; it raises ValueError where they are not fit, before any request.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        self._config = config
        self.usage = Usage()
        self._lock = threading.Lock()
        self.stopped = threading.Event()  # set once nobody waits for an answer any more
        try:
            url = httpx.URL(config.url.rstrip("/") + "/chat/completions")
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            raise UserError(
                "config.judge.openai.url must be the base of an OpenAI-compatible API, such as https://HOST/v1"
            )
        if url.userinfo:
            raise UserError("config.judge.openai.url must not hold a user or password; see key_variable")
        if url.scheme == "http" and config.addresses == "public":
            raise UserError(
                f"config.judge.openai.url={config.url!r} would send key and prompts in the clear; use https, or "
                "config.judge.openai.addresses='private' for a server of your own"
            )
        if not config.model:
            raise UserError("config.judge.openai.model is empty: name the model that the endpoint is to run")
        self._url, self._key = url, _key(config.key_variable)
        self._client = httpx.Client(
            transport=CheckedTransport(config.addresses, config.concurrency),
            timeout=httpx.Timeout(config.timeout),
            follow_redirects=False,
            trust_env=False,
            headers={
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",  # what is small on the wire stays small
                **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            },
        )

    def side_by_side(
        self, ask: Callable[[Any], Any], items: Sequence[Any], what: str, keep: Callable[[int, Any], None]
    ) -> list[Any]:
        """[ask(item) for item in items], config.concurrency at a time; `keep` gets (index, result) as each comes."""
        results: dict[int, Any] = {}
        executor = concurrent.futures.ThreadPoolExecutor(self._config.concurrency)
        try:
            futures = {executor.submit(ask, item): i for i, item in enumerate(items)}
            with progress(what, len(futures)) as advance:
                for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                    results[futures[future]] = future.result()
                    keep(futures[future], future.result())
                    advance(done, "")
        except BaseException:  # an interruption waits for the answers under way, and for no pause
            self.stopped.set()
            raise
        finally:
            executor.shutdown(cancel_futures=True)
        return [results[i] for i in range(len(items))]

    def complete(self, messages: formats.Messages, extra: dict[str, Any]) -> str:
        """The text of the answer. Raises Failure after the last attempt."""
        request = {"model": self._config.model, "messages": messages} | extra | self._config.request.to_dict()
        body = json.dumps({name: value for name, value in request.items() if value is not None}).encode()
        wait = _FIRST_WAIT
        for attempt in range(self._config.retries + 1):
            try:
                return self._redacted(self._attempt(body))
            except Failure as failure:
                if not failure.retried or attempt == self._config.retries or (failure.wait or 0) > _LONGEST_WAIT:
                    raise
                # What the server asks for; else a growing pause, drawn so that not all come back at once.
                if self.stopped.wait(failure.wait or random.uniform(0.5, 1) * wait):
                    raise
                wait = min(2 * wait, _LONGEST_WAIT)
            with self._lock:
                self.usage.retries += 1
        raise AssertionError("unreachable")

    def _attempt(self, body: bytes) -> str:
        with self._lock:
            self.usage.requests += 1
        try:
            status, headers, data = self._post(body)
        except httpx.TimeoutException:
            raise Failure(f"no answer within {self._config.timeout:g} s", retried=True) from None
        except httpx.HTTPError as error:  # its text may name addresses, and its request holds the key
            raise Failure(f"connection failed: {type(error).__name__}", retried=True) from None
        if 300 <= status < 400:
            raise Failure(f"redirect refused (HTTP {status})")
        if status != 200:
            raise Failure(f"HTTP {status}", retried=status in _RETRIED, wait=_retry_after(headers.get("retry-after")))
        try:
            value = json.loads(data)
            choice = value["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, RecursionError, KeyError, IndexError, TypeError):
            raise Failure("malformed answer of the endpoint", retried=True) from None
        self._count(value.get("usage"))
        if choice.get("finish_reason") == "length":
            raise Failure("answer cut off by the limit on tokens")
        if not isinstance(text, str):
            raise Failure("answer without text")
        return text

    def _post(self, body: bytes) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body; of a status other than 200 the body is not read."""
        deadline = time.monotonic() + self._config.timeout
        with self._client.stream("POST", self._url, content=body) as response:
            data = b""
            if response.status_code == 200:
                for part in response.iter_raw():
                    data += part
                    if len(data) > _LARGEST_ANSWER:
                        raise Failure(f"answer of more than {_LARGEST_ANSWER:,} bytes")
                    if time.monotonic() > deadline:  # httpx's own limit is for each read
                        raise httpx.ReadTimeout("")
            return response.status_code, response.headers, data

    def _count(self, usage: Any) -> None:
        if isinstance(usage, dict):
            with self._lock:
                for name in ("prompt_tokens", "completion_tokens"):
                    if type(usage.get(name)) is int and usage[name] >= 0:
                        setattr(self.usage, name, getattr(self.usage, name) + usage[name])

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def spent(self) -> dict[str, Any]:
        """What was asked so far and what it cost, nothing secret."""
        told = {"url": self._config.url, "model": self._config.model}
        return told | dataclasses.asdict(self.usage) | {"cost": self.cost}

    @property
    def cost(self) -> float:
        """In the currency of the prices in the config."""
        prices = self._config.price_per_million_prompt_tokens, self._config.price_per_million_completion_tokens
        return (prices[0] * self.usage.prompt_tokens + prices[1] * self.usage.completion_tokens) / 1e6


class OpenAIJudge:
    """Asks an endpoint about each response; `config` is config.judge.openai."""

    name = "openai"

    def __init__(self, config: ml_collections.ConfigDict):
        """Raises UserError where the config is not fit."""
        self.endpoint = Endpoint(config)
        self.endpoints = (self.endpoint,)
        self._format = formats.FORMATS[config.format]
        self._instruction = formats.instruction(config.format, config.instruction)
        self._extra = {"temperature": 0.0, "max_tokens": 256}
        if config.format == "rubric":
            self._extra["response_format"] = {"type": "json_object"}
        self._rules = RulesJudge()
        settings = [config.url, config.model, config.format, self._instruction, self._extra, config.request.to_dict()]
        text = json.dumps([*settings, self._rules.version], sort_keys=True)
        self.version = f"{config.model}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def judge(self, responses: Sequence[Response], keep: Keep = ignore) -> list[Judgement]:
        """Process 0 asks, the others are told."""
        told = distributed.from_first(lambda: [[j.verdict, j.reason] for j in self._ask_all(responses, keep)])
        return [Judgement(Verdict(verdict), reason, self.name, self.version) for verdict, reason in told]

    def _ask_all(self, responses: Sequence[Response], keep: Keep) -> list[Judgement]:
        judgements = self.endpoint.side_by_side(self._ask, responses, f"judging ({self.version})", keep)
        self._report(collections.Counter(j.reason for j in judgements if j.verdict == Verdict.UNJUDGED))
        return judgements

    def _ask(self, response: Response) -> Judgement:
        return Judgement(*self._verdict(response), self.name, self.version)

    def _verdict(self, response: Response) -> tuple[Verdict, str]:
        try:
            text = self.endpoint.complete(self._format.messages(self._instruction, response), self._extra)
        except Failure as failure:
            return Verdict.UNJUDGED, str(failure)
        answer = self._format.parse(text)
        if answer is None:
            return Verdict.UNJUDGED, "the judge's answer is not in its format"
        return formats.settle(response, answer, self._rules)

    def _report(self, failures: collections.Counter[str]) -> None:
        usage = self.endpoint.usage
        usage.unjudged += failures.total()
        log(
            f"judge {self.version}: {usage.requests} requests so far, {usage.retries} of them repeated, "
            f"{usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens"
            + (f", cost {self.endpoint.cost:.2f}" if self.endpoint.cost else "")
        )
        for reason, count in failures.most_common():
            log(f"judge {self.version}: {count} responses unjudged: {reason}")


ADDRESSES = ("public", "private", "any")  # of config.judge.openai.addresses


class CheckedTransport(httpx.BaseTransport):
    """Connects to addresses of the allowed kind alone ("public", "private" or "any"), whatever the host's name is."""

    def __init__(self, addresses: str, connections: int):
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._addresses, self._inner = addresses, httpx.HTTPTransport(trust_env=False, limits=limits)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        try:
            found = socket.getaddrinfo(host, request.url.port or 443, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise httpx.ConnectError("the host name does not resolve") from None
        addresses = [entry[4][0] for entry in found]
        for address in addresses:
            if not is_allowed(address, self._addresses):
                raise Failure(
                    f"{host} is at {address}, which config.judge.openai.addresses={self._addresses!r} does not allow"
                )
        # The Host header stays, and TLS still asks for a certificate of the name.
        request.url = request.url.copy_with(host=addresses[0])
        request.extensions = {**request.extensions, "sni_hostname": host}
        return self._inner.handle_request(request)

    def close(self) -> None:
        self._inner.close()


def is_allowed(address: str, kind: str) -> bool:
    """Whether an IP address is of a kind: "public"; "private", loopback and private networks too; "any", all of them.

    Link-local addresses, at which clouds keep their metadata, are "any" alone.
    """
    if kind == "any":
        return True
    ip = _embedded(ipaddress.ip_address(address.partition("%")[0]))
    if ip in _METADATA or ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        return False
    return ip.is_global or (kind == "private" and (ip.is_private or ip in _SHARED))


# Outside of the link-local range: AWS by IPv6, Alibaba Cloud, Oracle Cloud.
_METADATA = [ipaddress.ip_address(text) for text in ("fd00:ec2::254", "100.100.100.200", "192.0.0.192")]
_SHARED = ipaddress.ip_network("100.64.0.0/10")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _embedded(ip: Any) -> Any:
    """The IPv4 address that an IPv6 address leads to, where it does."""
    if ip.version == 4:
        return ip
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1]) or ip


def _key(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {variable} (config.judge.openai.key_variable) is not set; "
            "set it, or key_variable='' for an endpoint without a key"
        )
    if not key.isascii() or not key.isprintable() or " " in key:  # the HTTP library would quote it in its error
        raise UserError(f"the environment variable {variable} does not hold a key: blanks or unusual characters in it")
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
