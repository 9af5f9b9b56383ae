"""The model card of a bundle: its README.md, in the format of the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import DictLoader, Environment, StrictUndefined

from bertray.bundle.info import EVENTS_FOLDER, BundleInfo
from bertray.cli import printable
from bertray.storage.outputs import PAGE_FILE
from bertray.tasks.task import TASKS

_CARD = """\
---
library_name: transformers
pipeline_tag: text-classification
---
# {% include "title" %}

{{ encoder | code }}{% if encoder_commit %} at commit {{ encoder_commit | code }}{% endif %}, \
{% if origin == "adopted" -%}
fine-tuned by others, adopted with bertray {{ versions.bertray }}: its own card says on what. \
{% if data_fingerprint is none -%}
It was not measured. Missing are its scores on validation rows, a temperature, thresholds (if a row \
may have several labels), the score below which a person should look, and the profile that the gate compares a run \
with: it compares nights only. `bertray adopt --data DATASET` adds them.
{%- else -%}
All figures below are of the validation rows of {{ training.data | code }} (data fingerprint \
`{{ data_fingerprint[:16] }}`). If the model was trained on some of them, they are too good.
{%- endif %}
{%- else -%}
fine-tuned with bertray {{ versions.bertray }} on {{ training.data | code }}
(data fingerprint `{{ data_fingerprint[:16] }}`).
{%- endif %}

{% include "labels" %}

{% if stride is none -%}
Texts are cut to {{ max_length }} tokens.
{%- else -%}
Texts of more than {{ max_length }} tokens are read in windows of {{ max_length }} that overlap by {{ stride }} or \
more; a text's logits are the {{ long_documents }} of its windows'.
{%- endif %}
{%- if history %} Epoch {{ metrics.epoch | int }} of {{ training.epochs }} is kept: \
{{ "the last one" if training.keep == "last" else "the best " ~ best ~ " on validation" }}.
{%- endif %}
{% include "answers" ignore missing %}
{%- if calibration and calibration.nll_gain_z >= 1.96 %}
Logits are calibrated: they are divided by a temperature of {{ "%.3f" | format(temperature) }}, in the weights. On \
validation the negative log-likelihood was {{ "%.4f" | format(calibration.nll_before) }} before and is \
{{ "%.4f" | format(calibration.nll_after) }} now; the expected calibration error, which varies more, was \
{{ "%.4f" | format(calibration.ece_before) }} and is {{ "%.4f" | format(calibration.ece_after) }}.
{% endif %}
{%- if review_below is not none %}
{% if review_below > 1 -%}
Every text is to be reviewed by a person{% if target_precision is not none %}: no score is right often enough on \
validation for {{ target_precision }}{% endif %}.
{%- else -%}
A text with a score below {{ "%.4f" | format(review_below) }} is to be reviewed by a person\
{% if target_precision is not none %}: of the others, {{ target_precision }} or more are right (by validation, with \
95 % confidence){% endif %}.
{%- endif %}
{% endif %}
{%- include "table" ignore missing %}
{%- if metrics %}
| validation | value |
|---|---|
{% for name, value in metrics.items() if name != "epoch" -%}
| {{ name }} | {{ "%.4f" | format(value) }} |
{% endfor %}
{%- endif %}
{%- if history %}
| epoch | train loss | validation loss | {{ names.values() | join(" | ") }} | seconds |
|---|---|---|{{ "---|" * names | length }}---|
{% for epoch in history -%}
| {{ epoch.epoch | int }} | {{ "%.4f" | format(epoch.train_loss) }} | {{ "%.4f" | format(epoch.loss) }} \
| {% for name in names %}{{ "%.4f" | format(epoch[name]) }} | {% endfor %}{{ "%.0f" | format(epoch.wall_s) }} |
{% endfor %}
{%- endif %}
{%- if page_file %}
How training went: [{{ page_file }}]({{ page_file }}).
{% endif %}
{%- if events_folder %}
Steps: `tensorboard --logdir PATH OF THIS FOLDER/{{ events_folder }}` ([event file]({{ events_folder }})).
{% endif %}
```python
from transformers import pipeline
pipeline("text-classification", model="PATH OF THIS FOLDER", truncation=True\
{% include "options" ignore missing %})("a text")
```
{% if stride is not none %}
That pipeline reads the first {{ max_length }} tokens; `bertray` reads all, as above.
{% endif %}
{% if history -%}
Training: {% for name in ("learning_rate", "batch_size", "weight_decay", "warmup_fraction", "precision", "seed") -%}
{{ name }} {{ training[name] }}{{ ", " if not loop.last else "" }}{% endfor %}.
{% endif -%}
Versions: {% for name, value in versions.items() -%}
{{ name }} {{ value }}{{ ", " if not loop.last else "" }}{% endfor %}.
"""


def _code(value: object) -> str:
    """Any text as code of Markdown, in one line: neither markup nor HTML in it has an effect."""
    text = printable(" ".join(str(value).split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    blank = " " if "`" in text else ""
    return f"{fence}{blank}{text}{blank}{fence}"


def model_card(info: BundleInfo, folder: Path) -> str:
    """The bundle's README.md; it names the page and the event files if the folder has them."""
    task = TASKS[info.problem_type]
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)  # noqa: S701
    environment.loader = DictLoader(task.card)
    environment.filters["code"] = _code
    card: str = environment.from_string(_CARD).render(
        info.model_dump(),
        classes=task.answers(info)["labels"],
        best=task.metric_names[task.best_metric],
        names={name: words for name, words in task.metric_names.items() if name in info.metrics},
        page_file=PAGE_FILE if (folder / PAGE_FILE).is_file() else None,
        events_folder=EVENTS_FOLDER if (folder / EVENTS_FOLDER).is_dir() else None,
    )
    return card
