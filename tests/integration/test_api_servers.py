# SPDX-License-Identifier: Apache-2.0
"""Several API server processes in front of one engine: each shows the same metrics."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from knapspec_vllm.bench.servers import Server, running
from knapspec_vllm.commands.server_metrics import read

pytestmark = pytest.mark.slow

NAME = "tested"
_TAKEN = re.compile(r"ApiServer_(\d) pid=\d+\).*Received request")


@pytest.fixture(scope="module")
def server(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("api-servers")
    settings = {"always_draft": True, "calibration_seconds": 3.0, "store_dir": str(folder)}
    made = Server(
        "knapspec",
        str(smollm2_path),
        [
            "--dtype=float32",
            "--enforce-eager",
            "--max-model-len=512",
            "--max-num-seqs=4",
            "--api-server-count=2",
            "--enable-log-requests",  # tells which of them took a request
            f"--served-model-name={NAME}",
            '--speculative-config={"method": "knapspec", "num_speculative_tokens": 4}',
            f"--additional-config={json.dumps({'knapspec': settings})}",
        ],
        folder / "server.log",
        {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    with running([made], timeout_seconds=400):
        yield made


def ask(server: Server, **extra: object) -> int:
    # A client of its own: another connection, which the kernel may give to the other process.
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "What is a prime number?"}],
            temperature=0,
            max_tokens=24,
            extra_body={"ignore_eos": True, **extra},
        )
    assert answer.usage is not None
    return answer.usage.completion_tokens


def test_every_api_server_shows_all_of_it(server: Server) -> None:
    tokens = 0
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):  # whichever is free accepts a connection
            tokens += sum(pool.map(lambda _: ask(server), range(8)))
            if (taken := set(_TAKEN.findall(server.log_text()))) == {"0", "1"}:
                break
    assert taken == {"0", "1"}
    time.sleep(2.5)  # the worker publishes once a second
    pages = [read(server.url) for _ in range(12)]
    for name in ("vllm:generation_tokens_total", "knapspec:draft_tokens_total"):
        assert len({page.total(name) for page in pages}) == 1, name
    page = pages[0]
    assert page.total("vllm:generation_tokens_total") == tokens
    drafted = page.total("knapspec:draft_tokens_total")
    placeholders = page.total("knapspec:placeholder_tokens_total")
    assert drafted > 0
    assert page.total("vllm:spec_decode_num_draft_tokens_total") == drafted + placeholders
    # Not once per process.
    assert page.value("knapspec:plan_layers") == 30
    assert page.total("knapspec:plan_layers") == 30


def test_each_refuses_a_bad_option(server: Server) -> None:
    for _ in range(6):
        with pytest.raises(openai.BadRequestError, match="write a whole number"):
            ask(server, vllm_xargs={"knapspec_draft_length": -1})
    assert ask(server, vllm_xargs={"knapspec_draft_length": 0}) == 24
