"""`phikit run see_and_hear`, shrunk to seconds: its stages, its page, a talk with the result."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from phikit.nn.whisper import WhisperConfig, WhisperEncoder

pytest.importorskip("espeakng_loader", reason="pip install phikit[synth]")

Run = Callable[..., subprocess.CompletedProcess[str]]
EASY = (
    '{"kind": "procedural", "count": %d, "families": ["arithmetic"], "steps": {"1": 1.0}, '
    '"level": {"max_result": 60, "max_factor": 4, "max_addend": 20}}'
)
SHAPE = (
    '{"vocab_size": 400, "d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, '
    '"head_dim": 16, "max_context": 320, "d_mlp": 32}'
)
SETTINGS = {
    "backbone": "nano",
    "dtype": "float32",
    "threads": 1,
    "base.tokenizer_documents": 200,
    "base.tokenizer_traces": EASY % 30,
    "base.model": SHAPE,
    "modalities.vision.encoder.d_model": 16,
    "modalities.vision.encoder.stem": "[4, 4, 4]",
    "modalities.vision.encoder.d_mlp": 16,
    "modalities.vision.encoder.num_layers": 1,
    "modalities.vision.encoder.feature_layer": 1,
    "modalities.vision.encoder.num_heads": 2,
    "modalities.vision.adapter.rank": 2,
    "modalities.speech.encoder.d_model": 16,
    "modalities.speech.encoder.d_mlp": 16,
    "modalities.speech.encoder.num_layers": 1,
    "modalities.speech.encoder.num_heads": 2,
    "modalities.speech.encoder.subsampling_channels": 4,
    "modalities.speech.adapter.rank": 2,
    "stages.pretrain.documents": 200,
    "stages.pretrain.lm": '{"row_tokens": 64, "rows_per_step": 8, "micro_rows": 4}',
    "stages.pretrain.loop.steps": 4,
    "evaluation.source.families": '{"digit": 2, "text": 2, "spoken_digits": 2, "spoken_scene": 2}',
    "evaluation.max_new_tokens": 4,
}
FAMILIES = {
    "see": {"digit": 4, "text": 4},
    "hear": {"spoken_digits": 4},
    "name": {"digit": 4},
    "vision1": {"digit": 8},
    "vision2": {"text": 4},
    "vision3": {"digit": 4, "chart": 2},
    "vision4": {"pages": 4},
    "speech1": {"spoken_digits": 4},
    "speech2": {"spoken_sum": 4},
    "joint": {"spoken_scene": 4, "digit": 2},
}
for stage, families in FAMILIES.items():
    SETTINGS[f"stages.{stage}.source.families"] = json.dumps(families)
    SETTINGS[f"stages.{stage}.sft.examples_per_step"] = 4
    SETTINGS[f"stages.{stage}.sft.micro_examples"] = 4
    if stage in ("see", "hear", "name"):
        SETTINGS[f"stages.{stage}.loop.epochs"] = 1
TINY = tuple(part for path, value in SETTINGS.items() for part in ("--set", f"{path}={value}"))


def test_it_learns_beside_its_text(phikit: Run, tmp_path: Path):
    out = tmp_path / "run"
    done = phikit("run", "see_and_hear", "--out", out, *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    names = [stage["name"] for stage in results["stages"]]
    assert names == ["pretrain", *FAMILIES]
    assert all(stage["is_text_same"] for stage in results["stages"])
    assert len({stage["text"]["loss"] for stage in results["stages"]}) == 1
    held_out = {"digit", "text", "spoken_digits", "spoken_scene"}
    assert {*results["stages"][0]["senses"]} == {*results["stages"][-1]["senses"]} == held_out
    assert {*results["chance"]} == held_out
    assert results["stages"][4]["senses"]["digit"]["measure"] == "exact match"
    assert results["stages"][-1]["items"] == {"read": 6, "faults": []}
    assert "spoken_scene" in done.stdout and "Chance" in done.stdout
    page = (out / "report.html").read_text()
    for words in ("text model unchanged", "data:image/png;base64", "spoken_scene", "CER"):
        assert words in page, words

    again = phikit("run", "see_and_hear", "--out", out, *TINY)
    assert again.returncode == 0 and "done before" in again.stdout
    assert json.loads((out / "results.json").read_text()) == results

    shorter = [part for pair in zip(TINY[::2], TINY[1::2], strict=True) if "joint" not in pair[1]
               for part in pair]  # fmt: skip
    left_out = phikit("run", "see_and_hear", "--out", out, *shorter, "--set", "without=joint")
    assert left_out.returncode == 0, left_out.stderr
    last = json.loads((out / "results.json").read_text())["stages"][-1]
    assert last["name"] == "speech2" and {*last["senses"]} == held_out
    assert phikit("run", "see_and_hear", "--out", out, *TINY).returncode == 0

    compared = phikit("diff", out, out)
    assert compared.returncode == 0 and "joint" in compared.stdout, compared.stderr

    image, clip = _files(tmp_path)
    for shown in (("--image", image), ("--audio", clip), ("--image", image, "--audio", clip), ()):
        said = phikit(
            "chat", out, *shown, "--max-new-tokens", 3, "--no-history", given="What is this?\n"
        )
        assert said.returncode == 0, (shown, said.stderr)

    asked = phikit("eval", out, "--json")
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["senses"] == results["stages"][-1]["senses"]
    described = phikit("show", out)
    assert "perceives" in described.stdout and "speech (" in described.stdout, described.stderr


def test_it_hears_people(phikit: Run, tmp_path: Path):
    """With ears from a checkpoint, which the run needs at its beginning alone."""
    start, recordings, out = tmp_path / "whisper", tmp_path / "recordings", tmp_path / "run"
    ears = WhisperConfig(d_model=16, num_layers=1, num_heads=2, d_mlp=16)
    state = WhisperEncoder(ears).state_dict()
    start.mkdir()
    save_file({f"model.encoder.{k}": v for k, v in state.items()}, start / "model.safetensors")
    recordings.mkdir()
    for number, speaker in enumerate(("anna", "bert", "cleo")):
        for digit in range(10):
            _sound(recordings / f"{digit}_{speaker}_0.wav", seed=10 * number + digit)
    base = ("backbone", "dtype", "threads", "base.", "stages.pretrain.", "evaluation.max_new")
    settings = {k: v for k, v in SETTINGS.items() if k.startswith(base)} | {
        "recordings": recordings,
        "held_out": "cleo",
        "modalities.speech.encoder": ears.model_dump_json(),
        "modalities.speech.start": start,
        "modalities.speech.adapter.rank": 2,
        "stages.align.source.families": '{"spoken_digits": 4}',
        "stages.align.sft.examples_per_step": 4,
        "stages.align.sft.micro_examples": 4,
    }
    options = [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]
    plan = phikit("run", "hear_recordings", *options, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    done = phikit("run", "hear_recordings", "--out", out, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads((out / "results.json").read_text())["stages"][-1]
    assert last["is_text_same"] and last["senses"]["recorded_digits"]["n"] == 10
    assert last["items"] == {"read": 20, "faults": []}
    (start / "model.safetensors").unlink()
    clip = recordings / "3_cleo_0.wav"
    said = phikit("chat", out, "--audio", clip, "--max-new-tokens", 3, given="What is this?\n")
    assert said.returncode == 0, said.stderr
    gone = phikit("run", "hear_recordings", "--out", tmp_path / "other", *options)
    assert gone.returncode != 0 and "whisper" in gone.stderr, gone.stderr


def _sound(path: Path, *, seed: int) -> None:
    import soundfile

    noise = np.random.default_rng(seed).standard_normal(8000).astype(np.float32)
    soundfile.write(path, noise / 10, 8000)


def _files(folder: Path) -> tuple[Path, Path]:
    """A picture and a sound."""
    from PIL import Image

    image, clip = folder / "x.png", folder / "y.wav"
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (40, 60, 3), np.uint8)).save(image)
    _sound(clip, seed=0)
    return image, clip


def test_its_plan_and_its_faults(phikit: Run, tmp_path: Path):
    plan = phikit("run", "see_and_hear", "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "vision" in plan.stdout and "speech" in plan.stdout
    wrong = phikit("run", "see_and_hear", "--dry-run", "--set", "backbone=giant")
    assert wrong.returncode != 0 and "choose smollm2 or nano" in wrong.stderr
