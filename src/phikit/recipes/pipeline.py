"""Running a pipeline: stage after stage, each kept under its fingerprint, each scored the same way.

A stage's fingerprint covers its own config, the seed, the base, and the stage before it. A folder
`stages/<number>-<name>-<fingerprint>` that is finished is used again; one that is not goes on from
its last checkpoint; a changed config starts a new folder and leaves the old one alone.
"""

import itertools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import phikit
from phikit.base.config import fingerprint
from phikit.base.device import parse_dtype, set_threads
from phikit.base.errors import RunError
from phikit.base.files import storage_errors, write_atomic
from phikit.base.in_use import in_use
from phikit.base.metrics import open_trackers
from phikit.base.progress import Progress
from phikit.base.run import Run
from phikit.chat.render import NANO_SPECIALS, renderer_for
from phikit.chat.tokenizer import train_tokenizer
from phikit.data.problem import Problem, assert_disjoint
from phikit.data.source import load_problems
from phikit.evals.experts import expert_map
from phikit.evals.report import write_report
from phikit.evals.scorer import math_scorer
from phikit.evals.stats import paired_difference
from phikit.evals.task import EvalResult, Task, evaluate
from phikit.evals.transcripts import render_transcript, transcripts, write_transcripts
from phikit.generate.engine import Engine
from phikit.models.moe import MoEConfig
from phikit.models.registry import build
from phikit.nn.lora import attach_lora, merge_lora
from phikit.nn.moe.session import RoutingConfig
from phikit.recipes.config import (
    DPOStage,
    HubBase,
    MediaStage,
    NewBase,
    PipelineConfig,
    PretrainStage,
    RLStage,
    Stage,
)
from phikit.recipes.context import StageContext, stage_seed
from phikit.recipes.stages import corpus, prepare
from phikit.solve.plain import SamplingConfig, plain
from phikit.train.loop import train
from phikit.weights.hub import fetch
from phikit.weights.load import Loaded, load
from phikit.weights.quantised import refuse_quantised
from phikit.weights.save import save

ADAPTER = "stage"
HELD_OUT = "held out"
"""Key of the evaluation's problems beside those of the stages."""
MAPPED = 200
"""Held-out problems, with their traces, whose tokens are followed to the experts."""


@dataclass(frozen=True, slots=True)
class StageFolder:
    """A stage of a pipeline and where it lives."""

    stage: Stage
    path: Path
    fingerprint: str

    @property
    def model(self) -> Path:
        return self.path / "model"

    def result(self) -> dict[str, Any] | None:
        """What training cost, if the stage is finished."""
        path = self.path / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def stage_folders(config: PipelineConfig, out: Path) -> list[StageFolder]:
    """Where each stage of `config` lives under `out`."""
    folders = []
    upstream = fingerprint(
        {
            "phikit": phikit.__version__,
            "seed": config.seed,
            "dtype": config.dtype,
            "base": config.base.model_dump(mode="json"),
            "lora": config.lora.model_dump(mode="json") if config.lora else None,
        }
    )
    for number, stage in enumerate(config.stages):
        is_start = isinstance(stage, MediaStage) and stage.is_start
        senses = [m.without_adapter() if is_start else m for m in config.modalities]
        upstream = fingerprint(
            {
                "upstream": upstream,
                "stage": stage.model_dump(mode="json", exclude={"on_fault"}),  # no part of a result
                "modalities": [sense.model_dump(mode="json") for sense in senses],
            }
        )
        path = out / "stages" / f"{number}-{stage.name}-{upstream[:8]}"
        folders.append(StageFolder(stage, path, upstream))
    return folders


class Pipeline:
    """A pipeline in a folder; `run` does whatever of it is not done yet.

    A model beside it is a pipeline of its own in the folder `beside`, with the same seed, so both
    see the same text in the same order.
    """

    def __init__(self, config: PipelineConfig, out: Path, *, progress: Progress) -> None:
        self.config, self.out, self.progress = config, out, progress
        self.folders = stage_folders(config, out)
        self.scorer = math_scorer()
        self.beside: Pipeline | None = None
        self.is_mapped = isinstance(config.base.model, MoEConfig)
        """Whether tokens are followed to experts, and losses told by kind of token."""
        if config.beside is not None:
            self.beside = Pipeline(_of_other_model(config), out / "beside", progress=progress)
            self.is_mapped = self.beside.is_mapped = True

    def run(self, *, until: str | None = None) -> dict[str, Any]:
        """Run the stages up to `until` (by default all) and return the results.

        Raises RunError for an unknown stage or a folder that another process works in, and what
        the stages raise; finished work is kept.
        """
        names = [folder.stage.name for folder in self.folders]
        if until is not None and until not in names:
            raise RunError(
                f"{self.config.name} has no stage {until!r}", fix=f"choose from {', '.join(names)}"
            )
        with in_use(self.out):
            return self._run(names, until)

    def _run(self, names: list[str], until: str | None) -> dict[str, Any]:
        self._write_config()
        set_threads(self.config.threads)
        wanted = self.folders if until is None else self.folders[: names.index(until) + 1]
        for folder in filter(self._is_done, wanted):
            self.progress.print(f"{folder.stage.name}: done before, kept in {folder.path}")
        if not (self._has_base_result() and all(map(self._is_done, wanted))):
            self._work(wanted)
        if self.beside is not None:
            self.progress.print("beside: the same stages of the other model")
            self.beside._run(names, until)
        results = self._write_results()
        write_report(results, self.out / "report.html")
        return results

    def _work(self, wanted: Sequence[StageFolder]) -> None:
        """Train and score what is not done of these stages; results.json follows each of them."""
        problems = self._problems()
        loaded = None
        if not self._has_base_result():
            loaded = self._load_base()
            self._evaluate(loaded, problems[HELD_OUT], self.out / "base")
        for number, folder in enumerate(wanted):
            if self._is_done(folder):
                loaded = None
                continue
            if folder.result() is None:
                before = loaded or self._model_before(number)
                loaded = self._train(folder, before, problems[folder.stage.name])
            else:
                loaded = self._load(folder.model)
            self._evaluate(loaded, problems[HELD_OUT], folder.path)
            self._write_results()

    def _is_done(self, folder: StageFolder) -> bool:
        return folder.result() is not None and self._evaluation_path(folder.path).exists()

    def _has_base_result(self) -> bool:
        """Whether the base is scored, if it is one that can be."""
        is_new = isinstance(self.config.base, NewBase)
        return is_new or self._evaluation_path(self.out / "base").exists()

    def _model_before(self, number: int) -> Loaded | None:
        """What stage `number` starts from; None for a new base, which its stage makes."""
        if number > 0:
            return self._load(self.folders[number - 1].model)
        return None if isinstance(self.config.base, NewBase) else self._load_base()

    def _write_config(self) -> None:
        record = self.out / "config.json"
        content = {
            "phikit": phikit.__version__,
            "kind": "pipeline",
            "config": self.config.model_dump(mode="json"),
        }
        with storage_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        if record.exists():
            kind = json.loads(record.read_text(encoding="utf-8")).get("kind")
            if kind != "pipeline":
                raise RunError(f"{self.out} holds something else", fix="choose another --out")
        write_atomic(record, json.dumps(content, indent=2) + "\n")

    def _problems(self) -> Mapping[str, list[Problem]]:
        """The problems of every stage and of the evaluation, none of them on two sides.

        Training problems that a benchmark holds as well are left out, and the number is told.
        """
        config, evaluation = self.config, self.config.evaluation
        self.progress.task("problems: drawing", len(config.stages) + 1)
        held_out = load_problems(evaluation.source, split=evaluation.split, seed=evaluation.seed)
        self.progress.advance()
        withheld = {problem.content_hash for problem in held_out}
        sets: dict[str, list[Problem]] = {HELD_OUT: held_out}
        sides: dict[str, list[Problem]] = {"train": [], "rl": []}
        for stage in config.stages:
            found: list[Problem] = []
            if not isinstance(stage, PretrainStage):
                side = "rl" if isinstance(stage, DPOStage | RLStage) else "train"
                seed = stage_seed(config.seed, stage.name, "problems")
                found = load_problems(stage.source, split=side, seed=seed)
                clean = [problem for problem in found if problem.content_hash not in withheld]
                if len(clean) < len(found):
                    left_out = len(found) - len(clean)
                    self.progress.print(f"{stage.name}: left out {left_out} test problems")
                sides[side] += clean
                found = clean
            sets[stage.name] = found
            self.progress.advance()
        assert_disjoint(**sides, held_out=held_out)
        return sets

    def _load_base(self) -> Loaded:
        base = self.config.base
        assert not isinstance(base, NewBase)
        path = fetch(base.id, revision=base.revision) if isinstance(base, HubBase) else base.path
        loaded = self._load(path)
        refuse_quantised(loaded.model, "training it")
        return loaded

    def _load(self, path: str | Path) -> Loaded:
        return load(path, dtype=parse_dtype(self.config.dtype))

    def _new_base(self, stage: PretrainStage) -> Loaded:
        """Random weights and a tokenizer trained on documents of the corpus and on traces."""
        base, seed = self.config.base, self.config.seed
        assert isinstance(base, NewBase)
        texts = [
            document.content
            if isinstance(document.content, str)
            else "\n".join(message.content for message in document.content)
            for document in corpus(stage, seed, count=base.tokenizer_documents)
        ]
        traces = load_problems(
            base.tokenizer_traces, split="train", seed=stage_seed(seed, "tokenizer", "problems")
        )
        texts += [f"{p.question}\n{p.thinking}\n{p.solution}" for p in traces]
        tokenizer = train_tokenizer(texts, size=base.model.vocab_size, specials=NANO_SPECIALS)
        generator = torch.Generator().manual_seed(stage_seed(seed, stage.name, "weights"))
        model = build(base.model).initialise(generator).to(parse_dtype(self.config.dtype))
        return Loaded(
            model=model,
            tokenizer=tokenizer,
            renderer=renderer_for(tokenizer, base.renderer),
        )

    def _train(
        self, folder: StageFolder, loaded: Loaded | None, problems: Sequence[Problem]
    ) -> Loaded:
        """Train one stage from where it stands and save its model."""
        stage, config = folder.stage, self.config
        if loaded is None:
            assert isinstance(stage, PretrainStage), "a new base is pre-trained first"
            loaded = self._new_base(stage)
        is_begun = (folder.path / "config.json").exists()
        make = Run.open if is_begun else partial(Run.create, config=stage, kind="stage")
        run = make(folder.path)
        started = time.perf_counter()
        context = StageContext(
            loaded=loaded,
            problems=problems,
            folder=folder.path,
            seed=config.seed,
            scorer=self.scorer,
            progress=self.progress,
            modalities=config.modalities,
        )
        objective, steps, taught, finish = prepare(stage, context)
        prepared = time.perf_counter() - started
        if config.lora is not None:
            lora, seed = config.lora, stage_seed(config.seed, stage.name, "adapter")
            attach_lora(
                loaded.model,
                name=ADAPTER,
                targets=lora.targets,
                rank=lora.rank,
                alpha=lora.alpha,
                generator=torch.Generator().manual_seed(seed),
            )
        trackers = open_trackers(config.trackers, run_path=run.path, config=run.config)
        totals = train(
            taught or loaded.model,
            objective,
            stage.loop,
            steps=steps,
            run=run,
            progress=self.progress,
            name=stage.name,
            trackers=trackers,
            seed=stage_seed(config.seed, stage.name, "routing"),
        )
        for tracker in trackers:
            tracker.close()
        if config.lora is not None:
            merge_lora(loaded.model, ADAPTER)
        finish()
        _save_whole(folder.model, loaded)
        result = {
            "name": stage.name,
            "fingerprint": folder.fingerprint,
            "steps": steps,
            "seconds": totals.seconds + prepared,
            "tokens": totals.trained_tokens,
            "generated_tokens": totals.generated_tokens,
        }
        write_atomic(folder.path / "result.json", json.dumps(result, indent=2) + "\n")
        return self._load(folder.model)

    def _evaluation_path(self, folder: Path) -> Path:
        return folder / f"evaluation-{fingerprint(self.config.evaluation)[:8]}.json"

    def _map_path(self, folder: Path) -> Path:
        return self._evaluation_path(folder).with_name(f"experts-{MAPPED}.json")

    def _evaluate(self, loaded: Loaded, problems: Sequence[Problem], folder: Path) -> None:
        """Score greedily and by sampling; kept in the folder under the evaluation's fingerprint."""
        settings = self.config.evaluation
        with storage_errors(folder):
            (folder / "samples").mkdir(parents=True, exist_ok=True)
        results = {}
        for name, samples, temperature in (
            ("greedy", 1, 0.0),
            ("sampled", settings.samples, settings.temperature),
        ):
            self.progress.task(f"{folder.name}: {name} test", len(problems) * samples)
            solver = plain(
                Engine(loaded.model),
                loaded.renderer,
                SamplingConfig(
                    temperature=temperature,
                    num_samples=samples,
                    max_new_tokens=settings.max_new_tokens,
                    seed=settings.seed,
                ),
                on_progress=lambda _, finished: self.progress.advance(finished),
            )
            results[name] = evaluate(Task(name, problems, solver, self.scorer))
        write_transcripts(folder / "samples" / "test.txt", transcripts(results["greedy"]))
        self.progress.print(render_transcript(transcripts(results["greedy"])[0]))
        if self.is_mapped:
            examples = (loaded.renderer.example(p.messages()) for p in problems[:MAPPED])
            rows = [example.tokens[: loaded.config.max_context].tolist() for example in examples]
            found = expert_map(loaded.model, loaded.tokenizer, rows)
            write_atomic(self._map_path(folder), json.dumps(found.to_dict()))
        kept = {name: result.to_dict() for name, result in results.items()}
        write_atomic(self._evaluation_path(folder), json.dumps(kept))

    def _evaluation(self, folder: Path) -> dict[str, EvalResult]:
        kept = json.loads(self._evaluation_path(folder).read_text(encoding="utf-8"))
        return {name: EvalResult.from_dict(value) for name, value in kept.items()}

    def _summary(
        self, name: str, folder: StageFolder | None, evaluations: list[dict[str, EvalResult]]
    ) -> dict[str, Any]:
        """One stage's line of results.json."""
        greedy, sampled = evaluations[-1]["greedy"], evaluations[-1]["sampled"]
        cost = (folder.result() if folder else None) or {}
        paired = {}
        if len(evaluations) > 1:
            for kind in ("greedy", "sampled"):
                difference = paired_difference(
                    evaluations[-2][kind].scores(), evaluations[-1][kind].scores()
                )
                paired[kind] = difference._asdict()
        return {
            "name": name,
            "seconds": cost.get("seconds", 0.0),
            "tokens": cost.get("tokens", 0),
            "generated_tokens": cost.get("generated_tokens", 0),
            **greedy.summary(),
            "pass_at_1_t06": sampled.accuracy.mean,
            "pass_at_1_t06_stderr": sampled.accuracy.stderr,
            "mean_tokens": sampled.mean_tokens,
            "paired": paired.get("greedy"),
            "paired_t06": paired.get("sampled"),
            "transcripts": [t.to_dict() for t in transcripts(greedy, per_status=3)],
            "metrics": self._metrics(folder),
            **self._expert_map(folder),
        }

    def _metrics(self, folder: StageFolder | None) -> list[dict[str, Any]]:
        return Run.open(folder.path).metrics.read() if folder else []

    def _expert_map(self, folder: StageFolder | None) -> dict[str, Any]:
        path = self._map_path(folder.path if folder else self.out / "base")
        return {"experts": json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}

    def _write_results(self) -> dict[str, Any]:
        """Gather what is finished, in order and without gaps, into results.json."""
        evaluations: list[dict[str, EvalResult]] = []
        results: list[dict[str, Any]] = []
        if not isinstance(self.config.base, NewBase):
            evaluations.append(self._evaluation(self.out / "base"))
            results.append(self._summary("base", None, evaluations))
        for folder in itertools.takewhile(self._is_done, self.folders):
            evaluations.append(self._evaluation(folder.path))
            results.append(self._summary(folder.stage.name, folder, evaluations))
        everything = self._gathered(results) | {
            "stages": results,
            "beside": [] if self.beside is None else self._compare(results, evaluations),
            "meta": {
                "pipeline": self.config.name,
                "seed": self.config.seed,
                "phikit": phikit.__version__,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            },
        }
        write_atomic(self.out / "results.json", json.dumps(everything, indent=1))
        return everything

    def _gathered(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """What a pipeline of another kind tells of the run as a whole."""
        return {}

    def _compare(
        self, results: list[dict[str, Any]], evaluations: list[dict[str, EvalResult]]
    ) -> list[dict[str, Any]]:
        """The finished stages of the model beside this one; ours are told how they differ."""
        assert self.beside is not None
        others = []
        folders = itertools.takewhile(self.beside._is_done, self.beside.folders)
        before: list[dict[str, EvalResult]] = []
        for folder, ours, our_scores in zip(folders, results, evaluations, strict=False):
            before.append(self.beside._evaluation(folder.path))
            summary = self.beside._summary(folder.stage.name, folder, before)
            others.append(summary | {"name": f"beside: {folder.stage.name}"})
            their_scores = before[-1]["greedy"].scores()
            versus = paired_difference(their_scores, our_scores["greedy"].scores())
            ours["versus"] = versus._asdict()
        return others


def _of_other_model(config: PipelineConfig) -> PipelineConfig:
    """The pipeline of the model beside; one without routers has no routing to configure."""
    changes = {} if isinstance(config.beside, MoEConfig) else {"routing": RoutingConfig()}
    stages = tuple(
        stage.model_copy(update={"loop": stage.loop.model_copy(update=changes)})
        for stage in config.stages
    )
    base = config.base.model_copy(update={"model": config.beside})
    return config.model_copy(update={"base": base, "beside": None, "stages": stages})


def _save_whole(folder: Path, loaded: Loaded) -> None:
    """Save a model under another name and rename it: the folder is whole or absent."""
    temporary = folder.with_suffix(".tmp")
    with storage_errors(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        save(temporary, loaded)
        temporary.rename(folder)
