"""A grammar that takes long to compile holds up its own request alone, and cannot take the engine with it."""

from __future__ import annotations

import dataclasses
import queue
import socket
import threading
from collections.abc import Callable, Iterator

import msgspec
import openai
import pytest

from blockyard.agent.engine_process import Commands, _Loop
from blockyard.agent.messages import Abort, AddRequest, Command, Event, Outputs, Rejected, Shutdown
from blockyard.agent.wire import LENGTH, frame
from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine
from blockyard.engine.model.files import prepare
from blockyard.engine.sampling_params import SamplingParams, Structure
from blockyard.engine.structured import Grammar

from .process import MODEL, AgentProcess

PLAIN = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SLOW = Structure("json_schema", '{"enum": ["slow"]}')
QUICK = Structure("json_schema", '{"enum": ["quick"]}')


class Running:
    """The loop of an engine process, in a thread. Compiling SLOW waits for ``go_on``."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = engine
        self.started, self.go_on = threading.Event(), threading.Event()
        compile_now: Callable[[Structure], Grammar] = engine.compile

        def compile_later(structure: Structure) -> Grammar:
            if structure == SLOW:
                self.started.set()
                assert self.go_on.wait(60)
            return compile_now(structure)

        monkeypatch.setattr(engine, "compile", compile_later)
        self._socket, theirs = socket.socketpair()
        self._stream = self._socket.makefile("rb")
        commands: Commands = queue.SimpleQueue()
        self._thread = threading.Thread(target=_Loop(engine, theirs, commands).run)
        self._thread.start()

    def send(self, *commands: Command) -> None:
        for command in commands:
            self._socket.sendall(frame(command))

    def add(self, request_id: str, structure: Structure | None = None) -> None:
        params = dataclasses.replace(PLAIN, structure=structure, ignore_eos=structure is None)
        self.send(AddRequest(request_id, [1, 2, 3], params))

    def end_of(self, request_id: str) -> Rejected | list[int]:
        """The tokens of a request, or its rejection; what comes for others before it is dropped."""
        tokens: list[int] = []
        while True:
            (size,) = LENGTH.unpack(self._stream.read(LENGTH.size))
            event: Event = msgspec.msgpack.decode(self._stream.read(size), type=Event)
            if isinstance(event, Rejected) and event.request_id == request_id:
                return event
            for output in event.outputs if isinstance(event, Outputs) else []:
                if output.request_id == request_id:
                    tokens += output.token_ids
                    if output.finish_reason is not None:
                        return tokens

    def stop(self) -> None:
        self.go_on.set()
        self.send(Shutdown())
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._socket.shutdown(socket.SHUT_WR)  # the end of the loop's reader


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(
        EngineConfig(
            model=str(prepare(MODEL)), device="cpu", threads=1, kv_blocks=60, max_num_seqs=4, max_model_len=64
        )
    )
    yield engine
    engine.close()


@pytest.fixture
def running(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    running = Running(engine, monkeypatch)
    yield running
    running.stop()
    engine.check()
    assert not engine.has_work
    assert engine.stats().device.active == 0


def test_steps_and_other_grammars_go_on_while_one_is_compiled(running: Running) -> None:
    running.add("slow", SLOW)
    assert running.started.wait(60)
    running.add("plain")
    assert len(running.end_of("plain")) == 6  # type: ignore[arg-type]
    running.add("quick", QUICK)
    assert running.end_of("quick")
    running.go_on.set()
    tokens = running.end_of("slow")
    assert isinstance(tokens, list) and tokens


def test_a_request_can_be_dropped_while_its_grammar_is_compiled(running: Running) -> None:
    running.add("slow", SLOW)
    assert running.started.wait(60)
    running.send(Abort("slow"))
    running.add("plain")
    running.end_of("plain")  # so the loop has seen the abort
    before = running.engine.stats().prompt_tokens
    running.go_on.set()
    running.add("quick", QUICK)
    running.end_of("quick")
    assert running.engine.stats().prompt_tokens == before + 3  # of the quick one alone


def test_an_id_is_taken_while_its_grammar_is_compiled(running: Running) -> None:
    running.add("slow", SLOW)
    assert running.started.wait(60)
    running.add("slow", QUICK)
    rejected = running.end_of("slow")
    assert isinstance(rejected, Rejected) and rejected.field == "request_id"
    running.go_on.set()
    assert isinstance(running.end_of("slow"), list)


def test_a_defect_of_the_compiler_is_the_requests_alone(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.engine, "compile", lambda _: 1 / 0)
    running.add("broken", QUICK)
    rejected = running.end_of("broken")
    assert isinstance(rejected, Rejected) and rejected.internal
    running.add("plain")
    assert len(running.end_of("plain")) == 6  # type: ignore[arg-type]


def test_a_schema_that_would_take_all_memory_is_refused_and_others_are_served(
    agent: AgentProcess, client: openai.OpenAI
) -> None:
    """Ten million states of the automaton: short to write, and no limit of llguidance prevents it."""
    engine = agent.engine_pid()
    schema = {"type": "integer", "multipleOf": 9999991}
    with pytest.raises(openai.BadRequestError, match=r"too complex.*simplify") as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "A number."}],
            max_tokens=8,
            response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        )
    assert caught.value.param == "response_format"
    answer = client.completions.create(model=MODEL, prompt="1, 2, 3,", max_tokens=4)
    assert answer.choices[0].text
    assert agent.engine_pid() == engine
