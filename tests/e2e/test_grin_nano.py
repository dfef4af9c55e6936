"""`phikit run grin_nano`, shrunk to seconds: two models, one page."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]
EASY = (
    '{"kind": "procedural", "count": %d, "families": ["arithmetic"], "steps": {"1": 1.0}, '
    '"level": {"max_result": 60, "max_factor": 4, "max_addend": 20}}'
)
SHARED = (
    '"vocab_size": 400, "d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, '
    '"head_dim": 16, "max_context": 160, "d_mlp": %d'
)
EXPERTS = (
    ', "num_experts": 4, "router": {"kind": "sparsemixer", "jitter_eps": 0.1}, "norm": "rms", '
    '"attention_bias": false, "head_bias": false'
)
SETTINGS = {
    "dtype": "float32",
    "threads": 1,
    "base.tokenizer_documents": 200,
    "base.tokenizer_traces": EASY % 30,
    "base.model": "{" + SHARED % 32 + EXPERTS + "}",
    "beside": "{" + SHARED % 64 + "}",
    "stages.pretrain.documents": 200,
    "stages.pretrain.lm": '{"row_tokens": 64, "rows_per_step": 8, "micro_rows": 4}',
    "stages.pretrain.loop.steps": 6,
    "stages.mid.source": EASY % 100,
    "stages.mid.lm": '{"row_tokens": 64, "rows_per_step": 8, "micro_rows": 8}',
    "stages.mid.loop.epochs": "null",
    "stages.mid.loop.steps": 6,
    "evaluation.source": EASY % 10,
    "evaluation.max_new_tokens": 16,
    "evaluation.samples": 2,
}
TINY = tuple(part for path, value in SETTINGS.items() for part in ("--set", f"{path}={value}"))


def test_two_models_one_page(phikit: Run, tmp_path: Path):
    done = phikit("run", "grin_nano", "--out", tmp_path, *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "beside: mid" in done.stdout  # in the table
    results = json.loads((tmp_path / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == ["pretrain", "mid"]
    assert [stage["name"] for stage in results["beside"]] == ["beside: pretrain", "beside: mid"]
    for ours, theirs in zip(results["stages"], results["beside"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert len(ours["experts"]["load"]) == 2 and theirs["experts"]["load"] == []
        assert ours["experts"]["kinds"] == theirs["experts"]["kinds"]
        assert ours["versus"]["n"] == 10
        assert "router.single" in ours["metrics"][0]
        assert not any(key.startswith("router.") for key in theirs["metrics"][0])
    page = (tmp_path / "report.html").read_text()
    for words in ("Expert load by kind of token: mid", "layer 1", "Held-out loss by kind of token"):
        assert words in page

    again = phikit("run", "grin_nano", "--out", tmp_path, *TINY)
    assert again.returncode == 0 and "done before" in again.stdout
    assert json.loads((tmp_path / "results.json").read_text()) == results

    for model in (tmp_path, tmp_path / "beside"):
        said = phikit("generate", model, "1 + 1 = ", "--max-new-tokens", 2)
        assert said.returncode == 0, said.stderr


def test_its_plan_and_its_faults(phikit: Run, tmp_path: Path):
    plan = phikit("run", "grin_nano", "--dry-run")
    assert plan.returncode == 0 and "5,316,288 parameters" in plan.stdout
    wrong = phikit("run", "grin_nano", "--dry-run", "--set", "base.model.num_expert=4")
    assert wrong.returncode != 0
    assert "base.model.num_expert: unknown setting; did you mean num_experts?" in wrong.stderr
