"""Tensor parallelism: the same ids as one rank, and whoever dies takes the others along, without a hang."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine
from blockyard.engine.errors import ConfigError
from blockyard.engine.model.files import prepare
from blockyard.engine.runner import Runner
from blockyard.engine.sampling_params import SamplingParams
from blockyard.engine.workers import ParallelRunner

from .models import make_model

TIMEOUT = 120.0  # seconds that bound a wait for an event; no test depends on how soon it comes
Tokens = dict[tuple[str, int], list[int]]
ROOMY = {"kv_blocks": 200}
TIGHT = {"kv_blocks": 26, "host_blocks": 60, "block_tokens": 8, "max_batch_tokens": 24}


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> Tokens:
    tokens: Tokens = {}
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        engine.check()
    return tokens


def prompts(count: int, vocab: int = 160) -> list[list[int]]:
    rng = random.Random(3)
    stem = [rng.randrange(3, vocab) for _ in range(20)]
    return [stem + [rng.randrange(3, vocab) for _ in range(rng.randrange(1, 30))] for _ in range(count)]


def workers_of(pid: int) -> list[int]:
    """Pids of the worker processes whose parent is ``pid``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and b"blockyard.engine.workers" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def wait_until_gone(pid: int) -> None:
    """Whoever's child it is."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if b"blockyard.engine.workers" in Path(f"/proc/{pid}/cmdline").read_bytes():
            assert select.select([descriptor], [], [], TIMEOUT)[0], f"worker {pid} is still there"
    except FileNotFoundError:
        pass
    finally:
        os.close(descriptor)


@pytest.fixture
def load() -> Iterator[Callable[..., Engine]]:
    """Builds engines and ends them; no worker survives the test."""
    engines: list[Engine] = []

    def make(model: Path, **settings: Any) -> Engine:
        engines.append(Engine(EngineConfig(model=str(model), device="cpu", threads=1, **settings)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    assert workers_of(os.getpid()) == []


@pytest.mark.parametrize(
    ("family", "ranks", "changes"),
    [
        ("qwen2", 2, {"vocab_size": 161}),  # a vocabulary that does not divide is padded
        ("llama-bias", 3, {}),
        ("llama-tied", 2, {}),  # one KV head, on both ranks
        ("llama", 4, {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}),  # each on two
    ],
)
def test_ranks_give_the_ids_of_one(
    load: Callable[..., Engine], tmp_path: Path, family: str, ranks: int, changes: dict[str, int]
) -> None:
    model = make_model(family, tmp_path, **changes)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=3)
    alone = run(load(model, **ROOMY), prompts(6), greedy)
    together = load(model, tensor_parallel=ranks, **ROOMY)
    assert isinstance(together.runner, ParallelRunner)
    assert len(workers_of(os.getpid())) == ranks - 1
    assert run(together, prompts(6), greedy) == alone


KINDS = {
    "greedy": SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    # Another seed may draw next to the boundary of two tokens, where the order of summation decides.
    "n": SamplingParams(temperature=0.8, seed=0, n=2, best_of=2, max_tokens=30, ignore_eos=True),
    "beam": SamplingParams(temperature=0, n=2, best_of=2, beam_search=True, max_tokens=30),
}


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_ranks_give_the_ids_of_one_under_little_memory(
    load: Callable[..., Engine], tmp_path: Path, preemption: str
) -> None:
    model = make_model("llama", tmp_path)
    alone = load(model, **ROOMY)
    engine = load(model, tensor_parallel=3, preemption=preemption, **TIGHT)
    for kind, params in KINDS.items():
        before = engine.stats()
        assert run(engine, prompts(5), params) == run(alone, prompts(5), params), kind
        after = engine.stats()
        assert after.prefix_hits > before.prefix_hits
        name = f"preemptions_{preemption}"
        assert getattr(after, name) > getattr(before, name), kind


def test_three_ranks_of_smollm2_give_the_ids_of_one(load: Callable[..., Engine]) -> None:
    model = prepare("SmolLM2-135M-Instruct")
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    texts = prompts(3, vocab=49000)
    settings = {"kv_blocks": 64, "max_num_seqs": 4, "max_model_len": 512}
    alone = load(model, **settings)
    expected = run(alone, texts, params)
    alone.close()
    assert run(load(model, tensor_parallel=3, **settings), texts, params) == expected


def test_all_ranks_take_the_smallest_pool(
    load: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 would have room for more blocks than the worker."""
    model = make_model("qwen2", tmp_path)
    monkeypatch.setattr(Runner, "_decide_blocks", lambda _: 10**6)
    engine = load(model, tensor_parallel=2, max_num_seqs=8)
    assert engine.info.kv_blocks == 9 * 512 // 16  # what nine sequences of the model's length could use
    assert len(run(engine, prompts(2), SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel is 0; it must be at least 1"),
        ({"tensor_parallel": 4}, "tensor_parallel is 4, but the model has 6 heads, 3 KV heads"),
        ({"tensor_parallel": 3, "block_tokens": 7}, "block_tokens is 7"),
        ({"tensor_parallel": 3, "kv_blocks": 10**9}, "lower kv_blocks"),
        ({"tensor_parallel": 3, "max_model_len": 10**9}, "max_model_len is 1000000000"),
    ],
)
def test_bad_settings_leave_no_process(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    model = make_model("llama", tmp_path)
    with pytest.raises(ConfigError, match=message):
        Engine(EngineConfig(model=str(model), device="cpu", **settings))  # type: ignore[arg-type]
    assert workers_of(os.getpid()) == []


def test_a_second_tensor_parallel_engine_in_a_process_is_refused(
    load: Callable[..., Engine], tmp_path: Path
) -> None:
    model = make_model("llama", tmp_path)
    load(model, tensor_parallel=3, **ROOMY)
    with pytest.raises(ConfigError, match="runs another tensor-parallel engine"):
        load(model, tensor_parallel=3, **ROOMY)


# ── Death ─────────────────────────────────────────────────────────────────────────────────────────
# Each time the engine lives in a process of its own: what is under test may have to end that process.

HARNESS = """
import json, os, signal, sys, threading
from blockyard.engine import workers
from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine
from blockyard.engine.errors import EngineError
from blockyard.engine.sampling_params import SamplingParams

def say(*words):
    print(json.dumps(words), flush=True)

def listen():
    sys.stdin.readline()

started = workers._start
def start(config, rank, *, cuda):
    worker = started(config, rank, cuda=cuda)
    say("worker", rank, worker.process.pid)
    return worker
workers._start = start

death = threading.Event()
def on_death(error):
    say("on_death", type(error).__name__, str(error))
    death.set()

def load(**settings):
    say("pid", os.getpid())
    return Engine(EngineConfig(model=sys.argv[1], device="cpu", threads=1, kv_blocks=200,
                               tensor_parallel=RANKS, **settings), on_death=on_death)

def add(engine, max_tokens=400):
    for i in range(3):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        engine.add_request(str(i), [5, 6, 7 + i], params)

def steps(engine):
    try:
        while engine.has_work:
            engine.step()
        say("done")
    except EngineError as error:
        say("error", type(error).__name__, str(error))
"""


class Child:
    """An engine in a process of its own, and what it says."""

    def __init__(self, model: Path, script: str, ranks: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"RANKS = {ranks}\n{HARNESS}{script}", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pids: list[int] = []
        self._timer = threading.Timer(TIMEOUT, self.process.kill)
        self._timer.start()

    def hear(self, word: str) -> list[Any]:
        """The next message that begins with ``word``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            if message[0] == "worker":
                self.pids.append(message[2])
            if message[0] == word:
                return message
        raise AssertionError(f"the engine ended (exit code {self.process.wait()}) before it said {word!r}")

    def tell(self) -> None:
        """Let it go on after ``listen()``."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)

    def end(self) -> int:
        """Its exit code; whatever it started must be gone too."""
        assert self.process.stdout is not None
        self.process.stdout.read()
        code = self.process.wait(TIMEOUT)
        self._timer.cancel()
        for pid in self.pids:
            wait_until_gone(pid)
        return code


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    model = make_model("llama-bias", tmp_path, num_key_value_heads=6)
    all_of_them: list[Child] = []

    def make(script: str, ranks: int = 2) -> Child:
        all_of_them.append(Child(model, script, ranks))
        return all_of_them[-1]

    yield make
    for each in all_of_them:
        each.process.kill()
        each.end()


def test_an_idle_worker_that_is_killed_is_noticed_and_fails_the_next_step(
    child: Callable[..., Child],
) -> None:
    engine = child(
        """
engine = load()
say("ready")
death.wait()
add(engine)
steps(engine)
engine.close()
""",
        ranks=3,
    )
    engine.hear("ready")
    os.kill(engine.pids[1], signal.SIGKILL)
    assert "rank 2 died (exit code -9)" in engine.hear("on_death")[2]
    assert engine.hear("error")[1] == "WorkerDied"
    assert engine.end() == 0


def test_a_worker_killed_in_a_step_fails_that_step(child: Callable[..., Child]) -> None:
    engine = child(
        """
engine = load()
collectives = 0
reduce = workers._Group.all_reduce
def all_reduce(self, x):
    global collectives
    collectives += 1
    if collectives == 33:
        say("computing")
        listen()  # the test kills a worker while this rank is in the middle of a pass
    return reduce(self, x)
workers._Group.all_reduce = all_reduce
add(engine)
steps(engine)
"""
    )
    engine.hear("computing")
    os.kill(engine.pids[0], signal.SIGKILL)
    engine.tell()
    kind, message = engine.hear("error")[1:]
    assert kind == "WorkerDied", message
    assert "exit code -9" in message
    assert engine.end() == 0


def test_a_worker_that_fails_in_a_step_says_why(child: Callable[..., Child]) -> None:
    engine = child(
        """
engine = load()
from blockyard.engine.step import StepInput
pack = StepInput.pack
StepInput.pack = lambda self: pack(self) + b"x"  # what a worker gets makes no sense
add(engine)
steps(engine)
"""
    )
    kind, message = engine.hear("error")[1:]
    assert (kind, message[:25]) == ("WorkerDied", "tensor-parallel rank 1 fa"), message
    assert engine.end() == 0


def test_a_worker_that_stops_answering_ends_the_engine(child: Callable[..., Child]) -> None:
    """Nobody died, so only the collective's own bound can tell."""
    engine = child(
        """
import datetime
from torch.distributed import distributed_c10d
engine = load()
distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2))
os.kill(engine.runner._workers[0].process.pid, signal.SIGSTOP)
add(engine)
try:
    steps(engine)
except RuntimeError as error:
    say("error", "RuntimeError", str(error))
"""
    )
    assert engine.hear("error")
    assert engine.end() == 0


@pytest.mark.parametrize("when", ["idle", "computing"])
def test_workers_go_with_a_killed_engine(child: Callable[..., Child], when: str) -> None:
    engine = child(
        f"""
engine = load()
if {when == "computing"}:
    add(engine, max_tokens=500)
    engine.step()
    say("ready")
    while True:
        if not engine.has_work:
            add(engine, max_tokens=500)
        engine.step()
say("ready")
threading.Event().wait()
"""
    )
    engine.hear("ready")
    engine.process.kill()
    assert engine.end() == -9
    assert len(engine.pids) == 1


@pytest.mark.parametrize("when", ["starting", "loading", "rehearsing"])
def test_a_worker_that_dies_while_it_loads_is_an_error(child: Callable[..., Child], when: str) -> None:
    at = {"starting": "Model", "loading": "Leader.meet", "rehearsing": "Runner._rehearse"}[when]
    engine = child(
        f"""
from blockyard.engine import runner
owner, name = {{
    "Model": (runner, "Model"),
    "Leader.meet": (workers.Leader, "meet"),
    "Runner._rehearse": (runner.Runner, "_rehearse"),
}}[{at!r}]
original = getattr(owner, name)
def killing(*args, **kwargs):
    say("now")
    listen()
    return original(*args, **kwargs)
setattr(owner, name, killing)
try:
    load()
except EngineError as error:
    say("error", type(error).__name__, str(error))
"""
    )
    engine.hear("now")
    os.kill(engine.pids[0], signal.SIGKILL)
    engine.tell()
    assert engine.hear("error")[1] == "WorkerDied"
    assert engine.end() == 0


def test_a_worker_that_cannot_load_gives_its_reason(child: Callable[..., Child]) -> None:
    """Rank 0 is content with what it loaded and waits for the others."""
    engine = child(
        """
import dataclasses
start_one = workers._start
def start(config, rank, *, cuda):
    if rank == 2:
        config = dataclasses.replace(config, model=config.model + "-that-is-not-there")
    return start_one(config, rank, cuda=cuda)
workers._start = start
try:
    load()
except EngineError as error:
    say("error", type(error).__name__, str(error))
""",
        ranks=3,
    )
    kind, message = engine.hear("error")[1:]
    assert kind == "ConfigError"
    assert "-that-is-not-there has no config.json" in message
    assert engine.end() == 0
