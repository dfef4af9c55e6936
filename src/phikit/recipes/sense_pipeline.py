"""A pipeline that teaches a model to see and to hear, and how it is judged.

Every family of problems has its measure; beside each stand chance and the text model, which is
asked the same question without the picture or the sound. A stage is scored on the families that it
trains on, the last stage on all. After each stage the text model is asked what it was asked before
the first: its logits and its replies must be the same, bit for bit.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from phikit.base.device import one_thread
from phikit.base.errors import DataError
from phikit.base.files import storage_errors, write_atomic
from phikit.base.progress import Progress
from phikit.chat.media import PLACEHOLDER
from phikit.chat.message import Message
from phikit.data.corpus import Document, pretraining_documents
from phikit.data.media.generate import drafts
from phikit.data.media.problem import MediaProblem
from phikit.data.problem import Problem
from phikit.data.source import FileSource, MediaFileSource, MediaSource, load_problems
from phikit.evals.media_report import shown_items
from phikit.evals.senses import chance, figures, sense_scorer
from phikit.evals.task import EvalResult, ProblemRecord, Task, evaluate
from phikit.evals.transcripts import render_transcript, transcripts, write_transcripts
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.recipes.config import MediaStage, PipelineConfig, PretrainStage
from phikit.recipes.context import stage_seed
from phikit.recipes.media import FAULTS
from phikit.recipes.pipeline import HELD_OUT, Pipeline, StageFolder
from phikit.solve.plain import SamplingConfig, Senses, plain
from phikit.weights.load import Loaded

TEXT = "text.json"
"""A `TextState`, in the folder of its stage."""
DOCUMENTS, TEXTS, TEXT_TOKENS = 80, 16, 48
"""Documents on which the text model is compared, and the rows that are cut from them."""
QUESTIONS = ("What is the capital of France?", "Name three colours.", "Write a short poem.")
REPLY_TOKENS = 24
COUNTED = 500
"""Training problems of each family whose answers are counted for chance."""
SHOWN = 2
"""Problems of each family in the report's gallery."""


class TextState(NamedTuple):
    """What a model makes of text, to be compared between stages."""

    logits: str
    """Hash of all logits."""
    replies: str
    """Hash of greedy replies and their log-probabilities."""
    loss: float
    """Nats a token on documents of the corpus."""


class DrawnProblems(Mapping[str, list[Problem]]):
    """The problems of the stages, drawn anew each time, and the held-out ones, which are kept."""

    def __init__(self, config: PipelineConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.stages = {stage.name: stage for stage in config.stages}

    @cached_property
    def held_out(self) -> list[Problem]:
        evaluation = self.config.evaluation
        return load_problems(evaluation.source, split=evaluation.split, seed=evaluation.seed)

    def __getitem__(self, name: str) -> list[Problem]:
        if name == HELD_OUT:
            return self.held_out
        stage = self.stages[name]
        if isinstance(stage, PretrainStage):
            return []
        seed = stage_seed(self.config.seed, name, "problems")
        if isinstance(stage.source, MediaSource):
            self.progress.task(f"{name}: drawing", stage.source.count)
        found = load_problems(
            stage.source, split="train", seed=seed, on_item=lambda: self.progress.advance(1)
        )
        withheld = {problem.content_hash for problem in self.held_out}
        return [problem for problem in found if problem.content_hash not in withheld]

    def __iter__(self) -> Iterator[str]:
        return iter((HELD_OUT, *self.stages))

    def __len__(self) -> int:
        return 1 + len(self.stages)

    def families(self, stage: MediaStage) -> list[str]:
        """What a stage trains on."""
        if isinstance(stage.source, MediaSource):
            return [family for family, count in stage.source.families.items() if count]
        return [*dict.fromkeys(problem.provenance.family for problem in self[stage.name])]

    def answers(self, stage: MediaStage) -> dict[str, list[tuple[str, str]]]:
        """Questions and answers of a stage's training by family; no item is made or opened."""
        if isinstance(stage.source, MediaSource):
            seed = stage_seed(self.config.seed, stage.name, "problems")
            return {
                family: [
                    (draft.question, draft.answer)
                    for draft in drafts(family=family, seed=seed, count=COUNTED, split="train")
                ]
                for family in self.families(stage)
            }
        found: dict[str, list[tuple[str, str]]] = {}
        for problem in self[stage.name]:
            pair = (problem.question, problem.answer)
            found.setdefault(problem.provenance.family, []).append(pair)
        return found


class SensePipeline(Pipeline):
    """Stages that attach and train modalities, with their own evaluation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scorer = sense_scorer()
        self._drawn = DrawnProblems(self.config, self.progress)

    def _problems(self) -> Mapping[str, list[Problem]]:
        """Drawn when they are asked for, as pictures and sounds of all stages fill the memory.

        What is generated is disjoint by its split; a stage from elsewhere is checked as it comes.
        """
        return self._drawn

    def _work(self, wanted: Sequence[StageFolder]) -> None:
        """Files that a later stage will read are missed now, and not after hours of training."""
        stages = [each.stage for each in wanted if isinstance(each.stage, MediaStage)]
        for source in (self.config.evaluation.source, *(stage.source for stage in stages)):
            if isinstance(source, FileSource | MediaFileSource) and not Path(source.path).exists():
                raise DataError(f"there is no {source.path}", fix="give the path of the data")
        super()._work(wanted)

    def _evaluate(self, loaded: Loaded, problems: Sequence[Problem], folder: Path) -> None:
        """Score the stage's families; before the first media stage, the questions alone."""
        with storage_errors(folder):
            (folder / "samples").mkdir(parents=True, exist_ok=True)
        stage = self._stage_of(folder)
        write_atomic(folder / TEXT, json.dumps(text_state(loaded)._asdict()))
        kept: dict[str, Any] = {}
        if not isinstance(stage, MediaStage):
            alone = [_without_media(problem) for problem in problems]
            kept["greedy"] = self._ask(loaded, alone, folder, None).to_dict()
        elif chosen := self._families_of(stage, problems):
            result = self._ask(loaded, chosen, folder, Senses.of(loaded.model))
            kept["greedy"] = result.to_dict()
            write_transcripts(folder / "samples" / "test.txt", transcripts(result))
            self.progress.print(render_transcript(transcripts(result)[0]))
        write_atomic(self._evaluation_path(folder), json.dumps(kept))

    def _is_done(self, folder: StageFolder) -> bool:
        """The last stage is asked everything, which one that others followed before was not."""
        source, stage = self.config.evaluation.source, folder.stage
        if not super()._is_done(folder):
            return False
        is_start = isinstance(stage, MediaStage) and stage.is_start  # asked nothing, last or not
        is_last = stage is self.config.stages[-1]
        if is_start or not is_last or not isinstance(source, MediaSource):
            return True
        results = self._evaluation(folder.path).values()
        asked = {record.family for result in results for record in result.records}
        return asked >= {family for family, count in source.families.items() if count}

    def _ask(
        self, loaded: Loaded, problems: Sequence[Problem], folder: Path, senses: Senses | None
    ) -> EvalResult:
        self.progress.task(f"{folder.name}: test", len(problems))
        solver = plain(
            Engine(loaded.model),
            loaded.renderer,
            SamplingConfig(temperature=0, max_new_tokens=self.config.evaluation.max_new_tokens),
            senses=senses,
            on_progress=lambda _, finished: self.progress.advance(finished),
        )
        return evaluate(Task("test", problems, solver, self.scorer))

    def _stage_of(self, folder: Path) -> Any:
        return next((each.stage for each in self.folders if each.path == folder), None)

    def _families_of(self, stage: MediaStage, problems: Sequence[Problem]) -> list[Problem]:
        """Those held-out problems that a stage is scored on; none after an encoder's start."""
        if stage.is_start:
            return []
        if stage is self.config.stages[-1]:
            return list(problems)
        families = self._drawn.families(stage)
        return [problem for problem in problems if problem.provenance.family in families]

    def _summary(
        self, name: str, folder: StageFolder | None, evaluations: list[dict[str, EvalResult]]
    ) -> dict[str, Any]:
        """One stage's line of results.json."""
        path = folder.path if folder else self.out / "base"
        cost = (folder.result() if folder else None) or {}
        result = evaluations[-1].get("greedy")
        line: dict[str, Any] = {
            "name": name,
            "seconds": cost.get("seconds", 0.0),
            "tokens": cost.get("tokens", 0),
            "text": json.loads((path / TEXT).read_text(encoding="utf-8")),
            "senses": figures(result) if result else {},
            "metrics": self._metrics(folder),
        }
        if result is not None:
            line |= result.summary() | {
                "transcripts": [t.to_dict() for t in transcripts(result, per_status=6)],
                "unasked": [
                    reply.reason
                    for record in result.records
                    for reply in record.replies
                    if reply.status == "error"
                ],
            }
        faults = path / FAULTS
        if faults.is_file():
            line["items"] = json.loads(faults.read_text(encoding="utf-8"))
        return line

    def _gathered(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """What is told of the run as a whole: chance, and whether the text model is the same."""
        media = {stage.name for stage in self.config.stages if isinstance(stage, MediaStage)}
        before = next((line["text"] for line in reversed(results) if line["name"] not in media), {})
        for line in results:
            line["is_text_same"] = all(
                line["text"][key] == before.get(key) for key in ("logits", "replies")
            )
        held_out = self._problems()[HELD_OUT]
        return {"chance": self._chance(held_out), "gallery": self._gallery(held_out)}

    def _chance(self, problems: Sequence[Problem]) -> dict[str, Any]:
        answers: dict[str, list[tuple[str, str]]] = {}
        for stage in self.config.stages:
            if isinstance(stage, MediaStage):
                answers = self._drawn.answers(stage) | answers
        return chance(problems, answers)

    def _gallery(self, problems: Sequence[Problem]) -> list[dict[str, Any]]:
        """The first problems of each family, with what was said about them after each stage.

        They are known by their place: several may ask the same in other voices or fonts.
        """
        shown: dict[str, list[MediaProblem]] = {}
        for problem in problems:
            of_family = shown.setdefault(problem.provenance.family, [])
            if isinstance(problem, MediaProblem) and len(of_family) < SHOWN:
                of_family.append(problem)
        places = [(folder.stage.name, folder.path) for folder in self.folders]
        said: dict[tuple[str, int], dict[str, str]] = {}
        for name, path in [("base", self.out / "base"), *places]:
            if not self._evaluation_path(path).is_file():
                continue
            for result in self._evaluation(path).values():
                for key, record in _numbered(result.records):
                    said.setdefault(key, {})[name] = record.replies[0].answer
        return [
            {
                "family": family,
                "question": problem.question,
                "gold": problem.answer,
                "items": shown_items(problem),
                "replies": said.get((family, place), {}),
            }
            for family, of_family in shown.items()
            for place, problem in enumerate(of_family)
        ]


@one_thread()
def text_state(loaded: Loaded) -> TextState:
    """What the model makes of text alone: the same hashes mean the same bits.

    On one thread, so that a run which goes on with more of them is compared with its beginning.
    """
    documents = pretraining_documents(seed=0, count=DOCUMENTS)
    stream = loaded.tokenizer.encode("\n".join(_text_of(document) for document in documents))
    rows = [stream[k : k + TEXT_TOKENS] for k in range(0, len(stream), TEXT_TOKENS)][:TEXTS]
    tokens_BT = torch.tensor(rows, device=loaded.model.device)
    loaded.model.eval()
    with torch.no_grad():
        logits_BTV = loaded.model(tokens_BT)
        targets = tokens_BT[:, 1:].flatten()
        loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), targets)
    asked = [
        Request(
            loaded.renderer.prompt([Message(role="user", content=question)]),
            REPLY_TOKENS,
            temperature=0.0,
            stop_ids=loaded.renderer.stop_ids,
        )
        for question in QUESTIONS
    ]
    said = [(c.tokens, c.log_probs) for [c] in Engine(loaded.model).generate(asked)]
    raw = logits_BTV.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return TextState(_hash(raw), _hash(repr(said).encode()), float(loss))


def _numbered(records: Iterable[ProblemRecord]) -> Iterator[tuple[tuple[str, int], ProblemRecord]]:
    """Records with their family and their place in it."""
    places: Counter[str] = Counter()
    for record in records:
        yield (record.family, places[record.family]), record
        places[record.family] += 1


def _text_of(document: Document) -> str:
    content = document.content
    return content if isinstance(content, str) else "\n".join(m.content for m in content)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _without_media(problem: Problem) -> Problem:
    return replace(problem, question=PLACEHOLDER.sub("", problem.question))
