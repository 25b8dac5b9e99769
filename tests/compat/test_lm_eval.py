"""lm-eval's local-completions, tokenising through the server: its numbers against log-probs computed here."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from compat import KEY, PYTHON, Served, need_python

from gptoss_compile.config import Bucket

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def log_probability(served: Served, context: str, continuation: str) -> float:
    """Σ log p(token | what is before it) over the continuation's tokens, from the executor's logits alone."""
    ids = served.tokenizer.encode(context + continuation)
    start = len(served.tokenizer.encode(context))
    total = 0.0
    for position in range(start, len(ids)):
        inputs = {"tokens": np.array([ids[position - 1]]), "positions": np.array([position - 1]), "rows": np.array([0])}
        logits = served.engine.executor.run(Bucket.decode(1), inputs)[0].astype(np.float64)
        total += logits[ids[position]] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    return total


@need_python("lm_eval")
@pytest.mark.slow
def test_lm_eval(served: Served, tmp_path: Path, seed: int) -> None:
    words = ["tree", "river", "👍🏽", "naïve", "stone", "7,412", "of", "the"]
    chooser = random.Random(seed)

    def text() -> str:
        return " ".join(chooser.choices(words, k=chooser.randint(1, 9)))

    rows = [{"question": f"Q: {text()}?\nA:", "choices": [text() for _ in range(3)], "label": 0} for _ in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    model = f"model=gpt-oss,base_url={served.base}/completions,num_concurrent=2,tokenizer_backend=remote,auth_token={KEY}"
    command = [str(Path(PYTHON).parent / "lm_eval"), "--model", "local-completions", "--model_args", model]
    folders = ["--include_path", str(tmp_path), "--output_path", str(tmp_path)]
    served.run(
        [*command, "--tasks", "local_choice", *folders, "--log_samples"],
        env={"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )
    [found] = tmp_path.rglob("samples_*.jsonl")
    samples = sorted(map(json.loads, found.read_text().splitlines()), key=lambda each: each["doc_id"])
    best = []
    for row, sample in zip(rows, samples, strict=True):
        expected = [log_probability(served, row["question"], f" {choice}") for choice in row["choices"]]
        np.testing.assert_allclose([float(value[0][0]) for value in sample["resps"]], expected, rtol=1e-5, atol=1e-4)
        best.append(int(np.argmax(expected)) == row["label"])
    [results] = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["local_choice"]["acc,none"] == pytest.approx(np.mean(best))
