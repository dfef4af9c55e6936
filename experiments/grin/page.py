"""docs/claims/grin.md and its pictures, from the stored results and the claims' own docstrings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from experiments.grin import NUMBERS, claim
from experiments.grin.claim import Claim
from matplotlib.figure import Figure

from phikit.base.files import write_atomic
from phikit.evals.plots import LIGHT, STYLE

INTRODUCTION = """# GRIN's claims, tested

GRIN (arXiv 2409.12136) trains mixtures of experts with SparseMixer, an estimator of the gradient of
a draw, with a balance loss over all ranks and without dropping a token. What of that can be tested
on a laptop's CPU is tested here, by hypotheses, measures and decision rules that stood in the code
before anything ran. Models are tiny (see `experiments/grin/`): a null says that these runs cannot
tell, not that there is nothing. Differences are over paired seeds, with 95 % intervals of Student's
t; every arm had equally many trials of its settings, on seeds that no comparison uses. Several
comparisons stand on this page, and one in twenty true nulls would look like an effect.

"""


def write_pages(docs: Path) -> None:
    """Renew the page and the pictures of all claims that have results."""
    pages, images = docs / "claims", docs / "images" / "grin"
    for folder in (pages, images):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(pages / "grin.md", page(docs / "results" / "grin"))
    for number in NUMBERS:
        record, chosen = stored(docs / "results" / "grin", number), claim(number)
        if record is not None and chosen.draw is not None:
            with matplotlib.rc_context({**STYLE, "svg.fonttype": "path"}):
                figure = Figure(figsize=chosen.size, layout="constrained", facecolor="white")
                chosen.draw(figure, LIGHT, record)
                path = images / f"{number}.svg"
                figure.savefig(path, metadata={"Date": None})


def page(results: Path) -> str:
    """The page as Markdown."""
    records = {number: stored(results, number) for number in NUMBERS}
    lines = ["| Claim | | Verdict |", "|:--|:--|:--|"]
    for number, record in records.items():
        title = claim(number).title
        if record is None:
            words = f"not run yet: `python -m experiments.grin {number}`"
        else:
            verdict = record["verdict"]
            words = f"**{verdict['outcome']}**. {verdict['words']}"
        lines.append(f"| {number} | {title} | {words} |")
    sections = (_section(claim(number), record) for number, record in records.items())
    return INTRODUCTION + "\n".join(lines) + "\n\n" + "\n".join(sections)


def stored(results: Path, number: str) -> dict[str, Any] | None:
    """A claim's record, if it was run."""
    path = results / f"{number}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _section(chosen: Claim, record: Mapping[str, Any] | None) -> str:
    """What was written down before, then what was found."""
    parts = [f"## {chosen.number}: {chosen.title}", chosen.words.strip()]
    if record is None:
        return "\n\n".join([*parts, ""])
    verdict = record["verdict"]
    parts.append(f"**Result: {verdict['outcome']}.** {verdict['words']}")
    if chosen.draw is not None:
        parts.append(f"![{chosen.title}](../images/grin/{chosen.number}.svg)")
    if "runs" in record:
        parts += [_arms(record), _comparisons(verdict["comparisons"])]
        parts.append(f"Text {record['text']}; torch {record['machine']['torch']}, Python "
                     f"{record['machine']['python']}.")  # fmt: skip
    else:
        parts.append(_figures(chosen.number, record["figures"]))
    return "\n\n".join([*parts, ""])


def _arms(record: Mapping[str, Any]) -> str:
    """Every arm: what was chosen for it, and means over the test seeds."""
    columns = {
        "loss": "Held-out loss",
        "loss_sampled": "with drawn routing",
        "max_vio": "MaxVio",
        "similarity": "Similarity of domains",
        "single": "Single candidate",
    }
    runs = record["runs"]
    shown = [
        key for key in columns if any(run[key] is not None for of in runs.values() for run in of)
    ]
    lines = [
        f"| Arm | Chosen | {' | '.join(columns[key] for key in shown)} |",
        "|:--|:--|" + "--:|" * len(shown),
    ]
    for arm, of_arm in runs.items():
        cells = [arm, _chosen(record, arm)]
        for key in shown:
            values = [run[key] for run in of_arm if run[key] is not None]
            cells.append(f"{sum(values) / len(values):.4f}" if values else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _chosen(record: Mapping[str, Any], arm: str) -> str:
    """The arm's settings; one at an end of what was tried may have a better one beyond it."""
    words = []
    for value, tried in zip(
        record["chosen"][arm], (sweep[arm] for sweep in record["tuning"].values()), strict=True
    ):
        end = {next(iter(tried)): "first", next(reversed(tried)): "last"}.get(value)
        is_edge = end is not None and len(set(tried)) > 1
        words.append(f"{value} (the {end} tried)" if is_edge else value)
    return ", ".join(words)


def _comparisons(comparisons: list[Mapping[str, Any]]) -> str:
    lines = ["| Difference | Measure | Mean | 95 % interval | Seeds |", "|:--|:--|--:|--:|--:|"]
    for found in comparisons:
        mean, low, high = (f"{found[key]:+.4f}" for key in ("delta", "low", "high"))
        cells = [found["name"], found["measure"], mean, f"{low} to {high}", str(found["seeds"])]
        lines.append("| " + " | ".join(cells).replace("-", "−") + " |")
    return "\n".join(lines)


def _figures(number: str, figures: Mapping[str, Any]) -> str:
    """The tables of claims that are computed."""
    if number == "C1":
        return _estimators(figures)
    if number == "C6":
        lines = ["| | Experts over dense | in rounds | Memory |", "|:--|--:|--:|--:|"]
        for name, row in figures["sizes"].items():
            low, high = row["ratios_of_rounds"]
            cells = [name, f"{row['ratio_of_medians']:.2f}", f"{low:.2f}–{high:.2f}"]
            lines.append("| " + " | ".join([*cells, f"{row['memory_ratio']:.2f}"]) + " |")
        return "\n".join(lines)
    first = next(iter(figures.values()))
    lines = [f"| Threshold | {' | '.join(first)} |", "|:--|" + "--:|" * len(first)]
    for threshold, row in figures.items():
        cells = [str(x) if isinstance(x, bool) else f"{x:.1e}" for x in row.values()]
        lines.append(f"| {threshold} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("_", " ")


def _estimators(figures: Mapping[str, Any]) -> str:
    """Biases by function, and orders."""
    names = list(next(iter(figures["bias"].values())))
    lines = [f"| Relative bias | {' | '.join(names)} |", "|:--|" + "--:|" * len(names)]
    for rule, row in figures["bias"].items():
        cells = ["0" if row[name] < 1e-10 else f"{row[name]:.2f}" for name in names]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    orders = ["| Order of the error | found | expected |", "|:--|--:|--:|"]
    for rule, (found, expected) in figures["orders"].items():
        orders.append(f"| {rule} | {found:.2f} | {expected} |")
    return "\n".join([*lines, "", *orders])
