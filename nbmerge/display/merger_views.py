"""What is shown of a merger: its configuration, and how far it has come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from nbmerge.display import words
from nbmerge.display.checkpoint_views import problem_alerts
from nbmerge.display.layout_views import layout_sections
from nbmerge.display.model import Fact, Section, View
from nbmerge.errors import plural
from nbmerge.mergers import BaseModelMerger, ModelMergerConfig


def merger_view(merger: BaseModelMerger) -> View:
    """What it is set to do; once opened, how the checkpoint is sharded; once planned, the plan; at last the report."""
    config = merger.config
    target = f", into {words.elide(config.target_dir)}" if config.target_dir else ""
    against = (
        f", against {words.elide(config.test_hf_dir)}" if config.operation == "test" and config.test_hf_dir else ""
    )
    return View(
        title=type(merger).__name__,
        sentence=f"{config.operation} of {words.elide(str(merger.local_dir))}{target}{against}; {_how_far(merger)}",
        alerts=problem_alerts(merger.plan_made.problems if merger.plan_made else ()),
        facts=tuple(_facts(merger)),
        sections=tuple(_sections(merger)),
        code_title="Next",
        code=tuple(_next_lines(merger)),
    )


def _how_far(merger: BaseModelMerger) -> str:
    if merger.report is not None:
        return "done" if merger.report.target is not None else "compared, nothing written"
    if merger.plan_made is not None:
        return "planned"
    return "opened" if merger.checkpoint is not None else "nothing has been read yet"


def _facts(merger: BaseModelMerger) -> Iterator[Fact]:
    if merger.checkpoint is not None:
        yield Fact("checkpoint", merger.checkpoint.view().sentence)
    if merger.plan_made is not None:
        yield Fact("plan", merger.plan_made.view().sentence)
    if merger.report is not None:
        yield Fact("report", merger.report.view().sentence)


def _sections(merger: BaseModelMerger) -> Iterator[Section]:
    yield Section("Configuration", _changed_in_words(merger.config), facts=tuple(_settings(merger)), opened=True)
    if merger.checkpoint is not None:
        yield from layout_sections(merger.checkpoint)


def _settings(merger: BaseModelMerger) -> Iterator[Fact]:
    for name, value in _values(merger.config):
        if name == "backend" and merger.backend != "auto":
            value = merger.backend
        yield Fact(name, words.value_in_words(value), code=isinstance(value, str))


def _values(config: ModelMergerConfig) -> Iterator[tuple[str, object]]:
    """The settings that say something: verl's fields by their names, then the further options."""
    for one in fields(config):
        value = getattr(config, one.name)
        if one.name != "options" and value is not None and (value is not False or one.name == "private"):
            yield one.name, value
    yield from config.options.items()


def _changed_in_words(config: ModelMergerConfig) -> str:
    return f"verl's fields, and {plural(len(config.options), 'further option')}" if config.options else "verl's fields"


def _next_lines(merger: BaseModelMerger) -> Iterator[str]:
    if merger.checkpoint is None:
        yield "merger.open()  # how is it sharded?"
    if merger.plan_made is None:
        yield "merger.plan()  # what would be written?"
    if merger.report is None:
        yield "merger.merge_and_save()"
    elif merger.report.target is not None:
        yield "nbmerge.validate(merger.report)"
