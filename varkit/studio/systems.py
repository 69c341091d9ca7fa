"""The catalogue as a page: every system with its claims, what was measured here, and pictures of its experiment.

A list of HTML disclosures: it opens with the keyboard, fits a phone, and its pictures load when it is opened.
"""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from varkit.catalog.places import experiments_folder
from varkit.catalog.registry import records, systems
from varkit.catalog.standing import STATES, Standing, standing
from varkit.catalog.system import System
from varkit.catalog.vocabulary import FAMILIES, TASKS

ANY = "any"
PICTURES = "pictures"
"""Where the pictures of experiments are found, below the page's own address."""


def picture_of(name: str) -> Path | None:
    """The picture that a system's experiment left, if there is one. Any text may be asked for."""
    if name not in records():
        return None
    path = experiments_folder() / "results" / f"{name}.png"
    return path if path.is_file() else None


def listed(words: str, state: str, family: str, task: str) -> str:
    """The systems that have all of `words` somewhere in their record, as HTML."""
    cards = []
    for system in systems():
        now, text = standing(system), _text(system)
        fits = state in (ANY, now.state) and family in (ANY, system.family) and task in (ANY, *system.tasks)
        if fits and all(word in text for word in words.lower().split()):
            cards.append(_card(system, now))
    count = f'<p role="status" aria-live="polite">{len(cards)} of {len(systems())} systems.</p>'
    return count + "".join(cards)


def page() -> None:
    """Build the page."""
    with gr.Row():
        words = gr.Textbox("", label="Search", info="Words of the title, the idea, a claim ...", max_lines=1)
        state = gr.Dropdown([ANY, *STATES], value=ANY, label="State", filterable=False, min_width=120)
        family = gr.Dropdown([ANY, *FAMILIES], value=ANY, label="Predicts", filterable=False, min_width=120)
        task = gr.Dropdown([ANY, *TASKS], value=ANY, label="Task", min_width=160)
    filters: list[Any] = [words, state, family, task]
    shown = gr.HTML(listed("", ANY, ANY, ANY), elem_id="systems-list", padding=False)
    triggers = [field.change for field in filters]
    gr.on(triggers, listed, filters, shown, show_progress="hidden", api_visibility="private")


def _card(system: System, now: Standing) -> str:
    claims = "".join(f"<li>{escape(str(claim))}</li>" for claim in system.claims)
    facts = {
        "Idea": escape(system.summary),
        "Claims": f"<ul>{claims}</ul>",
        "Measured here": escape(now.measured or "not yet"),
        "Holds": {True: "yes", False: "no", None: ""}[now.holds],
        "Builds on": escape(", ".join(system.base)),
        "Code": "<br>".join(f"<code>{escape(path)}</code>" for path in system.code),
        "Paper": f'<a href="https://arxiv.org/abs/{system.arxiv}" rel="noreferrer">arXiv {system.arxiv}</a>',
    }
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items() if value)
    return (
        f'<details id="system-{system.name}"><summary><b>{escape(system.title)}</b>, {system.year} '
        f'<span class="state {now.state}">{now.state}</span></summary><dl>{rows}</dl>{_picture(system)}</details>'
    )


def _picture(system: System) -> str:
    if picture_of(system.name) is None:
        return ""
    about = f"Pictures of the experiment on {system.name}"
    return f'<img loading="lazy" src="{PICTURES}/{system.name}.png" alt="{about}">'


def _text(system: System) -> str:
    parts = [system.name, system.title, system.summary, *map(str, system.claims), *system.techniques]
    return " ".join(parts).lower()
