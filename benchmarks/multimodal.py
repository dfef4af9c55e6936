"""Rows of all modalities in one batch against two other ways; our encoders against transformers'.

`python -m benchmarks.multimodal`: a training step (forward and backward) on a batch that mixes
text, pictures, clips and both, beside the same rows grouped by what they contain, and beside a loop
over single rows; then the forward pass of both encoders beside transformers' at equal size. The
ways take turns, and each number is the median of its rounds.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS, LENGTH = 16, 96
SAMPLES = 25_600
"""Of a clip: 1.6 s."""
CROPS, CLIPS = 8, 4
"""Of one pass through an encoder."""


def main() -> None:
    """Measure, print and keep the ratios; above 1 is in our favour."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("docs/results/multimodal.json"))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    step = medians(steps(), rounds=options.rounds)
    record: dict[str, Any] = {
        "step_s": step,
        "mixed_vs_grouped": step["grouped"] / step["mixed"],
        "mixed_vs_rows": step["one by one"] / step["mixed"],
    }
    for name, ways in (("vision", towers()), ("speech", conformers())):
        found = medians(ways, rounds=options.rounds)
        record[name] = found | {"ratio": found["transformers"] / found["phikit"]}
    record |= {
        "rounds": options.rounds,
        "threads": options.threads,
        "torch": torch.__version__,
        "cpu": platform.processor(),
    }
    print(json.dumps(record, indent=1))
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def medians(ways: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Seconds of each way; the first round is warm-up and not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def markdown(record: Mapping[str, Any]) -> str:
    """The ratios as a table."""
    rows = (
        (
            "a training step on a mixed batch, over the same rows grouped",
            record["mixed_vs_grouped"],
        ),
        ("the same over a loop of single rows", record["mixed_vs_rows"]),
        ("vision tower, over transformers", record["vision"]["ratio"]),
        ("speech encoder, over transformers", record["speech"]["ratio"]),
    )
    lines = [f"| {name} | {ratio:.2f} |" for name, ratio in rows]
    about = (
        f"Medians of {record['rounds']} rounds in turn, {record['threads']} threads; steps in "
        "bfloat16, as the recipes train, encoders in float32."
    )
    return "\n".join(["| | times as fast |", "|:--|--:|", *lines, "", about, ""])


def steps() -> dict[str, Callable[[], object]]:
    """A training step of both adapters, encoders and projectors in three ways, on the text model of
    `see_and_hear`, in bfloat16."""
    import torch

    from phikit.base.types import Batch, Example
    from phikit.data.pack import batch_rows
    from phikit.models.catalogue import SMOLLM2_135M
    from phikit.models.dense import DenseModel
    from phikit.recipes.see_and_hear import speech, vision
    from phikit.train.media import MediaSFTConfig, MediaSFTObjective
    from phikit.weights.surgery import attach, train_only

    model = DenseModel(SMOLLM2_135M).initialise(torch.Generator().manual_seed(0))
    for seed, modality in enumerate((vision(), speech())):
        attach(model, modality, seed=seed)
    every = ("projector", "encoder", "adapter")
    train_only(model.to(torch.bfloat16), {"vision": every, "speech": every})
    rows = [_example(model, k) for k in range(ROWS)]
    kinds = sorted(range(ROWS), key=lambda k: k % 4)
    quarter = ROWS // 4
    groups = [[rows[k] for k in kinds[i : i + quarter]] for i in range(0, ROWS, quarter)]

    config = MediaSFTConfig(examples_per_step=ROWS, micro_examples=ROWS)
    objective = MediaSFTObjective(rows, config, seed=0)

    def step(batches: Sequence[Batch]) -> None:
        for batch in batches:
            total, _ = objective.loss(model, batch)
            if total.requires_grad:
                total.backward()
        model.zero_grad()

    def apart(parts: Sequence[Sequence[Example]]) -> list[Batch]:
        return [batch_rows([[row] for row in part]) for part in parts]

    return {
        "mixed": lambda: step(objective.step_data(0).batches),
        "grouped": lambda: step(apart(groups)),
        "one by one": lambda: step(apart([[row] for row in rows])),
    }


def _example(model: Any, number: int) -> Any:
    """A row of text, a picture, a clip or both, by its number."""
    import numpy as np

    from phikit.base.media import Media
    from phikit.base.types import Example

    random = np.random.default_rng(number)
    see, hear = (model.senses[name].config for name in ("vision", "speech"))
    side = see.encoder.crop_size
    image = see.prepare(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
    clip = hear.prepare(random.uniform(-0.1, 0.1, SAMPLES).astype(np.float32))
    media = (None, Media((image,)), Media((), (clip,)), Media((image,), (clip,)))[number % 4]
    tokens, start = random.integers(10, 4000, LENGTH), 2
    for name, items in (media.items if media else {}).items():
        for item in items:
            tokens[start : start + item.num_tokens] = model.senses[name].token
            start += item.num_tokens
    return Example(tokens.astype(np.int32), np.arange(LENGTH) >= LENGTH - 8, media)


def towers() -> dict[str, Callable[[], object]]:
    """The vision tower on crops of full size, a quarter of its layers."""
    import torch
    from transformers import Phi4MultimodalVisionConfig
    from transformers.models.phi4_multimodal import modeling_phi4_multimodal as reference

    from phikit.nn.vision import VisionConfig, VisionTower

    config = VisionConfig(num_layers=7, feature_layer=7)
    ours = VisionTower(config).eval()
    theirs_config = Phi4MultimodalVisionConfig(
        hidden_size=config.d_model,
        intermediate_size=config.d_mlp,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        image_size=config.crop_size,
        crop_size=config.crop_size,
        patch_size=config.patch_size,
    )
    theirs_config._attn_implementation = "sdpa"
    theirs = reference.Phi4MultimodalVisionModel(theirs_config).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    size, side = config.crop_size, config.patches_per_side
    pixels = torch.randn(CROPS // 4, 3, size, size)
    mask = torch.ones(len(pixels), side, side, dtype=torch.bool)
    return {
        "phikit": torch.no_grad()(lambda: ours(pixels, mask)),
        "transformers": torch.no_grad()(
            lambda: theirs(pixels, patch_attention_mask=mask, output_hidden_states=True)
        ),
    }


def conformers() -> dict[str, Callable[[], object]]:
    """The speech encoder at full width, a quarter of its blocks, on clips of ten seconds."""
    import torch
    from transformers import Phi4MultimodalAudioConfig
    from transformers.models.phi4_multimodal import modeling_phi4_multimodal as reference

    from phikit.nn.speech import SpeechConfig, SpeechEncoder

    ours = SpeechEncoder(SpeechConfig(num_layers=6)).eval()
    theirs_config = Phi4MultimodalAudioConfig(num_blocks=6)
    theirs_config._attn_implementation = "sdpa"
    theirs = reference.Phi4MultimodalAudioModel(theirs_config).eval()
    features, lengths = torch.randn(CLIPS, 1000, 80), torch.full((CLIPS,), 1000)
    return {
        "phikit": torch.no_grad()(lambda: ours(features, lengths)),
        "transformers": torch.no_grad()(lambda: theirs(features, None)),
    }


if __name__ == "__main__":
    main()
