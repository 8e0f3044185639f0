"""GuideLLM's synthetic mode measures the server, and every request it sends is answered."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

pytestmark = pytest.mark.slow


def test_a_synthetic_run_has_no_errors(server, stories_1m, judge_program, tmp_path):
    program = judge_program("guidellm", "guidellm")
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            *(program, "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={server},model=stories,request_format=/v1/completions"),
            *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"),
            *("--tokenizer", f"kind=hf_auto,model={stories_1m}"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
            *("--output", f"kind=json,path={report}"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (6, 0), totals
