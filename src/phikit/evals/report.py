"""report.html: a pipeline or a run on one page that needs nothing else.

One file, no script, no outside resource: it opens from a disk, on a phone, in ten years. Everything
a model wrote is escaped, and a content security policy forbids the page to load or run anything,
should an escape ever be missed. Pictures that it shows are part of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from phikit.base.files import write_atomic
from phikit.evals.expert_plot import kinds_svg, load_svg
from phikit.evals.media_report import senses_section
from phikit.evals.plots import (
    CURVES,
    DARK,
    LIGHT,
    accuracy_svg,
    css_variables,
    curve_svg,
    families_svg,
    steps_svg,
)
from phikit.evals.results import Results, Shown, Stage
from phikit.evals.scorer import STATUSES
from phikit.evals.table import COLUMNS, NOTHING, change, points, stage_row


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Write the page of a results.json.

    Raises:
        RunError: the data are not results.
        StorageError: the disk is full or closed to us.
    """
    write_atomic(path, render_report(results))


def render_report(results: Mapping[str, Any]) -> str:
    """The page as HTML text."""
    checked = Results.read(results)
    title = _text(checked.meta.get("title", "phikit report"))
    senses = senses_section(results)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if "<img" in senses:  # of ours: what others wrote is escaped
        policy += "; img-src data:"
    body = [
        f"<header><h1>{title}</h1>{_headline(checked.stages)}{_facts(checked.meta)}</header>",
        _table(checked.all_stages),
        senses,
        _charts(checked),
        _experts(checked),
        _transcripts(checked.all_stages),
        _NOTES,
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{title}</title><style>{_style()}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _headline(stages: Sequence[Stage]) -> str:
    """First and last accuracy in large type."""
    measured = [(stage, stage.accuracy) for stage in stages if stage.accuracy is not None]
    if not measured:
        return ""
    (first, low), (last, high) = measured[0], measured[-1]
    final = f"<strong>{100 * high:.1f} %</strong>"
    problems = "the" if last.n is None else str(last.n)
    if len(measured) == 1:
        return f'<p class="lead">{final} of {problems} problems solved</p>'
    return (
        f'<p class="lead"><span>{100 * low:.1f} %</span> → {final} of {problems} problems solved, '
        f"{points(high - low)} points from {_text(first.name)} to {_text(last.name)}</p>"
    )


def _facts(meta: Mapping[str, Any]) -> str:
    facts = [
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
        for name, value in meta.items()
        if name != "title"
    ]
    return f'<dl class="facts">{"".join(facts)}</dl>' if facts else ""


def _table(stages: Sequence[Stage]) -> str:
    heads = "".join(f"<th>{_text(column)}</th>" for column in (*COLUMNS, "Replies"))
    rows = "".join(_table_row(stage) for stage in stages)
    return (
        "<section><h2>Stages</h2><div class=scroll><table>"
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<p class=legend>{_status_legend(stages)}</p></section>"
    )


def _table_row(stage: Stage) -> str:
    row = stage_row(stage)
    cells = [f"<th scope=row>{_text(row.stage)}</th>"]
    cells += [f"<td>{_text(cell)}</td>" for cell in row[1:-1]]
    paired = stage.paired
    if paired is None:
        cells.append(f"<td>{NOTHING}</td>")
    else:
        kind = "noise" if paired.within_noise else "gain" if paired.delta > 0 else "loss"
        shown, interval, rest = change(paired).partition(" [")
        bounds, _, words = rest.partition("]")
        small = f"<small>[{_text(bounds)}]{_text(words)}</small>" if interval else ""
        cells.append(f'<td class="{kind}"><b>{_text(shown)}</b> {small}</td>')
    cells.append(f"<td>{_status_bar(stage)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _status_bar(stage: Stage) -> str:
    """The five statuses as one stacked bar, the counts in its tooltip."""
    total = sum(stage.statuses.values())
    if not total:
        return NOTHING
    counts = [(status, stage.statuses.get(status, 0)) for status in STATUSES]
    label = ", ".join(f"{status} {count}" for status, count in counts)
    parts = "".join(
        f'<i class="{status}" style="flex-grow:{count}"></i>' for status, count in counts if count
    )
    return f'<div class=bar role=img aria-label="{label}" title="{label}">{parts}</div>'


def _status_legend(stages: Sequence[Stage]) -> str:
    seen = [s for s in STATUSES if any(stage.statuses.get(s) for stage in stages)]
    return "".join(f'<span><i class="{status}"></i>{status}</span>' for status in seen)


def _charts(results: Results) -> str:
    drawn = [svg for svg in _drawings(results.stages, results.beside) if svg is not None]
    if not drawn:
        return ""
    figures = "".join(f"<figure>{svg}</figure>" for svg in drawn)
    return f"<section><h2>Charts</h2><div class=grid>{figures}</div></section>"


def _drawings(stages: Sequence[Stage], beside: Sequence[Stage]) -> Iterator[str | None]:
    yield accuracy_svg(stages)
    yield steps_svg(stages)
    yield families_svg(stages)
    for key in CURVES:
        for number, (stage, other) in enumerate(zip_longest(stages, beside[: len(stages)])):
            yield curve_svg(stage, key, colour=number, beside=other)


def _experts(results: Results) -> str:
    """Where the routers send what, and what that is worth beside the other model."""
    parts = [
        f"<figure class=wide>{svg}</figure>"
        for number, stage in enumerate(results.stages)
        if (svg := load_svg(stage, colour=number)) is not None
    ]
    if not parts:
        return ""
    pairs = zip_longest(results.stages, results.beside[: len(results.stages)])
    for number, (stage, other) in enumerate(pairs):
        svg = kinds_svg(stage, colour=number, beside=other)
        parts += [] if svg is None else [f"<figure>{svg}</figure>"]
    words = "".join(_versus(stage) for stage in results.stages)
    return (
        f"<section><h2>Experts</h2><div class=grid>{''.join(parts)}</div>"
        f"<div class=notes>{words}{_EXPERT_NOTES}</div></section>"
    )


def _versus(stage: Stage) -> str:
    if stage.versus is None:
        return ""
    return (
        f"<p>{_text(stage.name)}, beside the other model on the same problems: accuracy "
        f"{_text(change(stage.versus))} points.</p>"
    )


def _transcripts(stages: Sequence[Stage]) -> str:
    parts = [
        f"<details><summary>{_text(stage.name)} <small>{len(stage.transcripts)} replies</small>"
        f"</summary>{''.join(map(_transcript, stage.transcripts))}</details>"
        for stage in stages
        if stage.transcripts
    ]
    return f"<section><h2>Transcripts</h2>{''.join(parts)}</section>" if parts else ""


def _transcript(shown: Shown) -> str:
    status = shown.status if shown.status in STATUSES else "error"
    facts = [f"gold <b>{_text(shown.gold)}</b>"]
    if shown.extracted is not None:
        facts.append(f"extracted <b>{_text(shown.extracted)}</b>")
    if shown.num_tokens is not None:
        facts.append(f"{shown.num_tokens} tokens")
    if shown.reason is not None:
        facts.append(_text(shown.reason))
    parts = [("Question", shown.question), ("Thinking", shown.thinking), ("Answer", shown.answer)]
    blocks = "".join(
        f'<h4>{name}</h4><pre class="{name.lower()}">{_text(text)}</pre>'
        for name, text in parts
        if text is not None
    )
    return (
        f'<details class=reply><summary><i class="{status}"></i><b>{_text(shown.status)}</b> '
        f"<bdi>{_text(shown.question[:110])}</bdi></summary>"
        f"<p class=legend>{' · '.join(facts)}</p>{blocks}</details>"
    )


def _text(value: Any) -> str:
    """Any value as HTML text, harmless in content and in a quoted attribute.

    Control characters and lone surrogates, which no page can carry, become U+FFFD.
    """
    shown = "".join(
        char if char.isprintable() or char in "\n\t" or char.isspace() else "\ufffd"
        for char in str(value)
    )
    return escape(shown, quote=True)


def _style() -> str:
    return (
        f":root{{{css_variables(LIGHT)}{_LIGHT_PAGE}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{css_variables(DARK)}{_DARK_PAGE}}}}}{_CSS}"
    )


_LIGHT_PAGE = (
    "--page:#f6f7f9;--card:#fff;--gain:#0a7f62;--loss:#b93845;"
    "--correct:#12a67c;--wrong:#e0646f;--unparsed:#e5a13a;--truncated:#7d8fb3;--error:#5b4b8a;"
)
_DARK_PAGE = (
    "--page:#0f131b;--card:#181e29;--gain:#3ccba0;--loss:#ff8088;"
    "--correct:#26b98c;--wrong:#d85b68;--unparsed:#dba046;--truncated:#7486ad;--error:#9a86d8;"
)
_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.1rem;font-weight:600;margin:0;color:var(--muted)}
h2{font-size:1rem;margin:2.5rem 0 .75rem}
.lead{font-size:clamp(1.15rem,3.4vw,1.6rem);line-height:1.35;margin:.4rem 0 1.2rem}
.lead span{color:var(--muted)}.lead strong{font-size:1.5em}
.facts{display:flex;flex-wrap:wrap;gap:.6rem 2rem;margin:0}
.facts dt{font-size:.78rem;color:var(--muted)}.facts dd{margin:0;overflow-wrap:anywhere}
.scroll,figure,section>details{background:var(--card);border:1px solid var(--grid);
border-radius:10px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.6rem .9rem;text-align:right;white-space:nowrap}
th:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
thead th{font-size:.8rem;font-weight:500;color:var(--muted)}
tbody tr{border-top:1px solid var(--grid)}
tbody th{font-weight:600}
td small{color:var(--muted)}.gain b{color:var(--gain)}.loss b{color:var(--loss)}
.noise b{font-weight:500;color:var(--muted)}
.bar{display:flex;gap:1px;width:9rem;height:.7rem;border-radius:4px;overflow:hidden;
margin-left:auto}
.correct{background:var(--correct)}.wrong{background:var(--wrong)}
.unparsed{background:var(--unparsed)}.truncated{background:var(--truncated)}
.error{background:var(--error)}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;font-size:.82rem;color:var(--muted);
margin:.6rem 0}
.legend i,summary>i{display:inline-block;width:.65rem;height:.65rem;border-radius:3px;
margin-right:.4rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:1rem}
figure{margin:0;padding:.8rem}
.wide{grid-column:1/-1}
img{max-width:100%;min-height:3rem;margin:.4rem .4rem .4rem 0;image-rendering:pixelated}
svg{display:block;width:100%;height:auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
section>details{margin-bottom:.6rem;padding:0 1rem}
summary{cursor:pointer;padding:.7rem 0;overflow-wrap:anywhere}
section>details>summary{font-weight:600}
summary small{font-weight:400;color:var(--muted)}
.reply{border-top:1px solid var(--grid)}
.reply bdi{color:var(--muted)}
.reply h4{font-size:.78rem;font-weight:500;color:var(--muted);margin:.6rem 0 .2rem}
pre{margin:0 0 .8rem;padding:.7rem .9rem;background:var(--page);border-radius:8px;
white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;
font:.86rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre.thinking{color:var(--muted)}
.notes{font-size:.86rem;color:var(--muted);max-width:46rem}
"""
_EXPERT_NOTES = """<p>Each picture is one layer of the model after that stage: a row is a kind of
token, a column an expert, and the darker a cell, the larger the share of the kind's assignments
that the expert has. An even row would have the same shade throughout. Held-out loss is that of
deterministic routing; the loss in training has the noise of drawn routing in it and is not to be
compared between models.</p>"""
_NOTES = """<section class=notes><h2>How to read this</h2>
<p>Accuracy is the share of problems solved, one greedy reply each, ± one standard error over
problems. pass@1 is the same share over four replies a problem at temperature 0.6. Length is the
mean reply in tokens.</p>
<p>Change is the paired difference to the stage before on the same problems, in percentage points,
with its 95 % interval. An interval that covers zero is within noise: these data cannot tell the
two stages apart.</p>
<p>A reply is truncated when it ran into the length limit, unparsed when it stopped without a boxed
answer, and an error when it could not be asked or checked. None of these counts as correct.</p>
</section>"""
