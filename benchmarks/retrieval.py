"""Pictures and texts found by each other: a tower pair trained by SigLIP's loss, from nothing.

    python -m benchmarks.retrieval --seeds 0 1 2

Pictures are scenes of shapes and rendered words, texts what they show ("red circle, blue square").
Recall at k is the share of held-out pictures whose text is among the k nearest of all held-out
texts, and the reverse; fonts and contents of these pairs occur in no training. Writes
`docs/results/retrieval.json`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarks.seeds import machine, spread

from phikit.base.progress import Progress
from phikit.base.run import Run
from phikit.chat.render import NANO_SPECIALS, renderer_for
from phikit.chat.tokenizer import train_tokenizer
from phikit.data.media.generate import generate
from phikit.data.media.problem import MediaProblem, prepare
from phikit.data.problem import assert_disjoint
from phikit.data.split import Split
from phikit.models.decoder import Decoder
from phikit.models.dense import DenseConfig
from phikit.models.registry import build
from phikit.recipes.see_and_hear import vision
from phikit.train.contrastive import (
    ContrastiveConfig,
    ContrastiveObjective,
    Pair,
    embed,
    pair_batch,
    pair_of,
    recall_at,
)
from phikit.train.loop import LoopConfig, train
from phikit.train.optim import OptimConfig
from phikit.weights.surgery import attach

FAMILIES = ("shapes", "text")
ROOT = Path(__file__).resolve().parent.parent
PAIRS_PER_STEP, STEPS = 64, 300
OPTIM = OptimConfig(adam_lr=3e-3, muon_lr=0.02, warmup=0.05, decay=0.5, final=0.05)


def main() -> None:
    """Train every seed's pair, and keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=4_000, help="pairs of each family")
    parser.add_argument("--test", type=int, default=200, help="pairs of each family")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    runs = [run(seed, options.train, options.test, options.steps) for seed in options.seeds]
    target = ROOT / "docs" / "results" / "retrieval.json"
    target.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
    print(f"wrote {target}")


def run(seed: int, taught_pairs: int, asked_pairs: int, steps: int) -> dict[str, Any]:
    """One pair of towers: its recall among the held-out pairs of each family."""
    torch.manual_seed(seed)
    taught = [captioned(p) for p in problems(seed, taught_pairs, "train")]
    asked = {f: [captioned(p) for p in problems(0, asked_pairs, "test", (f,))] for f in FAMILIES}
    assert_disjoint(train=taught, **asked)
    tokenizer = train_tokenizer([p.answer for p in taught], size=400, specials=NANO_SPECIALS)
    shape = DenseConfig(
        vocab_size=tokenizer.size,
        d_model=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        d_mlp=256,
        max_context=256,
    )
    model = build(shape).initialise(torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    sense = vision().without_adapter()
    attach(model, sense, seed=seed)
    renderer, placeholders = renderer_for(tokenizer, "phi4-mini"), [model.senses["vision"].token]

    def pairs(of: list[MediaProblem]) -> list[Pair]:
        made = prepare(of, renderer, modalities={"vision": sense.prepare}, ids=model.media_ids)
        return [pair_of(example, placeholders=placeholders) for example in made.examples]

    config = ContrastiveConfig(pairs_per_step=PAIRS_PER_STEP)
    objective = ContrastiveObjective(model, pairs(taught), config, seed=seed)
    loop = LoopConfig(steps=steps, optim=OPTIM, checkpoint_every=steps)
    with TemporaryDirectory() as folder, Progress() as progress:
        out = Run.create(Path(folder), config, kind="retrieval")
        totals = train(
            model, objective, loop, steps=steps, run=out, progress=progress, name=f"seed {seed}"
        )
    model.eval().float()
    figures = {family: recalls(model, pairs(of)) for family, of in asked.items()}
    print(json.dumps(figures, indent=1))
    return {"seed": seed, "steps": steps, "seconds": totals.seconds, "recall": figures}


def markdown(record: dict[str, Any]) -> str:
    """Recall of each family both ways."""
    runs = record["runs"]
    asked = [key for key in runs[0]["recall"][FAMILIES[0]] if " at " in key and "chance" not in key]
    lines = [
        "| Family | Chance at 1 | " + " | ".join(asked) + " |",
        "|:--|" + "--:|" * (1 + len(asked)),
    ]
    for family in FAMILIES:
        cells = [
            spread([run["recall"][family][key] for run in runs]) for key in ("chance at 1", *asked)
        ]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    pairs, steps = runs[0]["recall"][FAMILIES[0]]["pairs"], runs[0]["steps"]
    told = f"{pairs} held-out pairs a family, {steps} steps of {PAIRS_PER_STEP} pairs"
    return "\n".join([*lines, "", f"{told}; mean ± standard deviation of {len(runs)} seeds.", ""])


@torch.no_grad()
def recalls(model: Decoder, pairs: list[Pair]) -> dict[str, float]:
    """Recall at 1 and 5 both ways, and what guessing would give."""
    batch = pair_batch(pairs)
    items_PD, texts_PD = embed(model, batch).chunk(2)
    labels_P = batch.extras["labels"]
    equal = float((labels_P[:, None] == labels_P).float().mean())
    found = {"pairs": len(pairs), "chance at 1": equal}
    for k in (1, 5):
        found[f"text of picture at {k}"] = recall_at(items_PD, texts_PD, labels_P, k=k)
        found[f"picture of text at {k}"] = recall_at(texts_PD, items_PD, labels_P, k=k)
    return found


def problems(
    seed: int, count: int, split: Split, families: Sequence[str] = FAMILIES
) -> list[MediaProblem]:
    """Those of every family."""
    return [
        problem
        for family in families
        for problem in generate(family=family, seed=seed, count=count, split=split)
    ]


def captioned(problem: MediaProblem) -> MediaProblem:
    """The picture, and in place of question and answer what it shows."""
    [marks] = problem.marks
    names = [mark.name.strip() for mark in marks]
    things = [" ".join(names[i : i + 2]) for i in range(0, len(names), 2)]
    shows = ", ".join(things) if problem.provenance.family == "shapes" else problem.answer
    return replace(problem, question="<|image_1|>", answer=shows, solution=shows)


if __name__ == "__main__":
    main()
