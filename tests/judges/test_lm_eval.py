"""lm-evaluation-harness scores texts through /v1/completions as `llmc eval` scores them itself."""

from __future__ import annotations

import json
import math
import os
import subprocess

import pytest
from click.testing import CliRunner

from llmc.cli.main import main

pytestmark = pytest.mark.slow

TASK = """
task: stories
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
"""


@pytest.mark.timeout(900)
def test_perplexity_is_that_of_llmc_eval(server, judged, stories, stories_1m, judge_program, tmp_path):
    program = judge_program("lm_eval", "lm-eval[api]")
    data = tmp_path / "stories.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories))
    (tmp_path / "stories.yaml").write_text(TASK.format(data=data))
    arguments = (
        f"base_url={server}/v1/completions,model=stories,tokenizer={stories_1m},max_length=500,"
        "num_concurrent=4,tokenizer_backend=huggingface,tokenized_requests=True"
    )
    done = subprocess.run(
        [
            *(program, "run", "--model", "local-completions", "--model_args", arguments),
            *("--tasks", "stories", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "hf"),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = (tmp_path / "out").rglob("results*.json")
    byte_perplexity = json.loads(report.read_text())["results"]["stories"]["byte_perplexity,none"]

    own = CliRunner().invoke(main, ["eval", str(judged), "--data", str(data), "--json"])
    assert own.exit_code == 0, own.stderr
    found = json.loads(own.stdout)
    num_bytes = sum(len(text.encode()) for text in stories)
    num_predicted = found["tokens"] - found["windows"]  # nothing predicts the first token of a window
    theirs = math.exp(math.log(byte_perplexity) * num_bytes / num_predicted)
    assert theirs == pytest.approx(found["perplexity"], rel=1e-3)
