"""The report of a run as one HTML file that stands alone: style and plots are in it, and nothing is fetched."""

from __future__ import annotations

import base64

import jinja2

from disagg_core.report.document import RunReport
from disagg_core.report.figures import figures_of
from disagg_core.report.sections import attempts_of, tables_of

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.run_id }}: {{ report.state }}</title>
<style>
:root { color-scheme: light dark; --line: #d5dbe3; --soft: #f4f6f9; --text: #1b2430; --page: #fff; --quiet: #5c6878 }
@media (prefers-color-scheme: dark) {
  :root { --line: #36404d; --soft: #1e252e; --text: #e4e9ef; --page: #14191f; --quiet: #9aa7b5 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 66rem; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.state { font-size: .8rem; padding: .2rem .6rem; border-radius: 1rem; vertical-align: middle; color: #fff;
  background: #b07400 }
.state.completed { background: #23763f } .state.failed { background: #b3261e }
.quiet { color: var(--quiet) }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem; border-bottom: 1px solid var(--line);
  white-space: pre-line }
th { background: var(--soft); font-weight: 600 }
.figures th { width: 13rem }
.figures td { overflow-wrap: anywhere }
.strong { font-weight: 600 } .alarm { font-weight: 600; color: #d03a30 }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px }
pre, li { white-space: pre-wrap; overflow-wrap: anywhere }
pre { background: var(--soft); padding: .8rem; border-radius: 4px; font-size: .85rem }
</style>
</head>
<body>
<h1>Run {{ report.run_id }} <span class="state {{ report.state }}">{{ report.state }}</span></h1>
<p class="quiet">{{ subtitle }}</p>
{% if picture %}
<img src="data:image/png;base64,{{ picture }}" alt="{{ alt }}">
{% endif %}
<h2>Figures</h2>
<div class="wide"><table class="figures">
{% for figure in figures %}
<tr><th scope="row">{{ figure.label }}</th><td class="{{ figure.weight }}">{{ figure.value }}</td></tr>
{% endfor %}
</table></div>
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="wide"><table>
<tr>{% for cell in table.head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% if attempts %}
<h2>Attempts</h2>
<ol>{% for end in attempts %}<li>{{ end }}</li>{% endfor %}</ol>
{% endif %}
<h2>Run document</h2>
<details><summary>The document with every default filled in</summary>
<pre>{{ document }}</pre>
</details>
</body>
</html>
"""
_PICTURE = "Loss or promised accept length over optimizer steps, and accept lengths that were measured"


def to_html(report: RunReport, *, subtitle: str, document: str, picture: bytes | None = None) -> str:
    """Return the report as a page of HTML.

    Args:
        report: what is shown.
        subtitle: what was trained for which target, in words.
        document: the resolved run document, as text.
        picture: the plots as PNG.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_PAGE).render(
        report=report,
        subtitle=subtitle,
        document=document,
        picture=base64.b64encode(picture).decode() if picture is not None else None,
        alt=_PICTURE,
        figures=figures_of(report),
        tables=tables_of(report),
        attempts=attempts_of(report),
    )
