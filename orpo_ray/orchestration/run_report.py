"""`report.html` and `curves.png`: a run to look at, from its files alone; on the driver."""

import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orpo_ray import __version__
from orpo_ray.config.file import to_yaml
from orpo_ray.config.schema import ORPOConfig
from orpo_ray.orchestration.page import render_page
from orpo_ray.orchestration.run_curves import (
    CURVES,
    LEARNING,
    THROUGHPUT,
    chart_svgs,
    write_picture,
)
from orpo_ray.orchestration.run_facts import (
    HEADLINE,
    data_part,
    evaluations_until,
    events_of,
    facts,
    gaps,
    headline,
    samples_of,
    time_spent,
)
from orpo_ray.runs.files import CONFIG, FINAL, count_events, exported_step, read_metrics
from orpo_ray.runs.suspects import first_suspects
from orpo_ray.storage.bucket import address

REPORT = "report.html"
_SHOWN_EVENTS, _SHOWN_SUSPECTS = 200, 10
_PACKAGES = ("torch", "ray", "transformers")
_BODY = """<style>
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8884; }
.facts td { text-align: left; overflow-wrap: anywhere; vertical-align: top; }
.facts td:first-child { opacity: .7; white-space: nowrap; }
.figures td:last-child, .figures th:last-child { text-align: right; }
.figures th { white-space: nowrap; }
.figures .before { opacity: .7; white-space: pre; }
.figures .after { font-weight: 600; white-space: pre; }
.events td { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.samples { width: 100%; margin-bottom: 1rem; }
.samples td { text-align: left; vertical-align: top; }
.samples td { white-space: pre-wrap; overflow-wrap: anywhere; }
.samples td:first-child { opacity: .7; width: 6rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: .8rem; }
.charts figure { margin: 0; }
.charts svg { width: 100%; display: block; }
pre { background: #8882; padding: .7rem; border-radius: 6px; overflow-x: auto; }
@media (prefers-color-scheme: dark) { figure { filter: invert(.93) hue-rotate(180deg); } }
</style>
<h1>{{ title }}</h1>
<table class="facts">{% for name, text in facts %}
<tr><td>{{ name }}</td><td>{{ text }}</td></tr>{% endfor %}
</table>
{% if headline %}
<h2>Before and after</h2>
<div class="wide"><table class="figures">
<thead><tr><th>evaluation set</th><th>pairs</th>{% for name in names %}<th>{{ name }} before</th>\
<th>after</th>{% endfor %}</tr></thead>
<tbody>{% for row in headline %}
<tr><td>{{ row.name }}</td><td>{{ row.pairs }}</td>{% for before, after in row.figures %}\
<td class="before">{{ before | replace(" (", "\n(") }}</td>\
<td class="after">{{ after | replace(" (", "\n(") }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
<p>Accuracy is the share of pairs whose chosen answer is the likelier one by token; log odds and
margin are means over the pairs; NLL is in nats a token. In brackets are 95 % intervals, by drawing
prompts again.{% if steps %} The last evaluation is of
step {{ steps }}.{% endif %}</p>
{% endif %}
<h2>Curves</h2>
{% if learning %}<div class="charts">{% for svg in learning %}
<figure>{{ svg | safe }}</figure>{% endfor %}</div>
{% else %}<p>No figures yet.</p>{% endif %}
{% if gaps %}<p>Not finite, and gaps in the curves: {{ gaps }}.</p>{% endif %}
{% if throughput %}
<h2>Throughput</h2>
<div class="charts">{% for svg in throughput %}
<figure>{{ svg | safe }}</figure>{% endfor %}</div>
<div class="wide"><table class="figures"><thead><tr><th>where the time went</th><th>seconds</th>\
<th>share</th></tr></thead><tbody>{% for part, seconds, share in spent %}
<tr><td>{{ part }}</td><td>{{ seconds }}</td><td>{{ share }}</td></tr>{% endfor %}
</tbody></table></div>
<p>Of rank 0, from the first line of the metrics to the last. The rest is what lies between: workers
that start again, writing lines, waiting for other ranks outside of a step.</p>
{% endif %}
{% if samples %}
<h2>Samples</h2>
<p>The most likely answer, token by token, before training and after.</p>
{% for sample in samples %}
<div class="wide"><table class="samples"><tbody>
<tr><td>prompt</td><td>{{ sample.prompt }}</td></tr>
{% if sample.chosen is not none %}<tr><td>preferred</td><td>{{ sample.chosen }}</td></tr>{% endif %}
{% if sample.before is not none %}<tr><td>before</td><td>{{ sample.before }}</td></tr>{% endif %}
{% if sample.after is not none %}<tr><td>after</td><td>{{ sample.after }}</td></tr>{% endif %}
</tbody></table></div>
{% endfor %}
{% endif %}
<h2>Data</h2>
{% for part in parts %}
<h3>{{ part.name }}</h3>
<ul>{% for line in part.lines %}<li>{{ line }}</li>{% endfor %}</ul>
{% if part.rows %}
<div class="wide"><table class="figures"><thead><tr><th>file</th>
{% for column in part.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead><tbody>
{% for row in part.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if part.n_more %}<p>{{ part.n_more }} more files in <code>data_report.json</code>.</p>{% endif %}
{% endif %}
{% if part.refused %}
<div class="wide"><table class="figures"><thead><tr><th>refused because of</th><th>rows</th></tr>\
</thead><tbody>{% for reason, count in part.refused %}
<tr><td>{{ reason }}</td><td>{{ count }}</td></tr>{% endfor %}</tbody></table></div>
<p>Each of them is in <code>{{ part.listed }}</code>.</p>
{% endif %}
{% endfor %}
{% if suspects %}
<h3>labels</h3>
<p>These rows look labelled the wrong way round: while everything else was learned, their chosen
answer stayed the less likely one. All rows are in <code>suspects.jsonl</code>, in this order.</p>
<div class="wide"><table class="figures"><thead><tr><th>file</th><th>row</th>\
<th>margin, mean</th><th>spread</th><th>passes</th></tr></thead><tbody>{% for line in suspects %}
<tr><td>{{ line.file }}</td><td>{{ line.row }}</td><td>{{ "%.3f" | format(line.margin_mean) }}</td>\
<td>{{ "%.3f" | format(line.margin_spread) }}</td><td>{{ line.passes }}</td></tr>{% endfor %}
</tbody></table></div>
{% endif %}
<h2>On the way</h2>
{% if events %}
<p>{{ counts }}</p>
<div class="wide"><table class="events"><tbody>{% for time, text in events %}
<tr><td>{{ time }}</td><td>{{ text }}</td></tr>{% endfor %}</tbody></table></div>
{% if n_events > events | length %}<p>The last {{ events | length }} of {{ n_events }}; all are in
<code>events.jsonl</code>.</p>{% endif %}
{% else %}<p>No restart, no row left out, no alarm.</p>{% endif %}
<h2>Again</h2>
<p>From the folder where the run was started, to which paths in its config are relative:</p>
<pre>{{ command }}</pre>
<p>{% for name, version in versions %}{{ name }} {{ version }}{{ ", " if not loop.last }}\
{% endfor %}</p>
<details open><summary>The resolved config</summary><pre>{{ settings }}</pre></details>
"""


def write_run_report(
    run_directory: Path, config: ORPOConfig, data_report: Mapping[str, Any]
) -> Path:
    """Write `report.html` and `curves.png` of a run, under way or at its end.

    Args:
        run_directory: with what the run has written so far.
        config: of the run, resolved.
        data_report: what `data_report.json` holds.

    Returns:
        The path of `report.html`.
    """
    lines = read_metrics(run_directory)
    ended = exported_step(run_directory / FINAL)  # an earlier one where the best model is loaded
    shown = evaluations_until(lines, ended)
    events = events_of(run_directory)
    met = sorted(count_events(run_directory).items())
    again = (address(run_directory / CONFIG), f"run_name={run_directory.name}-again")
    page = render_page(
        _BODY,
        run_directory.name,
        facts=facts(config, data_report, lines),
        names=HEADLINE.values(),
        headline=headline(run_directory, shown, data_report),
        steps=shown[-1]["step"] if shown else 0,
        learning=chart_svgs(LEARNING, lines),
        throughput=chart_svgs(THROUGHPUT, lines),
        spent=time_spent(lines),
        samples=samples_of(run_directory, ended),
        suspects=first_suspects(run_directory, _SHOWN_SUSPECTS),
        gaps=gaps(lines),
        parts=[data_part(name, figures) for name, figures in data_report.items()],
        counts=", ".join(f"{kind.replace('_', ' ')}: {count}" for kind, count in met),
        events=events[-_SHOWN_EVENTS:],
        n_events=len(events),
        command=shlex.join(("python", "jobs/train.py", *again)),
        versions=[("orpo_ray", __version__), *((name, version(name)) for name in _PACKAGES)],
        settings=to_yaml(config),
    )
    write_picture(run_directory / CURVES, lines)
    path = run_directory / REPORT
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path
