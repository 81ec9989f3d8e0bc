"""Put a report together as one HTML file that needs nothing else: no network, no scripts."""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from dejavu.measure.render import format_seconds
from dejavu.measure.report.charts import comparison_figures, run_figures
from dejavu.measure.report.compare import Group, group_runs
from dejavu.measure.report.figures import Figure, css_variables, to_svg
from dejavu.measure.report.runs import Run
from dejavu.measure.report.tables import TextTable, comparison_table, run_tables
from dejavu.measure.report.words import changed_options, failure_sentence, sentences

STYLE = """
:root{--page:#fff;--panel:#f5f6f8;--faint:#5c636e;--ok:#2c8a4b;--bad:#c23b42}
@media(prefers-color-scheme:dark){:root{--page:#16181c;--panel:#1f2227;--faint:#a0a7b2;--ok:#6cc88c;--bad:#ff8a8f}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1100px;padding:1.2rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 .2rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .6rem}
p{margin:.4rem 0}.faint{color:var(--faint);font-size:.9rem;overflow-wrap:anywhere}
.badge{display:inline-block;padding:0 .6rem;border-radius:1rem;font-size:.85rem;border:1px solid currentColor}
.ok{color:var(--ok)}.error,.unfinished{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.6rem;margin:1rem 0}
.tile{background:var(--panel);border-radius:.5rem;padding:.6rem .8rem}.tile b{display:block;font-size:1.15rem}
.tile span{color:var(--faint);font-size:.85rem}
figure{margin:1.2rem 0}figcaption{font-weight:600;margin-bottom:.2rem}
svg,figure img{width:100%;height:auto;display:block}.narrow{display:none}
figure img{background:#fff;border-radius:.4rem}
.scroll{overflow-x:auto}
:focus-visible{outline:2px solid var(--s0)}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .9rem .25rem 0;text-align:left;border-bottom:1px solid var(--grid);vertical-align:top}
th{color:var(--faint);font-weight:500}.number{text-align:right;white-space:nowrap}
th.number{white-space:normal}td:first-child:not(.number){min-width:7.5rem}
details{margin:1rem 0}summary{cursor:pointer}pre{overflow-x:auto;background:var(--panel);padding:.8rem;font-size:.85rem}
li{margin:.3rem 0}a{color:var(--s0)}
@media(max-width:640px){.wide{display:none}.narrow{display:block}body{padding:.8rem}}
"""
NUMBER = re.compile(r"-|-?[0-9.]+( ?(%|B|[KMGT]iB|s|ms|µs))?|[-0-9.]+( ± [0-9.]+)?( \([-0-9.]+( ± [0-9.]+)? x\))?")
LOST = "A process that dies takes along what it noted in its last half second: plots and tables lack that."
TILES = ("requests", "throughput", "time to first token", "time per later token", "idle by stage")


def run_page(run: Run) -> str:
    """Give the page of one run."""
    parts = [heading(run), *(f"<p>{escape(line)}</p>" for line in run_sentences(run))]
    parts += [f"<p>{escape(line)}</p>" for line in reservations(run)]
    tables = run_tables(run)
    parts += [tiles(table) for table in tables if table.title == "Summary"]
    if run.failures:
        items = "".join(f"<li>{escape(failure_sentence(row))}</li>" for row in run.failures)
        parts.append(f"<h2>Failures</h2><ol>{items}</ol><p class='faint'>{LOST}</p>")
    parts += [figure_html(figure) for figure in run_figures(run)]
    parts += [picture_html(path) for path in run.pictures]
    parts += [table_html(table) for table in tables]
    return page(run.name, [*parts, options_html(run)])


def run_sentences(run: Run) -> list[str]:
    """Say in words what was run; nothing where the run ended before it wrote that."""
    return sentences(run.config, run.description) if run.description else []


def reservations(run: Run) -> list[str]:
    """Say in words what a page does not show."""
    said = []
    if run.is_cut_off:
        how = "was cut off" if run.result else "goes on still, or was killed"
        until = f", the last until {run.steps[-1].end_s:.1f} s" if run.steps else ""
        said.append(
            f"This run {how}: all below is what it had recorded so far, {len(run.requests)} requests that had ended "
            f"and {run.num_steps} passes{until}. The memory for KV and the ranks' processor time are known at the end."
        )
    if run.num_steps > len(run.steps):
        said.append(f"Plots and transfers show the newest {len(run.steps)} of {run.num_steps} passes.")
    return said


def comparison_page(runs: Sequence[Run]) -> str:
    """Give the page of several runs side by side; the first configuration is what the others are compared with."""
    groups = group_runs(runs)
    title = f"{len(runs)} runs side by side" + (f" in {len(groups)} configurations" if len(groups) < len(runs) else "")
    note = "Ratios are to the first column; ± is half of a 95 % confidence interval over repeats, where there are any."
    parts = [f"<h1>{title}</h1>", f'<p class="faint">{note}</p>', table_html(comparison_table(groups))]
    parts += [figure_html(figure) for figure in comparison_figures(first_runs(groups))]
    for group in groups:
        parts.append(f"<h2>{escape(group.label)}</h2>")
        parts += [f"<p>{escape(line)}</p>" for line in run_sentences(group.runs[0])]
        parts += [f'<p class="faint">{escape(origin(run))}</p>' for run in group.runs]
    return page(title, parts)


def first_runs(groups: Sequence[Group]) -> dict[str, Run]:
    """Give the run that stands for each group in plots."""
    return {group.label: group.runs[0] for group in groups}


def heading(run: Run) -> str:
    """Name the run, how it ended, and where it came from."""
    badge = f'<span class="badge {escape(run.outcome)}">{escape(run.outcome)}</span>'
    error = f'<p class="error">{escape(str(run.result["error"]))}{progress(run)}</p>' if run.result.get("error") else ""
    return f'<h1>{escape(run.name)} {badge}</h1><p class="faint">{escape(origin(run))}</p>{error}'


def progress(run: Run) -> str:
    """Say how far a run was that did not come to its end."""
    status = run.status
    if "requests_done" not in status:
        return ", before anything was served"
    done = f"{status['requests_done']} of {status['requests_total']} requests were done"
    return f", after {format_seconds(status['elapsed_s'])}: {done}, {status['tokens_out']} tokens had been given out"


def origin(run: Run) -> str:
    """Say when, on what and with which commit a run was made."""
    commit = f"commit {run.commit}" if run.commit else ""
    machine = run.machine if run.description else ""
    return " · ".join(part for part in (run.name, run.started, machine, commit) if part)


def tiles(table: TextTable) -> str:
    """Show the numbers that people look for first."""
    cells = {row[0]: row[1] for row in table.rows}
    shown = [(name, cells[name]) for name in TILES if name in cells]
    return f'<div class="tiles">{"".join(tile(name, value) for name, value in shown)}</div>'


def tile(name: str, value: str) -> str:
    """Show one number, and what belongs to a median below it."""
    value, _, rest = value.partition(", ") if " median, " in value else (value, "", "")
    below = f"<span>{escape(rest)}</span>" if rest else ""
    return f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>{below}</div>'


def figure_html(figure: Figure) -> str:
    """Show a plot, drawn for wide and for narrow pages."""
    pictures = "".join(to_svg(figure, layout) for layout in ("wide", "narrow"))
    return f"<figure><figcaption>{escape(figure.title)}</figcaption>{pictures}</figure>"


def picture_html(path: Path) -> str:
    """Show a picture file, held in the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></figure>'


def table_html(table: TextTable) -> str:
    """Show a table; columns of numbers line up on the right."""
    numeric = [all(NUMBER.fullmatch(cell) for cell in column) for column in zip(*table.rows, strict=True)]
    heads = "".join(cell_html("th", head, is_right) for head, is_right in zip(table.heads, numeric, strict=True))
    rows = (zip(row, numeric, strict=True) for row in table.rows)
    body = "".join(f"<tr>{''.join(cell_html('td', cell, is_right) for cell, is_right in row)}</tr>" for row in rows)
    whole = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">{whole}</div>'
    note = f'<p class="faint">{escape(table.note)}</p>' if table.note else ""
    return f"<h2>{escape(table.title)}</h2>{scroll}{note}"


def cell_html(tag: str, text: str, is_right: bool) -> str:
    """Show one cell."""
    side = ' class="number"' if is_right else ""
    return f"<{tag}{side}>{escape(text)}</{tag}>"


def options_html(run: Run) -> str:
    """List the options that were not left at their defaults, the versions and the command, folded away."""
    changed = "\n".join(f"{name}: {value}" for name, value in changed_options(run.config).items())
    versions = "\n".join(f"{name}: {value}" for name, value in dict(run.description.get("versions") or {}).items())
    command = " ".join(map(str, run.description.get("command") or []))
    text = f"{command}\n\n{changed}\n\n{versions}"
    return f"<details><summary>Command, changed options, versions</summary><pre>{escape(text)}</pre></details>"


def page(title: str, parts: Iterable[str]) -> str:
    """Wrap the parts into a document."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<style>{css_variables()}{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
