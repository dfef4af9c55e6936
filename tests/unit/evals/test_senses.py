from dataclasses import replace

from phikit.chat.message import Message
from phikit.data.problem import Problem, Provenance
from phikit.evals.senses import ERROR_RATES, chance, figures, measure_of, sense_scorer
from phikit.evals.task import Task, evaluate
from phikit.solve.solver import Reply


def problem(family: str, answer: str, question: str = "?") -> Problem:
    origin = Provenance("s", family, "CC0-1.0", "test", "g", "1", 0, 0)
    return Problem(question, answer, None, answer, None, f"{family}{question}{answer}", origin)


def said(text: str) -> Reply:
    return Reply(Message(role="assistant", content=text), [1, 2], [0.0, 0.0], finished=True)


ASKED = [
    problem("digit", "7"),
    problem("chart", "100"),
    problem("text", "apple"),
    problem("spoken_digits", "one two"),
]
REPLIES = ["7", "104", "appla", "one three"]


def test_each_family_has_its_measure():
    task = Task("t", ASKED, lambda _: [[said(text)] for text in REPLIES], sense_scorer())
    result = evaluate(task)
    assert [record.values for record in result.records] == [[1.0], [1.0], [0.0], [0.0]]
    found = figures(result)
    assert {family: cell["measure"] for family, cell in found.items()} == {
        "digit": "exact match", "chart": "relaxed accuracy", "text": "CER", "spoken_digits": "WER",
    }  # fmt: skip
    values = {family: round(cell["value"], 3) for family, cell in found.items()}
    assert values == {"digit": 1.0, "chart": 1.0, "text": 0.2, "spoken_digits": 0.5}
    silent = [*ASKED, problem("spoken_digits", "..."), problem("command", "(laughs)")]
    replies = [[said(text)] for text in (*REPLIES, "one", "hello")]
    assert figures(evaluate(Task("t", silent, lambda _: replies, sense_scorer()))) == found
    assert measure_of("text").name in ERROR_RATES
    assert measure_of("anything").name not in ERROR_RATES


def test_chance_gives_each_question_its_most_frequent_answer():
    answers = {"digit": [("?", "3"), ("?", "3"), ("?", "7")], "shapes": [("how many", "2")]}
    asked = [problem("digit", "3"), problem("digit", "7"), problem("unknown", "x")]
    other = replace(problem("shapes", "2"), question="which colour")
    found = chance([*asked, other], answers)
    assert found["digit"] == {"measure": "exact match", "value": 0.5, "n": 2}
    assert found["shapes"]["value"] == 1.0  # a question that was never asked takes the family's
    assert "unknown" not in found
