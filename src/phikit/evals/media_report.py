"""The part of the report about pictures and sound: figures by family, and what was shown and said.

Pictures are embedded as PNG, sounds are drawn: the waveform above its spectrogram.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from phikit.base.errors import MissingExtraError, RunError
from phikit.base.media import SPEECH, VISION
from phikit.chat.audio import RATE_HZ, audio_clip
from phikit.data.media.problem import MediaProblem
from phikit.evals.sense_plot import senses_svg

WAVE_POINTS = 300
"""Columns of a waveform."""
NOT_MEASURED = "–"
ITEM = re.compile(
    r"(<svg [^<>]*><path [^<>]*/></svg>)?"
    r'<img alt="[^"<>]*" src="data:image/png;base64,[A-Za-z0-9+/]+=*">'
)
"""All that `shown_items` makes. A results.json may come from elsewhere, with other elements in it,
some of which no content security policy stops."""


def shown_items(problem: MediaProblem) -> list[str]:
    """The pictures and sounds of a problem as HTML elements that need nothing else.

    Files are left out: they are the user's, and may be of any size.
    """
    made = {VISION: _picture, SPEECH: _sound}
    return [
        made[name](source)
        for name, sources in problem.media.items()
        if name in made
        for source in sources
        if isinstance(source, np.ndarray)
    ]


def senses_section(results: Mapping[str, Any]) -> str:
    """The tables and the gallery of a results.json; empty for a run without modalities.

    Raises RunError for an item that is neither a picture nor a sound of ours.
    """
    stages = [stage for stage in results["stages"] if stage.get("senses") is not None]
    if not stages:
        return ""
    return (
        "<section><h2>What it sees and hears</h2>"
        f"{_figures(stages, results.get('chance', {}))}{_text_model(stages)}{_faults(stages)}"
        f"{_gallery(results.get('gallery', []))}</section>"
    )


def family_rows(
    stages: Sequence[Mapping[str, Any]], chance: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    """A line for each family: its name, its measure, chance, then each stage in order."""
    families = dict.fromkeys(family for stage in stages for family in stage["senses"])
    rows = []
    for family in families:
        cells = [stage["senses"].get(family) for stage in stages]
        measure = next(cell["measure"] for cell in cells if cell)
        rows.append((family, measure, *map(_share, (chance.get(family), *cells))))
    return rows


def family_table(results: Mapping[str, Any]) -> Table:
    """The same for a terminal; a stage that was not scored has no column."""
    stages = [stage for stage in results["stages"] if stage.get("senses")]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("Family", "Measure", "Chance", *(stage["name"] for stage in stages)):
        table.add_column(column, justify="left" if column in ("Family", "Measure") else "right")
    for row in family_rows(stages, results["chance"]):
        table.add_row(*map(Text, row))
    return table


def _figures(stages: Sequence[Mapping[str, Any]], chance: Mapping[str, Any]) -> str:
    shown = [stage for stage in stages if stage["senses"]]
    names = [stage["name"] for stage in shown]
    heads = ("Family", "Measure", "Chance", f"{names[0]}: text alone", *names[1:])
    body = "".join(
        f"<tr><th scope=row>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in family_rows(shown, chance)
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        "</div>"
        "<p class=notes>WER and CER are error rates, less is better; of the others more is. Chance "
        "is the score of always giving a question its most frequent answer in training. A stage is "
        "scored on what it trains on, the last one on everything; fonts, voices and palettes of "
        "these problems occur in no training.</p>"
    )


def _text_model(stages: Sequence[Mapping[str, Any]]) -> str:
    known = [stage for stage in stages if "is_text_same" in stage]
    changed = [stage["name"] for stage in known if not stage["is_text_same"]]
    losses = [stage["text"]["loss"] for stage in known]
    if not known:
        return ""
    if not changed:
        words = f"text model unchanged: after each of {len(known)} stages the hashes of its "
        words += f"logits and of its replies are those before; loss {losses[0]:.4f}"
    else:
        words = f"the text model CHANGED in {', '.join(changed)}: its loss on text went from "
        words += f"{losses[0]:.4f} to {losses[-1]:.4f} nats a token"
    drawn = senses_svg(known) if len(known) > 1 else ""
    return f"<p class=notes><b>{escape(words)}</b></p>{drawn}"


def _faults(stages: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"{stage['name']}: {fault['item']}: {fault['reason']}"
        for stage in stages
        for fault in stage.get("items", {}).get("faults", ())
    ]
    read = sum(stage.get("items", {}).get("read", 0) for stage in stages)
    told = f"<p class=notes>{read} items were read, {len(lines)} could not be.</p>{_list(lines)}"
    unasked = next((s["unasked"] for s in reversed(stages) if s.get("unasked") is not None), ())
    if unasked:
        told += f"<p class=notes>{len(unasked)} held-out problems could not be asked, and count as "
        told += f"answered with nothing.</p>{_list(unasked)}"
    return told


def _list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul class=notes>{items}</ul>" if items else ""


def _gallery(entries: Sequence[Mapping[str, Any]]) -> str:
    """What was shown, and what was said about it after each stage."""
    cards = []
    for entry in entries:
        if not all(map(ITEM.fullmatch, entry["items"])):
            raise RunError(
                "results.json: gallery: an item is no picture or sound of a report",
                fix="run the pipeline again",
            )
        said = "".join(
            f"<div><dt>{escape(stage)}</dt><dd>{escape(reply)}</dd></div>"
            for stage, reply in entry["replies"].items()
        )
        cards.append(
            f"<figure><figcaption>{escape(entry['family'])}: {escape(entry['question'])}"
            f" <b>{escape(entry['gold'])}</b></figcaption>{''.join(entry['items'])}"
            f'<dl class="facts">{said}</dl></figure>'
        )
    return f"<div class=grid>{''.join(cards)}</div>" if cards else ""


def _share(cell: Mapping[str, Any] | None) -> str:
    return NOT_MEASURED if cell is None else f"{100 * cell['value']:.1f} %"


def _picture(pixels_HWC: NDArray[Any]) -> str:
    return f'<img alt="what was shown" src="{_png(pixels_HWC)}">'


def _sound(samples: NDArray[Any]) -> str:
    """The waveform, and under it the log-mel energies, low bands at the bottom."""
    features_TF = audio_clip(samples, where="the clip").features_TF
    scaled = (features_TF - features_TF.min()) / max(float(np.ptp(features_TF)), 1e-6)
    mel = (255 * (1 - scaled.T[::-1])).astype(np.uint8)
    label = f"{len(samples) / RATE_HZ:.1f} s of sound"
    return f'{_wave(samples, label)}<img alt="its spectrogram" src="{_png(mel)}">'


def _wave(samples: NDArray[Any], label: str) -> str:
    parts = np.array_split(samples, min(WAVE_POINTS, len(samples)))
    loudest = max(float(np.abs(samples).max()), 1e-6)
    lines = "".join(
        f"M{x} {50 - 45 * float(part.max()) / loudest:.1f}V"
        f"{50 - 45 * float(part.min()) / loudest:.1f}"
        for x, part in enumerate(parts)
    )
    return (
        f'<svg viewBox="0 0 {len(parts)} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}" style="height:3rem"><path d="{lines}" stroke="var(--s0)" '
        'fill="none"/></svg>'
    )


def _png(pixels: NDArray[Any]) -> str:
    """A data URI."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "synth") from error
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
