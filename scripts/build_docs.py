"""Write the generated parts of the documentation: tables and pictures from measured results.

    python scripts/build_docs.py [--check]

Whatever stands between `<!-- NAME -->` and `<!-- /NAME -->` in a page is made here; `--check` fails
if a page would change.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import typer.main
from typer.core import TyperGroup

from phikit.cli.app import VERBS, app
from phikit.cli.settings import leaves
from phikit.evals.plots import chart
from phikit.models.catalogue import CHECKPOINTS, Checkpoint
from phikit.models.registry import FAMILIES, active_parameter_count, family_of, parameter_count
from phikit.recipes import PIPELINES
from phikit.serve.limits import Limits

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is there, its project is not
from benchmarks.moe import markdown as moe_table  # noqa: E402
from benchmarks.multimodal import markdown as multimodal_table  # noqa: E402
from benchmarks.retrieval import markdown as retrieval_table  # noqa: E402
from benchmarks.seeds import senses_markdown, spread, variants_markdown  # noqa: E402
from experiments.grin.page import page as grin_page  # noqa: E402
from experiments.grin.page import write_pages  # noqa: E402

RESULTS = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"


def main() -> None:
    """Renew every page that has generated parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if one is due")
    check = parser.parse_args().check
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        renewed = renew(text)
        if renewed != text:
            stale.append(page)
            if not check:
                page.write_text(renewed, encoding="utf-8")
    grin = ROOT / "docs" / "claims" / "grin.md"
    if not grin.exists() or grin.read_text(encoding="utf-8") != grin_page(RESULTS / "grin"):
        stale.append(grin)
    if check and stale:
        raise SystemExit(f"out of date: {', '.join(map(str, stale))}; run `make docs`")
    if not check:
        draw()
        write_pages(ROOT / "docs")


def renew(text: str) -> str:
    """The page with every generated part made anew."""
    for name, make in PARTS.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(text):
            made = make()
            text = pattern.sub(lambda match, made=made: match[1] + made + match[2], text)
    return text


def results(name: str) -> dict[str, Any]:
    """What was measured and stored under a name; empty before that."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def unmeasured(name: str) -> str:
    """What stands in place of figures that nobody has measured."""
    command = f"seeds {name}" if name in PIPELINES else name
    return f"Not measured yet; `python -m benchmarks.{command}` does.\n"


def measured(name: str, write: Callable[[dict[str, Any]], str]) -> str:
    """Stored results as their benchmark writes them."""
    found = results(name)
    return write(found) if found else unmeasured(name)


def stage_table(pipeline: str) -> str:
    """Every stage over the seeds: means, spread between seeds, paired differences of each seed."""
    runs = results(pipeline).get("runs")
    if runs is None:
        return unmeasured(pipeline)
    lines = [
        "| Stage | Seconds | Tokens trained | Accuracy, greedy | pass@1, T = 0.6 | Length "
        "| Paired change of each seed, greedy, 95 % interval | The same at T = 0.6 |",
        "|:--|--:|--:|--:|--:|--:|:--|:--|",
    ]
    for stages in zip(*(run["stages"] for run in runs), strict=True):
        cells = [
            stages[0]["name"],
            f"{stages[0]['seconds']:.0f}",
            f"{fmean(s['tokens'] for s in stages) / 1e6:.2f} M",
            spread([s["accuracy"] for s in stages]),
            spread([s["pass_at_1_t06"] for s in stages]),
            f"{fmean(s['mean_tokens'] for s in stages):.0f}",
            "<br>".join(change(s["paired"]) for s in stages if s["paired"]) or "–",
            "<br>".join(change(s["paired_t06"]) for s in stages if s["paired_t06"]) or "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    walls = [run["wall_seconds"] for run in runs if run["wall_seconds"]]
    problems = runs[0]["stages"][0]["n"]
    errors = [100 * s["stderr"] for run in runs for s in run["stages"][1:]]
    seeds = "One seed." if len(runs) == 1 else f"Mean ± standard deviation over {len(runs)} seeds."
    return "\n".join(
        [
            *lines,
            "",
            seeds + f" {problems} held-out problems of 2 to 5 calculations, the same for all. One "
            f"seed's standard error over problems is at most {max(errors):.1f} points. Seconds are "
            f"those of the first seed, whose run took {walls[0] / 60:.1f} minutes without set-up.",
            "",
        ]
    )


def change(paired: dict[str, Any]) -> str:
    """One seed's paired difference, in points; says when it is within noise."""
    delta, low, high = (100 * paired[key] for key in ("delta", "low", "high"))
    noise = " (within noise)" if low <= 0 <= high else ""
    return f"{delta:+.1f} [{low:+.1f}, {high:+.1f}]{noise}".replace("-", "−")


def recipe_table() -> str:
    """All recipes with the first line of their docstrings."""
    lines = ["| Recipe | What it makes | Stages |", "|:--|:--|:--|"]
    for name, recipe in PIPELINES.items():
        stages = " → ".join(stage.name for stage in recipe().stages)
        first = (recipe.__doc__ or "").strip().splitlines()[0]
        lines.append(f"| `{name}` | {first} | {stages} |")
    return "\n".join(lines) + "\n"


def command_reference() -> str:
    """Every command: its line, what it does, its options."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return "\n".join(command_section(name, command) for name, command in group.commands.items())


def command_section(name: str, command: Any) -> str:
    """One command of the table of verbs."""
    options = [p for p in command.params if p.param_type_name == "option"]
    arguments = [p for p in command.params if p not in options]
    line = [name, *(p.metavar if p.required else f"[{p.metavar}]" for p in arguments)]
    example = ["```sh", VERBS[name].example, "```"]
    lines = [f"## phikit {' '.join(line)}", "", command.help, "", *example, ""]
    if options:
        lines += ["| option | what |", "|:--|:--|"]
    for p in options:
        words = p.opts[0] if p.is_flag else f"{p.opts[0]} {p.metavar}"
        default = "" if p.default in (None, False) else f" Default: {p.default}."
        lines.append(f"| `{words}` | {p.help}{default} |")
    return "\n".join([*lines, ""]) if options else "\n".join(lines)


def limits_table() -> str:
    """The bounds of `phikit serve`."""
    lines = ["| limit | default | what |", "|:--|--:|:--|"]
    for name, field in Limits.model_fields.items():
        lines.append(
            f"| `{name}` | {field.default} | {' '.join((field.description or '').split())} |"
        )
    return "\n".join(lines) + "\n"


def family_table() -> str:
    """Every family of the registry, with what `benchmarks/parity.py` measured."""
    measured = results("parity") or {"families": {}}
    lines = [
        "| `model_type` | Code | Logits | Gradients | Greedy tokens | Saved, read there "
        "| GGUF | Adapter, read by peft |",
        "|:--|:--|--:|--:|:--|--:|--:|--:|",
    ]
    for family in FAMILIES:
        module = family.config.__module__.rpartition(".")[2]
        code = f"[{module}.py](../src/phikit/models/{module}.py)"
        for model_type in family.model_types:
            found = measured["families"].get(model_type)
            cells = [f"`{model_type}`", code, *parity_cells(found)]
            lines.append("| " + " | ".join(cells) + " |")
    packages = ", ".join(
        f"{name} {number}" for name, number in measured.get("packages", {}).items()
    )
    return "\n".join([*lines, "", f"Measured with {packages or 'nothing yet'}.", ""])


def parity_cells(found: dict[str, Any] | None) -> list[str]:
    """The figures of one family; a dash where there is nothing to compare with."""
    if found is None:
        return ["–"] * 6
    greedy = "the same" if found["greedy"] else "differ"
    keys = ("logits", "gradients", "greedy", "saved", "gguf", "adapter")
    shown = {key: "–" if found[key] is None else f"{found[key]:.1g}" for key in keys}
    return [{**shown, "greedy": greedy}[key] for key in keys]


def checkpoint_table() -> str:
    """The catalogue, with parameters counted on the meta device."""
    lines = [
        "| Checkpoint | Family | Layers x width | Parameters | Context | Note |",
        "|:--|:--|--:|--:|--:|:--|",
    ]
    for checkpoint in CHECKPOINTS:
        config = checkpoint.config
        module = family_of(config).config.__module__.rpartition(".")[2]
        cells = [
            f"`{checkpoint.hub_id}`",
            module,
            f"{config.num_layers} x {config.d_model}",
            parameters(checkpoint),
            f"{config.max_context:,}".replace(",", " "),
            checkpoint.note,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parameters(checkpoint: Checkpoint) -> str:
    """Counted parameters in 10^9; those of one token too, if they are fewer."""
    total, active = parameter_count(checkpoint.config), active_parameter_count(checkpoint.config)
    words = f", {active / 1e9:.3g} B active" if active < total else ""
    return f"{total / 1e9:.4g} B{words}"


def settings_tables() -> str:
    """The settings of the three lines side by side, a table for each stage."""
    names = ("nano_reasoner", "smol_reasoner", "phi4_mini_reasoning")
    columns = [dict(leaves(PIPELINES[name]().model_dump(mode="json"))) for name in names]
    tables: dict[str, list[str]] = {}
    for path in dict.fromkeys(path for column in columns for path in column):
        parts = path.split(".")
        cut = 2 if parts[0] == "stages" else 1 if len(parts) > 1 else 0
        if parts[-1] in ("kind", "name") and cut:
            continue
        cells = [cell(column[path]) if path in column else "–" for column in columns]
        row = " | ".join([f"`{'.'.join(parts[cut:])}`", *cells])
        tables.setdefault(".".join(parts[:cut]) or "pipeline", []).append(f"| {row} |")
    lines = []
    for title, rows in tables.items():
        heads = " | ".join(names)
        lines += [f"### {title}", "", f"| setting | {heads} |", "|:--|--:|--:|--:|", *rows, ""]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A setting's value, long lists by their length."""
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} numbers"
    return "null" if value is None else str(value).replace("|", "\\|")


def draw() -> None:
    """The pictures of README, in both colour schemes, from the first seed."""
    first = {"stages": results("nano_reasoner")["runs"][0]["stages"]}
    IMAGES.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        chart(first, IMAGES / f"nano_reasoner-{scheme}.svg", dark=scheme == "dark")


def training_benchmark() -> str:
    """What `benchmarks/train.py` measured: medians over rounds that took turns."""
    record = results("benchmark_train")
    lines = [
        "| | | phikit | TRL, fastest variant | ratio of medians | in rounds | peak memory, MiB |",
        "|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for kind, unit in (("sft", "tokens / s"), ("grpo", "steps / hour")):
        for dtype, row in record[kind]["rows"].items():
            medians = [f"{median(side['rates']):,.0f}" for side in row["sides"]]
            low, high = row["ratios_of_rounds"]
            peaks = " against ".join(f"{s['peak_bytes'] / 2**20:,.0f}" for s in row["sides"])
            cells = [f"{kind.upper()}, {unit}", dtype, *medians, f"{row['ratio_of_medians']:.2f}"]
            lines.append("| " + " | ".join([*cells, f"{low:.2f}–{high:.2f}", peaks]) + " |")
    machine, rounds = record["machine"], len(row["sides"][0]["rates"])
    packages = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "trl"))
    return "\n".join([*lines, "", f"{rounds} rounds, {record['threads']} threads, {packages}.", ""])


def quantisation_table() -> str:
    """What `benchmarks/quantise.py` measured: every way of quantising beside the original."""
    record = results("quantisation")
    if not record:
        return unmeasured("quantise")
    lines = [
        "| Bits | Method | Bits of embeddings and head | Megabytes | Perplexity | KL a token, nats "
        "| The same on other text | Same likeliest token | Accuracy | CPU seconds |",
        "|--:|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    runs = record["runs"]
    before = runs[0]["text"]["original_perplexity"]
    solved = share(runs[0]["task"]["original"])
    cells = ["32", "–", "32", f"{runs[0]['bytes'][0] / 1e6:.0f}", f"{before:.2f}", "0", "0", "all"]
    lines.append("| " + " | ".join([*cells, solved, "–"]) + " |")
    for run in runs:
        config, text, other = run["quantisation"], run["text"], run["other_text"]
        agreement, divergences = text["agreement"], (text["divergence"], other["divergence"])
        cells = [
            str(config["bits"]),
            config["method"],
            str(config["embedding_bits"]),
            f"{run['bytes'][1] / 1e6:.0f}",
            f"{text['changed_perplexity']:.2f}",
            *(f"{found['mean']:.4f} ± {found['stderr']:.4f}" for found in divergences),
            f"{100 * agreement['mean']:.1f} ± {100 * agreement['stderr']:.1f} %",
            share(run["task"]["changed"]),
            f"{run['cpu_seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    note = (
        f"{runs[0]['text']['tokens']:,} tokens of held-out text, "
        f"{runs[0]['task']['original']['n']} problems; ± is the standard error, over rows of text "
        f"and over problems. The other text has {runs[0]['other_text']['tokens']:,} tokens. Groups "
        f"of {runs[0]['quantisation']['group']}; threads: {record['threads']}."
    )
    return "\n".join([*lines, "", note, ""])


def share(summary: dict[str, Any]) -> str:
    """An accuracy with its standard error, in percent."""
    return f"{100 * summary['accuracy']:.1f} ± {100 * summary['stderr']:.1f} %"


def full_size() -> str:
    """What `benchmarks/full_size.py` measured, medians over rounds."""
    rounds = results("full_size")["rounds"]
    names = {
        "load_seconds": "load, seconds",
        "peak_gb": "peak memory after loading, GB",
        "peak_over_bound": "the same, share of 1.15 x weights + 300 MB",
        "tokens_per_s": "tokens / s",
    }
    lines = ["| | phikit | transformers |", "|:--|--:|--:|"]
    for key, name in names.items():
        sides = [[row[side][key] for row in rounds] for side in ("phikit", "transformers")]
        lines.append(f"| {name} | " + " | ".join(f"{median(side):.2f}" for side in sides) + " |")
    same = all(row["phikit"]["tokens"] == row["transformers"]["tokens"] for row in rounds)
    agreement = "All greedy tokens agree." if same else "Greedy tokens differ."
    return "\n".join([*lines, "", f"Medians of {len(rounds)} rounds. {agreement}", ""])


def decoding_benchmark() -> str:
    """What `benchmarks/decode.py` measured on SmolLM2: a table of sides, and one of targets."""
    record = results("decode").get("smollm2")
    if record is None:
        return unmeasured("decode")
    sides = [
        "| | side | tokens / s, median | lowest–highest | peak memory, MiB |",
        "|:--|:--|--:|--:|--:|",
    ]
    targets = [
        "| | phikit | beside | ratio of medians | in rounds | wanted |",
        "|:--|:--|:--|--:|--:|--:|",
    ]
    for name, row in record["comparisons"].items():
        for number, side in enumerate(row["sides"]):
            rates = side["rates"]
            middle, low, high = (
                f"{value:,.0f}" for value in (median(rates), min(rates), max(rates))
            )
            cells = ["" if number else name, side["name"], middle, f"{low}–{high}"]
            sides.append("| " + " | ".join([*cells, f"{side['peak_bytes'] / 2**20:,.0f}"]) + " |")
        sides += [f"| | {failed} | could not run | | |" for failed in row["could_not_run"]]
        targets += [target_row(name, target) for target in row["targets"]]
    machine = record["machine"]
    packages = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers"))
    words = f"{len(rates)} rounds, {record['threads']} threads, {packages}; "
    words += f"llama.cpp of {record['llama_cpp']}."
    return "\n".join([*targets, "", *sides, "", words, ""])


def target_row(name: str, target: dict[str, Any]) -> str:
    """One ratio and what was wanted of it."""
    cells = [name, target["ours"].removeprefix("phikit "), target["peer"]]
    if target["ratio"] is None:
        cells += ["could not run", ""]
    else:
        low, high = target["ratios_of_rounds"]
        cells += [f"{target['ratio']:.2f}", f"{low:.2f}–{high:.2f}"]
    return "| " + " | ".join([*cells, f"{target['factor']}"]) + " |"


def geometry_benchmark() -> str:
    """What `benchmarks/decode.py --geometry phi4-mini` measured."""
    record = results("decode").get("geometry")
    if record is None:
        return unmeasured("decode --geometry phi4-mini")
    lines = [
        "| | tokens / s | GB read for a token | share of memory's speed | in rounds | wanted "
        "| peak memory, GB |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for side in record["sides"]:
        low, high = (100 * bound(side["shares_of_rounds"]) for bound in (min, max))
        cells = [
            side["name"],
            f"{median(side['rates']):.2f}",
            f"{side['facts']['bytes_per_token'] / 1e9:.2f}",
            f"{100 * side['share']:.0f} %",
            f"{low:.0f}–{high:.0f} %",
            f"{100 * side['wanted']:.0f} %",
            f"{side['peak_bytes'] / 1e9:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    speeds = [speed / 1e9 for speed in record["memory_bytes_per_s"]]
    words = f"Memory was read at {median(speeds):.1f} GB / s ({min(speeds):.1f}–{max(speeds):.1f}) "
    words += f"in the same {len(speeds)} rounds, with {record['threads']} threads."
    return "\n".join([*lines, "", words, ""])


def rollout_benchmark() -> str:
    """What `benchmarks/rollout.py` measured."""
    record = results("rollout")
    if not record:
        return unmeasured("rollout")
    row = record["row"]
    lines = [
        "| | tokens / s, median | lowest–highest | drawing tokens | peak memory, MiB |",
        "|:--|--:|--:|--:|--:|",
    ]
    for side, share in zip(row["sides"], row["sampler_shares"], strict=True):
        rates = side["rates"]
        cells = [side["name"], f"{median(rates):,.0f}", f"{min(rates):,.0f}–{max(rates):,.0f}"]
        cells += [f"{100 * share:.1f} % of the time", f"{side['peak_bytes'] / 2**20:,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    low, high = row["ratios_of_rounds"]
    words = f"Ratio of medians {row['ratio_of_medians']:.2f}, in rounds {low:.2f}–{high:.2f}; "
    words += f"wanted {record['target']}. {len(rates)} rounds, {record['threads']} threads."
    return "\n".join([*lines, "", words, ""])


def router_table() -> str:
    """What `benchmarks/router.py` measured: every signal at its threshold from validation."""
    record = results("router")
    if not record:
        return unmeasured("router")
    lines = [
        "| Signal | Threshold | To the cloud | Accuracy | Of the gap, 95 % interval "
        "| The local model alone | The cloud alone |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for signal, row in record["signals"].items():
        kept, low, high = (100 * row[key] for key in ("kept", "kept_low", "kept_high"))
        cells = [
            f"**{signal}**" if signal == record["chosen"] else signal,
            f"{row['threshold']:.3g}".replace("-", "−"),
            f"{100 * row['share']:.1f} %",
            share(row),
            f"{kept:.0f} % [{low:.0f}, {high:.0f}]",
            *(f"{100 * row[side]['mean']:.1f} %" for side in ("local", "cloud")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    problems, target = row["problems"], record["target"]
    words = f"{problems} test problems. Wanted: at most {100 * target['share']:.0f} % of the calls "
    words += f"and at least {100 * target['kept']:.0f} % of the gap, with the signal that was best "
    words += f"on {row['validation']['n']} others (bold): {'met' if record['met'] else 'missed'}."
    return "\n".join([*lines, "", words, ""])


PARTS: dict[str, Callable[[], str]] = {
    "nano_reasoner results": lambda: stage_table("nano_reasoner"),
    "smol_reasoner results": lambda: stage_table("smol_reasoner"),
    "see_and_hear results": lambda: measured("see_and_hear", senses_markdown),
    "see_and_hear variants": lambda: measured("see_and_hear", variants_markdown),
    "retrieval results": lambda: measured("retrieval", retrieval_table),
    "hear_recordings results": lambda: measured("hear_recordings", senses_markdown),
    "hear_recordings variants": lambda: measured("hear_recordings", variants_markdown),
    "multimodal benchmark": lambda: measured("multimodal", multimodal_table),
    "recipes": recipe_table,
    "commands": command_reference,
    "settings": settings_tables,
    "families": family_table,
    "checkpoints": checkpoint_table,
    "training benchmark": training_benchmark,
    "full size": full_size,
    "quantisation": quantisation_table,
    "decoding benchmark": decoding_benchmark,
    "geometry benchmark": geometry_benchmark,
    "rollout benchmark": rollout_benchmark,
    "moe benchmark": lambda: moe_table(RESULTS / "moe.json"),
    "router": router_table,
    "limits": limits_table,
}

if __name__ == "__main__":
    main()
