"""Clients of one service that ask all the time, and remember what they were answered and what went wrong."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import openai

TRIES = 3  # of one request, as many as OpenAI's client makes unless it is told otherwise
PAUSE = 0.5  # seconds between two of them
THINKING = 0.25  # seconds between two requests of a client, so that starting agents get something of the CPU
PROMPTS = (
    "Say hello.",
    "What is the capital of France?",
    "Count from one to ten.",
    "Name three colours.",
)


class Clients:
    """OpenAI's clients in threads of their own, half of their requests streamed, all of them greedy.

    ``addresses`` returns those that the service's Service leads to at the moment: a request goes to any of
    them. An attempt that comes to no proper end is ``broken`` and is made again, by its own client and not by
    OpenAI's, so that it is seen; a request whose attempts are all broken has ``failed``.
    """

    def __init__(
        self, model: str, addresses: Callable[[], list[str]], count: int = 3, tokens: int = 24
    ) -> None:
        self._model = model
        self._addresses = addresses
        self._tokens = tokens
        self.answers: dict[str, set[str]] = defaultdict(set)
        self.served = 0
        self.broken: list[str] = []
        self.failed: list[str] = []
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="client")
        self._running: list[Future[None]] = [self._threads.submit(self._go_on, n) for n in range(count)]

    def stop(self) -> None:
        """The end, after the requests that are under way. Raises what a client did not expect."""
        self._stop.set()
        self._threads.shutdown()
        for client in self._running:
            client.result()

    def wait_for(self, more: int, limit: float = 240.0) -> None:
        """Until so many more requests have been served or have failed."""
        with self._changed:
            goal = self.served + len(self.failed) + more
            done = self._changed.wait_for(
                lambda: self.served + len(self.failed) >= goal or any(each.done() for each in self._running),
                limit,
            )
        assert done and not any(each.done() for each in self._running), f"the clients stand still: {self}"

    def __str__(self) -> str:
        return f"{self.served} served, broken attempts {self.broken}, failed requests {self.failed}"

    def _go_on(self, number: int) -> None:
        chance = random.Random(number)
        try:
            while not self._stop.wait(THINKING):
                self._request(chance)
        finally:
            with self._changed:
                self._changed.notify_all()

    def _request(self, chance: random.Random) -> None:
        prompt, streamed = chance.choice(PROMPTS), chance.random() < 0.5
        answer = None
        for _ in range(TRIES):
            try:
                answer = ask(
                    chance.choice(self._addresses()), self._model, prompt, self._tokens, stream=streamed
                )
                break
            except Exception as error:  # noqa: BLE001 -- whatever it is, the client has got no answer
                with self._changed:
                    self.broken.append(f"{prompt!r}, streamed: {streamed}: {error!r}")
                self._stop.wait(PAUSE)
        with self._changed:
            if answer is None:
                self.failed.append(prompt)
            else:
                self.served += 1
                self.answers[prompt].add(answer)
            self._changed.notify_all()


def ask(
    gateway: str,
    model: str,
    prompt: str,
    tokens: int,
    *,
    stream: bool,
    begun: Callable[[], object] = lambda: None,
) -> str:
    """The greedy answer to a prompt, and why it ended; ``begun`` is called at a stream's first text."""
    request: Any = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    with openai.OpenAI(base_url=f"http://{gateway}/v1", api_key="none", max_retries=0, timeout=120) as client:
        if not stream:
            choice = client.chat.completions.create(**request).choices[0]
            return f"{choice.message.content} [{choice.finish_reason}]"
        text, reason = "", None
        for chunk in client.chat.completions.create(**request, stream=True):
            for choice in chunk.choices:
                if choice.delta.content and not text:
                    begun()
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
        return f"{text} [{reason}]"
