"""Resident memory of an engine: its weights, its pool, and little more, even for a moment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from blockyard.engine.model.files import prepare

MIB = 1 << 20
LIMIT = 1.2 * 1024 * MIB  # beyond weights and pool, for the whole process
MARGIN = 350 * MIB  # beyond weights and pool, after the libraries; a second copy of the weights takes 513

CHILD = """
import json, sys
from pathlib import Path
from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine
from blockyard.engine.sampling_params import SamplingParams
from blockyard.engine import workers

def resident(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

libraries = resident("VmRSS")
engine = Engine(EngineConfig(model=sys.argv[1], dtype="float32", device="cpu", threads=1, kv_blocks=512))
pool = engine.info.kv_blocks * engine.info.block_bytes
loaded = resident("VmHWM")
for i in range(16):
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=4)
    engine.add_request(str(i), list(range(5 + i, 105 + i)), params)
while engine.has_work:
    engine.step()
print(json.dumps([libraries, pool, loaded, resident("VmHWM")]))
"""


def test_an_engine_takes_its_weights_its_pool_and_little_more() -> None:
    model = prepare("SmolLM2-135M-Instruct")
    weights = (Path(model) / "model.safetensors").stat().st_size
    done = subprocess.run([sys.executable, "-c", CHILD, str(model)], stdout=subprocess.PIPE, check=True)
    libraries, pool, loaded, served = json.loads(done.stdout)
    assert loaded <= libraries + weights + pool + MARGIN
    assert served <= weights + pool + LIMIT
