"""Turn plain values into a `Config`, or report every problem of schema and rules in one `UserError`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from distllm.config import rules
from distllm.config.data_schema import Source
from distllm.config.problems import Problem, UserError
from distllm.config.registry import imported
from distllm.config.schema import Config
from distllm.config.verbs import Verb

ADAPTER = TypeAdapter(Config)
# A section as users write it -> its field; they differ where the section is a keyword of Python.
FIELDS = {field.removesuffix("_"): field for field in get_type_hints(Config)}
SECTIONS: dict[str, Any] = {name: get_type_hints(Config)[field] for name, field in FIELDS.items()}
SETTINGS: dict[str, Any] = {
    f"{section}.{name}": annotation
    for section, section_type in SECTIONS.items()
    for name, annotation in get_type_hints(section_type).items()
}


def job(
    values: dict[str, Any],
    problems: list[Problem],
    defaults: Callable[[], dict[str, Any]],
    verb: Verb,
    world_size: int,
) -> Config:
    """Return the `Config` of a job that is about to run here.

    problems: those already found while `values` were composed. defaults: values of the job without overrides,
        which serve as examples of what to write.
    """
    config, found = _typed(values, {problem.setting for problem in problems}, defaults)
    if problems:
        config = None  # without an override it would not be the requested job
    problems = problems + found
    # Settings with problems are hidden from the rules, which would only repeat them, or mislead.
    known = config if config else _what_is_known(values, problems)
    problems += rules.check(known, world_size, verb.rules)
    problems += rules.check_environment(known, verb.environment_rules)
    problems += rules.check_versions()
    if config and not problems:
        for rule in verb.late_rules:
            problems += imported(rule)(config, world_size)
    if problems:
        raise UserError(problems, config)
    assert config is not None, "a config without a problem was not built"
    return config


def saved(values: Any) -> Config:
    """Return the `Config` of a `config.yaml` that an earlier run wrote: only its types are checked."""
    config, problems = _typed(values if isinstance(values, dict) else {}, set(), dict)
    if config is None:
        raise UserError(problems)
    return config


def unknown_settings(values: dict[str, Any]) -> list[Problem]:
    """Report names that the schema does not have, each with the nearest that it has."""
    problems = []
    for section, content in values.items():
        if section not in SECTIONS:
            problems.append(_unknown(section, content))
        elif isinstance(content, dict):
            settings = {f"{section}.{name}": value for name, value in content.items()}
            problems += [_unknown(name, value) for name, value in settings.items() if name not in SETTINGS]
    return problems


def _unknown(setting: str, value: object) -> Problem:
    section, _, name = setting.rpartition(".")
    prefix = f"{section}." if section else ""
    names = list(get_type_hints(SECTIONS[section])) if section else list(SECTIONS)
    near = [f"{prefix}{known}" for known in difflib.get_close_matches(name, names, n=1, cutoff=0.85)]
    near = near or [known for known in SETTINGS if section and known.endswith(f".{name}")]
    near = near or [f"{prefix}{known}" for known in difflib.get_close_matches(name, names, n=2)]
    fix = f"did you mean {' or '.join(near)}?" if near else f"there are: {prefix}{f', {prefix}'.join(names)}"
    return Problem(setting, value, "is not a setting of distllm", fix)


def _typed(
    values: dict[str, Any], reported: set[str], defaults: Callable[[], dict[str, Any]]
) -> tuple[Config | None, list[Problem]]:
    # Pydantic's strictness for JSON: 1 is a float and a list a tuple, but 1e3 or true is no integer.
    try:
        return ADAPTER.validate_json(json.dumps(values), by_alias=True, by_name=False), []
    except ValidationError as error:
        examples = defaults()
        problems = unknown_settings(values)
        for detail in error.errors(include_url=False):
            setting = ".".join(str(part) for part in detail["loc"])
            # `unknown_settings` has named those of the sections; deeper ones are named here.
            is_named = detail["type"] == "unexpected_keyword_argument" and len(detail["loc"]) <= 2
            if not is_named and setting not in reported:
                context = detail.get("ctx", {})
                problems.append(
                    Problem(setting, detail["input"], detail["msg"], f"{setting}={context['nearest']}")
                    if detail["type"] == "choice"
                    else _translated(setting, detail["type"], detail["msg"], detail["input"], examples)
                )
        return None, problems


def _translated(setting: str, kind: str, message: str, value: object, examples: dict[str, Any]) -> Problem:
    section, _, name = setting.partition(".")
    if kind == "unexpected_keyword_argument":
        known = ", ".join(get_type_hints(Source))
        return Problem(setting, value, "is not a setting of distllm", f"a source has: {known}")
    if kind == "missing":
        fix = f"add {setting}=VALUE" if name else f"choose one of its configurations: {setting}=NAME"
        return Problem(setting, "???", f"{setting} is required", fix)
    if kind == "dataclass_type":
        return Problem(setting, value, "is a section of settings, not a value", f"set {setting}.NAME=VALUE")

    annotation = SETTINGS.get(setting)
    rule = re.sub(r"^(Input|Tuple|List) should (be|have)", r"must \2", message).replace(
        " after validation", ""
    )
    if type(None) in get_args(annotation):
        rule += ", or null"
    if options := [option for option in _options(annotation) if isinstance(option, str)]:
        (nearest, *_) = [*difflib.get_close_matches(str(value), options, n=1), options[0]]
        return Problem(setting, value, rule, f"{setting}={nearest}")
    if kind == "string_type" and isinstance(value, bool | int | float):
        return Problem(setting, value, rule, f"quote it for the shell and for Hydra: {setting}=\"'{value}'\"")
    example = examples.get(section, {}).get(name)
    if example is None and rule.endswith("or null"):
        return Problem(setting, value, rule, f"{setting}=null")
    fix = (
        f"for example {setting}={json.dumps(example)}"
        if example is not None
        else "change it to keep the rule"
    )
    return Problem(setting, value, rule, fix)


def _options(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)


def _what_is_known(values: dict[str, Any], problems: list[Problem]) -> Config:
    """Return a stand-in with only the valid settings, so that rules that read no others still apply."""
    problematic = {problem.setting for problem in problems}
    sections = {}
    for section in SECTIONS:
        content = values.get(section)
        if section in problematic or not isinstance(content, dict):
            continue
        bad = {setting.split(".")[1] for setting in problematic if setting.startswith(f"{section}.")}
        # Values that the schema turns into a dataclass (a mixture's sources) are still a dict here.
        sound = {str(k): v for k, v in content.items() if k not in bad and not _holds_dicts(v)}
        defaults = {f.name: f.default for f in dataclasses.fields(SECTIONS[section]) if f.name not in bad}
        sound = {k: v for k, v in defaults.items() if v is not dataclasses.MISSING} | sound
        sections[FIELDS[section]] = rules.Known(**sound)
    return cast(Config, rules.Known(**sections))


def _holds_dicts(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))


assert all(dataclasses.is_dataclass(section) for section in SECTIONS.values()), "a section is a dataclass"
