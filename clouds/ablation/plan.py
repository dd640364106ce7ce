"""Reading of an ablation: a YAML file with named overrides of a config, and seeds."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clouds.ablation.scores import MetricSpecs, read_metrics
from clouds.config.check import ConfigError
from clouds.config.config import with_value
from clouds.config.load import (
    check_duplicates,
    config_of,
    load_settings,
    settings_of_node,
    yaml_errors,
)
from clouds.config.values import Setting
from clouds.d2 import CfgNode
from clouds.data.yaml_section import DescriptionError, Section
from clouds.engine.run_folder import file_name
from clouds.files import expand_user
from clouds.resources import ABLATIONS, find, near_names
from clouds.yaml_core import CoreLoader

OUTPUT = Path("output/ablations")
"""Folder of the runs where neither the file nor the command line names one."""

PLANNED_KEYS = {"SEED": "'seeds' (--seeds)", "OUTPUT_DIR": "'output' (--output)"}
"""Keys that an ablation sets by itself for each run, and the entry that they follow from."""

CONFIG, START = "config", "start"
"""Entries of a setting that are no keys: another config than that of the file, and the setting
whose final weights it starts from."""

FINAL = "model_final.pth"
"""The checkpoint at the end of a run."""

NODES = ("common", "settings")
"""Entries of the file that hold config keys."""


@dataclass(frozen=True)
class Run:
    """A training run of an ablation.

    Attributes:
        setting: name of its setting.
        seed: SEED.
        config: YAML file, or short name of a config of the package.
        overrides: KEY VALUE …, without those that the ablation sets.
        start: the setting whose final weights with the same seed it starts from; empty: none.
        cfg: the whole config; not compared by `==`.
    """

    setting: str
    seed: int
    config: str
    overrides: tuple[str, ...]
    start: str = ""
    cfg: CfgNode = field(default_factory=CfgNode, repr=False, compare=False)

    @property
    def folder(self) -> Path:
        """OUTPUT_DIR."""
        return Path(self.cfg.OUTPUT_DIR)

    @property
    def name(self) -> str:
        """How messages name it."""
        return f"{self.setting}, seed {self.seed}"

    def command(self, num_gpus: int = 1) -> list[str]:
        """The command line that starts or resumes it on `num_gpus` GPUs."""
        words = [sys.executable, "-m", "clouds", "train", "--config-file", self.config, "--resume"]
        if num_gpus > 1:
            words += ["--num-gpus", str(num_gpus)]
        own = ["SEED", str(self.seed), "OUTPUT_DIR", str(self.folder)]
        if self.start:
            own += ["MODEL.WEIGHTS", str(self.cfg.MODEL.WEIGHTS)]
        return [*words, *self.overrides, *own]

    def shown_command(self) -> str:
        """The same as text."""
        return shlex.join(["clouds", *self.command()[3:]])


@dataclass(frozen=True)
class Ablation:
    """Runs of several settings with the same seeds.

    Attributes:
        runs: seed by seed, each with all settings, so that the first rows of a table come early.
        settings: names of the settings, in the order of the file.
        baseline: the setting that others are compared with.
        metrics: columns of the table; empty: the default ones.
        output: folder of the runs.
    """

    runs: tuple[Run, ...]
    settings: tuple[str, ...]
    baseline: str
    metrics: MetricSpecs
    output: Path


def read_ablation(
    file: str | Path,
    *,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
    output: Path | None = None,
) -> Ablation:
    """The ablation of a YAML file; the config of each run is checked.

    Args:
        file: a path, or the short name of one that comes with the package.
        overrides: KEY VALUE …, of all runs; they come last.
        seeds: instead of those of the file; empty: those.
        only: names of the settings to run, and the baseline; empty: all.
        output: folder of the runs instead of that of the file.

    Raises:
        FileNotFoundError: no such file, or a config that it names does not exist.
        DescriptionError: an entry of the file is unknown, missing or of another form.
        ConfigError: the config of a setting is invalid; it has the problems of all settings.
        ValueError: two settings have one config or folder; a name in `only` is unknown; a seed is
            negative; there are no test data, or test data or protocols of settings differ.
    """
    path = find(ABLATIONS, file)
    if not path.is_file():
        near = near_names(ABLATIONS, file)
        hint = f" Those of the package that are similar: {', '.join(near)}." if near else ""
        raise FileNotFoundError(
            f"ablation file {path} does not exist (working directory: {Path.cwd()}).{hint}"
        )
    content, common, settings = _parse(path)
    section = Section(content, str(path))
    config = section.text("config")
    folder = expand_user(section.text("output", str(OUTPUT / path.stem)))
    folder = output or folder
    chosen_seeds = _seeds(section)
    if any(seed < 0 for seed in seeds):
        raise ValueError(f"--seeds is {list(seeds)}; expected are whole numbers from 0")
    chosen_seeds = tuple(dict.fromkeys(seeds)) or chosen_seeds
    baseline = section.text("baseline", next(iter(settings)))
    metrics = read_metrics(section)
    section.done()
    if baseline not in settings:
        raise section.error("baseline", f"the name of a setting: {', '.join(settings)}")
    starts = {name: _start(name, own, settings) for name, own in settings.items()}
    names = _selected(starts, only, baseline)
    configs = _configs(config, common, {name: settings[name] for name in names}, overrides)
    _check_differences(configs, starts)
    folders = _folders(names, folder)
    runs = []
    for seed, name in ((seed, name) for seed in chosen_seeds for name in names):
        cfg = with_value(configs[name].cfg, "SEED", seed)
        cfg = with_value(cfg, "OUTPUT_DIR", str(folders[name] / f"seed_{seed}"))
        if start := starts[name]:
            weights = folders[start] / f"seed_{seed}" / FINAL
            cfg = with_value(cfg, "MODEL.WEIGHTS", str(weights))
        runs.append(Run(name, seed, configs[name].file, configs[name].words, start, cfg))
    return Ablation(tuple(runs), names, baseline, metrics, folder)


def _parse(path: Path) -> tuple[dict[str, Any], list[Setting], dict[str, list[Setting]]]:
    """The entries of the file but `NODES`, the `common` settings, and those of each name."""
    with yaml_errors(path), path.open(encoding="utf-8") as file:
        loader = CoreLoader(file)
        try:
            root = loader.get_single_node()
            if not isinstance(root, yaml.MappingNode):
                raise DescriptionError(f"{path}: a mapping (name: value) is expected")
            check_duplicates(root, path)
            nodes = {loader.construct_object(name): node for name, node in root.value}
            plain = {
                name: loader.construct_object(node, deep=True)
                for name, node in nodes.items()
                if name not in NODES
            }
            common = _settings(loader, nodes.get("common"), path)
            named = nodes.get("settings")
            if not isinstance(named, yaml.MappingNode) or not named.value:
                raise DescriptionError(
                    f"{path}: 'settings' is {'missing' if named is None else 'of another form'}; "
                    "a mapping from names to config overrides is expected"
                )
            check_duplicates(named, path)
            loader.flatten_mapping(named)
            return plain, common, dict(_named_settings(loader, named, path))
        finally:
            loader.dispose()


def _named_settings(
    loader: CoreLoader, named: yaml.MappingNode, path: Path
) -> Iterator[tuple[str, list[Setting]]]:
    for name_node, node in named.value:
        name = str(loader.construct_object(name_node)).strip()
        if not name.isprintable() or not name:
            raise DescriptionError(f"{path}: settings: {name!r} is no name; printable text is")
        yield name, _settings(loader, node, path)


def _settings(loader: CoreLoader, node: yaml.Node | None, path: Path) -> list[Setting]:
    """The overrides in a mapping; an empty entry has none."""
    if node is None or node.tag == "tag:yaml.org,2002:null":
        return []
    return settings_of_node(loader, node, path)


def _seeds(section: Section) -> tuple[int, ...]:
    value = section.content["seeds"] if "seeds" in section else [0, 1, 2]
    seeds = value if isinstance(value, list) else [value]
    if not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        raise section.error("seeds", "a list of whole numbers from 0, such as [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise section.error("seeds", "a list of different numbers")
    return tuple(seeds)


def _start(name: str, own: Sequence[Setting], settings: Mapping[str, Sequence[Setting]]) -> str:
    """The setting that `name` starts from; empty: none."""
    found = [setting for setting in own if setting.name == START]
    if not found:
        return ""
    start = str(found[0].value)
    weights = [setting for setting in own if setting.name == "MODEL.WEIGHTS"]
    if start not in settings:
        problem = f"there is no such setting; the file has {', '.join(map(repr, settings))}"
    elif start == name or any(setting.name == START for setting in settings[start]):
        problem = f"a setting without '{START}' is expected"
    elif weights:
        problem = f"MODEL.WEIGHTS ({weights[0].origin}) is set, too; leave one of them out"
    else:
        return start
    raise DescriptionError(
        f"setting {name!r}: '{START}' is {start!r} ({found[0].origin}): {problem}"
    )


def _selected(starts: Mapping[str, str], only: Sequence[str], baseline: str) -> tuple[str, ...]:
    """The names to run: `only`, the baseline, and what they start from, in the file's order."""
    unknown = [name for name in only if name not in starts]
    if unknown:
        raise ValueError(
            f"there is no setting {unknown[0]!r}; the file has {', '.join(map(repr, starts))}"
        )
    chosen = {*only, baseline} if only else set(starts)
    chosen |= {starts[name] for name in chosen}
    return tuple(name for name in starts if name in chosen)


@dataclass(frozen=True)
class _Config:
    """Config of a setting: its file, the overrides as words, and the whole."""

    file: str
    words: tuple[str, ...]
    cfg: CfgNode


def _configs(
    config: str,
    common: Sequence[Setting],
    settings: Mapping[str, Sequence[Setting]],
    overrides: Sequence[str],
) -> dict[str, _Config]:
    """The config of each setting; the problems of all are in one error."""
    configs, problems = {}, []
    for name, own in settings.items():
        files = [str(setting.value) for setting in own if setting.name == CONFIG]
        keys = [s for s in (*common, *own) if s.name not in (CONFIG, START)]
        last = load_settings(None, overrides)
        planned = [s for s in (*keys, *last) if s.name in PLANNED_KEYS]
        if planned:
            problems.append(
                f"setting {name!r}: {planned[0].name} ({planned[0].origin}) is set for each run by "
                f"the ablation; leave it out, it follows from {PLANNED_KEYS[planned[0].name]}"
            )
            continue
        weights = [s for s in last if s.name == "MODEL.WEIGHTS"]
        if weights and any(setting.name == START for setting in own):
            problems.append(
                f"setting {name!r}: MODEL.WEIGHTS ({weights[0].origin}) follows from '{START}'; "
                "leave one of them out"
            )
            continue
        file = files[0] if files else config
        base = [*load_settings(file), *keys]
        words = [word for s in (*keys, *last) for word in (s.name, _word(s.value))]
        try:
            configs[name] = _Config(file, tuple(words), config_of([*base, *last]))
        except ConfigError as error:
            problems += [f"setting {name!r}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return configs


def _word(value: Any) -> str:
    """A value of a YAML file as a word of the command line."""
    return value if isinstance(value, str) else repr(value)


def _check_differences(configs: Mapping[str, _Config], starts: Mapping[str, str]) -> None:
    """Raise ValueError if settings are the same, or their scores are none or not comparable."""
    first = next(iter(configs))
    by_config: dict[tuple[str, str], str] = {}
    for name, config in configs.items():
        same = by_config.setdefault((config.cfg.dump(), starts[name]), name)
        if same != name:
            raise ValueError(
                f"the settings {same!r} and {name!r} are the same config: what they override has "
                "these values already. Leave one of them out, or change it."
            )
        if not config.cfg.DATASETS.TEST:
            raise ValueError(
                f"DATASETS.TEST is empty in the setting {name!r}, so its runs have no scores. Set "
                "it in 'common'."
            )
        for key in ("DATASETS.TEST", "TEST.PROTOCOL"):
            section, leaf = key.split(".")
            values = [configs[n].cfg[section][leaf] for n in (first, name)]
            if values[0] != values[1]:
                raise ValueError(
                    f"{key} is {values[0]!r} in the setting {first!r} and {values[1]!r} in "
                    f"{name!r}; their scores would not be comparable. Set it in 'common'."
                )


def _folders(names: Sequence[str], output: Path) -> dict[str, Path]:
    """The folder of the runs of each setting."""
    folders: dict[str, Path] = {}
    owners: dict[str, str] = {}
    for name in names:
        folder = file_name(name)
        owner = owners.setdefault(folder.lower(), name)
        if not folder or owner != name:
            raise ValueError(
                f"the names of settings become names of folders, by their letters and digits: "
                f"{name!r} would be {folder!r}{f', as {owner!r} is' if folder else ''}. Rename it."
            )
        folders[name] = output / folder
    return folders
