"""Compose the typed config with Hydra; all use of Hydra is here.

Hydra stops at the first mistake, while we report all of them: an override that Hydra cannot parse is listed
and left out, a plain `a.b=v` is forced in so that the schema sees unknown names too, and the result goes to
`validate.py`. A run never starts Hydra's own job machinery: no folder, no chdir and no logging per rank.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra, create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distllm.config import validate
from distllm.config.problems import Problem, UserError, user_error
from distllm.config.schema import Config
from distllm.config.verbs import ANY_WORD, Verb, find

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)
GRAMMAR = "https://hydra.cc/docs/1.3/advanced/override_grammar/basic"


@dataclass(frozen=True)
class Request:
    """One command line, parsed after its verb by Hydra's own parser.

    world_size: ranks of the job; for `check` those of the job to be checked.
    action: one of the verb's actions; None for a verb that has none, and where the command only shows.
    arguments: the verb's bare arguments that were given, as they were written.
    """

    verb: Verb
    overrides: tuple[str, ...]
    flags: Namespace
    world_size: int
    action: str | None = None
    arguments: dict[str, str] = field(default_factory=dict)

    @property
    def is_sweep(self) -> bool:
        return bool(self.flags.multirun)

    @property
    def only_shows(self) -> bool:
        flags = self.flags
        return bool(flags.help or flags.hydra_help or flags.cfg or flags.info or flags.shell_completion)

    @property
    def config_name(self) -> str:
        return str(self.flags.config_name)

    @property
    def words(self) -> list[str]:
        """Return action and bare arguments, for another process."""
        return [*filter(None, [self.action]), *(f"{name}={value}" for name, value in self.arguments.items())]

    @property
    def config_flags(self) -> list[str]:
        """Return the flags that say where configurations are read, for another process."""
        flags = {"--config-path": self.flags.config_path, "--config-dir": self.flags.config_dir}
        paths = [f"{flag}={os.path.abspath(path)}" for flag, path in flags.items() if path]
        return [*paths, f"--config-name={self.config_name}"]


def parse(name: str, arguments: Sequence[str]) -> Request:
    """Parse the command line of a verb; a `UserError` for an unknown verb or flags that Hydra rejects."""
    verb = find(name)

    def refuse(message: str) -> NoReturn:
        raise user_error("arguments", " ".join(arguments), message, f"see distllm {verb.name} --help")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]  # argparse would print on every rank
    flags = parser.parse_intermixed_args(list(arguments))
    flags.config_name = flags.config_name or "config"
    if flags.experimental_rerun:
        refuse("--experimental-rerun is not supported: a run resumes by its run.dir")
    if flags.resolve and not (flags.cfg or flags.help):
        refuse("--resolve goes with --cfg or --help")
    is_named = verb.actions != (None,) and flags.overrides and "=" not in flags.overrides[0]
    action = flags.overrides.pop(0) if is_named else None  # Hydra must not parse it
    pairs = [(text, *text.partition("=")[::2]) for text in flags.overrides]
    overrides = [text for text, name, _ in pairs if name not in verb.bare_arguments]
    named = {name: value for _, name, value in pairs if name in verb.bare_arguments}
    world_size = named.get("world_size", os.environ.get("WORLD_SIZE", "1"))
    if not world_size.isdecimal() or int(world_size) < 1:
        raise user_error("world_size", world_size, "must be a number of ranks, at least 1", "world_size=8")
    request = Request(verb, tuple(overrides), flags, int(world_size), action, named)
    if (action or not request.only_shows) and verb.actions != ANY_WORD and action not in verb.actions:
        possible = [name for name in verb.actions if name]
        (nearest, *_) = [*difflib.get_close_matches(action or "", possible, n=1), possible[0]]
        rule = f"must be one of {', '.join(possible)}, right after the verb"
        raise user_error("action", action or "none", rule, f"distllm {verb.name} {nearest}")
    return request


def load(request: Request) -> Config:
    """Return the job's config, equal on every rank; a `UserError` lists every problem of it."""
    values, problems = values_of(request)

    def defaults() -> dict[str, Any]:
        return _plain(_load(_loader(request), request, []), [])

    return validate.job(values, problems, defaults, request.verb, request.world_size)


def values_of(request: Request) -> tuple[dict[str, Any], list[Problem]]:
    """Return {section: {setting: value}} as composed, not checked yet, and the overrides' problems."""
    composed, problems = _compose(_loader(request), request)
    return _plain(composed, problems), problems


def show(request: Request, title: str) -> None:
    """Show Hydra's own `--help`, `--cfg`, `--info` and the like, after checking the overrides."""
    if not request.flags.shell_completion:
        composed, problems = _compose(_loader(request), request)
        problems += validate.unknown_settings(_plain(composed, []))
        if problems:
            raise UserError(problems)
    if request.flags.help:
        print(title)
    try:
        _run_hydra(request.flags, get_args_parser(), _runs_nothing, str(_main_directory(request)), None)
    except ValueError as error:
        raise user_error("arguments", "--cfg, --info, --run, -m", str(error), "give one of them") from error


def group_choices(request: Request) -> dict[str, tuple[str, list[str]]]:
    """Return for each group of settings the configuration that the job takes, and all that exist."""
    loader = _loader(request)
    choices = _compose(loader, request)[0].hydra.runtime.choices
    return {
        group: (str(choice), loader.get_group_options(group))
        for group, choice in choices.items()
        if group in validate.SECTIONS
    }


def _runs_nothing(_: object) -> None:
    raise AssertionError("Hydra runs no job of ours")


def expand(request: Request) -> list[tuple[tuple[str, ...], str]]:
    """Return the jobs of a sweep: the overrides of each, and its swept part, which identifies it."""
    loader = _loader(request)
    composed, problems = _compose(loader, request)
    for plugin in ("launcher", "sweeper"):
        choice = composed.hydra.runtime.choices[f"hydra/{plugin}"]
        if choice != "basic":
            rule = "a sweep runs its jobs one after another on this machine"
            problems.append(Problem(f"hydra/{plugin}", choice, rule, f"hydra/{plugin}=basic"))
    if problems:
        raise UserError(problems)

    parameters = composed.hydra.sweeper.get("params") or {}
    texts = [*(f"{key}={value}" for key, value in parameters.items()), *request.overrides]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(texts)
    swept = {override.get_key_element() for override in overrides if override.is_sweep_override()}
    if "run.dir" in swept:
        rule = "every job of a sweep has its own folder under run.dir, which cannot be swept itself"
        raise user_error("run.dir", "a sweep", rule, "run.dir=FOLDER")
    try:
        (jobs,) = BasicSweeper.split_arguments(overrides, None)
    except HydraException as error:
        raise user_error("overrides", " ".join(texts), _one_line(error), f"see {GRAMMAR}") from error
    return [(tuple(job), ",".join(text for text in job if text.partition("=")[0] in swept)) for job in jobs]


def save_sweep(request: Request, directory: str) -> None:
    """Write Hydra's record of a sweep, `multirun.yaml`, into `directory`."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    OmegaConf.save(_compose(_loader(request), request)[0], Path(directory) / "multirun.yaml")


def assignment(setting: str, value: str) -> str:
    """Return the override that sets `setting` to exactly the string `value`, with any characters."""
    return f"{setting}={QuotedString(value, Quote.single).with_quotes()}"


def to_yaml(config: Config) -> str:
    """Return the resolved config, for `config.yaml` in the run directory."""
    # Characters beyond ASCII stay escaped: YAML folds some of them (U+0085, U+2028) into a space.
    return yaml.safe_dump(to_plain(config), sort_keys=False)


def from_yaml(text: str) -> Config:
    """Read back what `to_yaml` wrote."""
    # Not OmegaConf: it takes some plain strings for numbers (0E0) that PyYAML writes unquoted.
    return validate.saved(yaml.safe_load(text))


def config_hash(config: Config) -> str:
    """Return a hash that equal configs share, in every process and on every machine."""
    canonical = json.dumps(to_plain(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def to_plain(config: Config) -> dict[str, dict[str, Any]]:
    """Return {section: {setting: JSON value}}, the form in which a config is stored; with users' names."""
    plain: dict[str, dict[str, Any]] = validate.ADAPTER.dump_python(config, mode="json", by_alias=True)
    return plain


def _main_directory(request: Request) -> Path:
    """Return `conf/`: inside the package when it is installed, beside it in a checkout."""
    if request.flags.config_path:
        return Path(request.flags.config_path).absolute()
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def _loader(request: Request) -> ConfigLoaderImpl:
    version.setbase("1.3")
    search_path = create_config_search_path(str(_main_directory(request)))
    if directory := request.flags.config_dir:
        if not os.path.isdir(directory):
            raise user_error("--config-dir", directory, "must be a folder", "give a folder of Hydra groups")
        path = f"file://{os.path.abspath(directory)}"
        search_path.prepend("command-line", path, anchor=SearchPathQuery(provider="schema"))
    loader = ConfigLoaderImpl(search_path)
    Hydra(task_name="distllm", config_loader=loader)  # for its side effects: resolvers and the job's name
    return loader


def _load(loader: ConfigLoaderImpl, request: Request, overrides: list[str]) -> DictConfig:
    mode = RunMode.MULTIRUN if request.is_sweep else RunMode.RUN
    return loader.load_configuration(request.config_name, overrides, mode)


def _compose(loader: ConfigLoaderImpl, request: Request) -> tuple[DictConfig, list[Problem]]:
    """Compose all valid overrides; the others become problems."""
    overrides: list[tuple[Override, str]] = []
    problems: list[Problem] = []
    for text in request.overrides:
        try:
            override = OverridesParser.create().parse_override(text)
            if not override.key_or_group:
                raise HydraException("a name is missing")
            overrides.append((override, _forced(loader, override, text)))
        except HydraException as error:
            rule = f"must be written SETTING=VALUE ({_one_line(error)})"
            problems.append(Problem("override", text, rule, f"quote special characters, see {GRAMMAR}"))
    try:
        return _load(loader, request, [text for _, text in overrides]), problems
    except COMPOSITION_ERRORS:
        return _compose_one_by_one(loader, request, overrides, problems)


def _compose_one_by_one(
    loader: ConfigLoaderImpl, request: Request, overrides: list[tuple[Override, str]], problems: list[Problem]
) -> tuple[DictConfig, list[Problem]]:
    """Compose each override alone, to find all invalid ones: Hydra names one at most."""
    search_path = [text for override, text in overrides if override.key_or_group == "hydra.searchpath"]
    try:
        _load(loader, request, search_path)
    except COMPOSITION_ERRORS as error:
        fix = "see --config-name, --config-path and --config-dir"
        problems.append(Problem("--config-name", request.config_name, _one_line(error), fix))
        raise UserError(problems) from error
    usable = list(search_path)
    for override, text in overrides:
        try:
            _load(loader, request, [*search_path, text])
        except COMPOSITION_ERRORS as error:
            problems.append(_explained(loader, override, error))
        else:
            usable.append(text)
    try:
        return _load(loader, request, usable), problems
    except COMPOSITION_ERRORS as error:
        fix = "remove overrides until they agree"
        problems.append(Problem("overrides", " ".join(request.overrides), _one_line(error), fix))
        raise UserError(problems) from error


def _forced(loader: ConfigLoaderImpl, override: Override, text: str) -> str:
    """Return `++a.b=v` for `a.b=v`: Hydra would stop at an unknown name, the schema lists all of them."""
    is_plain = text.startswith(override.key_or_group) and override.package is None
    is_group = loader.repository.group_exists(override.key_or_group)
    return f"++{text}" if is_plain and not is_group and not override.is_hydra_override() else text


def _explained(loader: ConfigLoaderImpl, override: Override, error: Exception) -> Problem:
    setting, value = override.get_key_element(), (override.input_line or "").partition("=")[2]
    if override.is_sweep_override():
        fix = f"add -m to run one job per value, or quote it: {setting}=\"'{value}'\""
        return Problem(setting, value, "several values need a sweep", fix)
    options = loader.get_group_options(override.key_or_group)
    if options and value and value not in options:
        nearest = difflib.get_close_matches(value, options, n=1)
        fix = f"{setting}={nearest[0] if nearest else options[0]}"
        return Problem(override.key_or_group, value, f"must be one of {', '.join(options)}", fix)
    if options and value:
        fix = f"{'' if override.is_add() else '+'}{override.key_or_group}={value}"
        return Problem(setting, value, _one_line(error), fix)
    return Problem(
        setting, value, _one_line(error), f"distllm VERB --cfg job shows the settings, {GRAMMAR} the grammar"
    )


def _plain(composed: DictConfig, problems: list[Problem], prefix: str = "") -> dict[str, Any]:
    """Return the values of a composed config without `???`, which the schema then reports as required."""
    if not prefix:
        HydraConfig.instance().set_config(composed)  # for ${hydra:...}
    values: dict[str, Any] = {}
    for name in map(str, composed):
        setting = f"{prefix}{name}"
        if setting == "hydra" or OmegaConf.is_missing(composed, name):
            continue
        try:
            value = composed[name]
            if isinstance(value, ListConfig):
                value = OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException as error:
            written = OmegaConf.to_container(composed, resolve=False)
            assert isinstance(written, dict), "a DictConfig becomes a dict"
            fix = "name a setting that exists, or write \\${ for the characters themselves"
            problems.append(Problem(setting, written[name], _one_line(error), fix))
            continue
        is_section = isinstance(value, DictConfig)
        values[name] = _plain(value, problems, f"{setting}.") if is_section else value
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
