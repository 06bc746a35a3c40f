"""Stock SGLang in CPU mode, as an engine in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sgl_lmcache.cpu.model import TINY, make_model

PROGRAM = """
import json, sys
from sgl_lmcache import cpu

cpu.enable()

import sglang

def main():
    engine = sglang.Engine(
        model_path=sys.argv[1], max_total_tokens=4096, page_size=16, log_level="info", **cpu.ENGINE_ARGUMENTS
    )
    greedy = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    first, second = list(range(100, 700)), list(range(101, 701))
    answers = [
        engine.generate(input_ids=prompt, sampling_params=greedy, return_logprob=True)
        for prompt in (first, first, second)
    ]
    engine.shutdown()
    print(json.dumps(answers))

if __name__ == "__main__":
    main()
"""


@pytest.mark.server
def test_a_hit_repeats_the_cold_answer_and_the_prompt_matters(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    command = [sys.executable, str(program), str(make_model(TINY))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "CPU mode: attention computes new rows only" in result.stderr
    cold, hit, other = json.loads(result.stdout.strip().splitlines()[-1])
    assert [answer["meta_info"]["cached_tokens"] for answer in (cold, hit, other)] == [0, 592, 0]
    assert hit["output_ids"] == cold["output_ids"] != other["output_ids"]
    assert len(set(cold["output_ids"])) > 6
    logprobs = [[value for value, *_ in answer["meta_info"]["output_token_logprobs"]] for answer in (cold, hit)]
    assert logprobs[1] == pytest.approx(logprobs[0], abs=0.05)
