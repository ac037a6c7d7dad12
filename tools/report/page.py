"""Make the page: one HTML file with figures, tables and the library that draws them."""

from collections.abc import Sequence
from pathlib import Path

from bokeh.embed import components
from bokeh.resources import Resources
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from ..console.picture_style import line_styles
from ..recipes.flops import UNCOUNTED, Flops, TrainingStage, stages
from ..runs.run_figures import RunFigures
from . import tables
from .figures import panels


def page(runs: Sequence[RunFigures]) -> str:
    """Return the page for one or more runs as HTML that needs no network."""
    sections = panels(runs)
    drawn = [panel.plot for section in sections.values() for panel in section]
    script, plots = components(drawn) if drawn else ("", [])
    loader = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    colours = (colour for colour, _ in line_styles(run.routing for run in runs))
    return loader.get_template("page.html").render(
        title=f"Training of {', '.join(run.name for run in runs)}",
        headline=tables.headline(runs),
        library=Markup(Resources(mode="inline", components=["bokeh"]).render()),
        script=Markup(script),
        runs=[*zip((run.name for run in runs), colours, strict=True)],
        summary=tables.summary(runs),
        stages=tables.stages({run.name: _stages(run) for run in runs}),
        sections=sections,
        next_plot=iter([Markup(plot) for plot in plots]).__next__,
        notes=[note for run in runs for note in run.notes],
    )


def _stages(run: RunFigures) -> list[TrainingStage]:
    try:
        return stages(run, Flops.count(run.args))
    except UNCOUNTED as error:
        run.notes.append(f"{run.name}: FLOPs are not counted, since its arguments are not all known ({error}).")
        return []
