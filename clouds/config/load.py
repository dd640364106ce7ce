"""Reading a config: a YAML file, the files that it is based on, and overrides."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from clouds.config.check import ConfigError, describe, problems
from clouds.config.compat import COMPAT_SECTIONS, translate
from clouds.config.config import get_defaults, resolve, set_value
from clouds.config.defaults import KEYS
from clouds.config.key import sections
from clouds.config.values import Setting, coerce, expand_home
from clouds.d2 import CfgNode
from clouds.files import expand_user
from clouds.resources import CONFIGS, find, near_names
from clouds.yaml_core import FLOAT_TAG, INT_TAG, CoreLoader

BASE = "_BASE_"
COMMAND_LINE = "override"

_KEYS = {key.name: key for key in KEYS}
_SECTIONS = sections(_KEYS)


def load_config(config_file: str | Path | None, overrides: Sequence[Any] = ()) -> CfgNode:
    """Defaults, then the files, base first, then the overrides; validated and frozen.

    Args:
        config_file: a YAML file, relative to the working directory, or if there is none the short
            name of a config that comes with the package ('warmup/gta_rn50', also with '.yaml');
            None: only defaults. Its `_BASE_` names the file or the list of files that it changes,
            relative to itself.
        overrides: KEY VALUE KEY VALUE …; a later one wins.

    Keys of published files and of earlier versions are accepted (`clouds.config.compat`); one
    warning lists those without effect.

    Raises:
        FileNotFoundError: the file, or one that it is based on, does not exist.
        ConfigError: all other problems.
    """
    return config_of(load_settings(config_file, overrides))


def load_settings(config_file: str | Path | None, overrides: Sequence[Any] = ()) -> list[Setting]:
    """The settings of `load_config` as they are written, base first, then the overrides."""
    settings = read_yaml(find(CONFIGS, config_file)) if config_file is not None else []
    return settings + pair_up(overrides)


def config_of(settings: Sequence[Setting]) -> CfgNode:
    """The defaults changed by `settings`, a later one wins; validated and frozen.

    Raises:
        ConfigError: a setting or the whole is invalid.
    """
    cfg = get_defaults()
    settings, messages = translate(settings)
    messages += assign(cfg, settings)
    # A value that could not be assigned keeps its default, so it is not reported a second time.
    origins = {setting.name: setting.origin for setting in settings}
    messages += problems(cfg, origins)
    if messages:
        raise ConfigError(messages)
    resolve(cfg)
    cfg.freeze()
    return cfg


def assign(cfg: CfgNode, settings: Sequence[Setting]) -> list[str]:
    """Write settings into `cfg`, in order; returns messages about those that are invalid."""
    messages = []
    for setting in settings:
        key = _KEYS.get(setting.name)
        if key is None:
            messages.append(f"{setting.name} ({setting.origin}): {_no_such_key(setting.name)}")
            continue
        try:
            set_value(cfg, key.name, expand_home(key, coerce(key, setting.value)))
        except ValueError as error:
            origins = {setting.name: setting.origin}
            messages.append(describe(setting.name, setting.value, str(error), origins))
    return messages


def pair_up(overrides: Sequence[Any]) -> list[Setting]:
    """Settings from KEY VALUE KEY VALUE …"""
    if len(overrides) % 2:
        hint = ""
        if any("=" in str(token) for token in overrides[::2]):
            hint = " Write KEY VALUE with a space, not KEY=VALUE."
        raise ConfigError(
            [
                f"overrides are pairs KEY VALUE, but these are {len(overrides)} words: "
                f"{' '.join(map(str, overrides))}.{hint}"
            ]
        )
    return [
        Setting(str(name), value, COMMAND_LINE)
        for name, value in zip(overrides[::2], overrides[1::2], strict=True)
    ]


def read_yaml(path: Path, parents: tuple[Path, ...] = ()) -> list[Setting]:
    """Settings of a YAML file, after those of the files that it is based on.

    `parents` are the files whose `_BASE_` led to this one, that of the user first.

    Raises:
        FileNotFoundError: the file, or one that it is based on, does not exist.
        ConfigError: it is not valid YAML, not a mapping, or its own base.
    """
    if path.resolve() in [parent.resolve() for parent in parents]:
        chain = " -> ".join(map(str, [*parents, path]))
        raise ConfigError([f"{BASE} is circular: {chain}"])
    if not path.is_file():
        raise FileNotFoundError(_no_such_file(path, parents))
    settings = _parse(path)
    bases = [setting for setting in settings if setting.name == BASE]
    inherited: list[Setting] = []
    for setting in bases:
        names = setting.value if isinstance(setting.value, list) else [setting.value]
        for name in names:
            if not isinstance(name, str):
                raise ConfigError([f"{BASE} = {name!r} ({setting.origin}): a file is expected"])
            base = path.parent / expand_user(name)
            inherited += read_yaml(base, (*parents, path))
    return inherited + [setting for setting in settings if setting.name != BASE]


def nearest(name: str) -> list[str]:
    """Keys that are similar to `name`, the most similar first."""
    by_lower = {known.lower(): known for known in _KEYS}
    if name.lower() in by_lower:
        return [by_lower[name.lower()]]
    whole = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.75)
    leaf = name.lower().rpartition(".")[2]
    leaves = [known for known in by_lower if known.rpartition(".")[2] == leaf]
    return [by_lower[known] for known in dict.fromkeys([*leaves, *whole])][:3]


def _no_such_key(name: str) -> str:
    if name in _SECTIONS:
        inside = [known.removeprefix(name + ".") for known in _KEYS if known.startswith(name + ".")]
        return f"is a section, not a key; it holds {', '.join(inside)}"
    close = nearest(name)
    if close:
        return f"no such key; did you mean {' or '.join(close)}?"
    return "no such key; `clouds list-config` prints all keys"


def _no_such_file(path: Path, parents: Sequence[Path]) -> str:
    role = f", which is the {BASE} of {parents[-1]}," if parents else ""
    present = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, present, n=3) or present[:8]
    hint = f" {path.parent}/ holds {', '.join(close)}." if close else ""
    if not parents:
        names = near_names(CONFIGS, path)
        hint += f" Configs of the package: {', '.join(names)}." if names else ""
    return f"Config file {path}{role} does not exist (working directory: {Path.cwd()}).{hint}"


def _parse(path: Path) -> list[Setting]:
    with yaml_errors(path), path.open(encoding="utf-8") as file:
        return _settings_of(file, path)


@contextlib.contextmanager
def yaml_errors(path: Path) -> Iterator[None]:
    """Raise ConfigError, with the line, if the file that is read in the context is not YAML."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError([f"{path}{line}: not valid YAML: {error.problem}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not a YAML text file: {error}"]) from error


def parse_text(text: str, source: Path) -> list[Setting]:
    """Settings of a complete config as text, as a checkpoint of `source` carries it.

    Raises:
        ConfigError: it is not a config.
    """
    try:
        return _settings_of(text, source)
    except yaml.YAMLError as error:
        raise ConfigError([f"the config in {source}: not valid YAML: {error}"]) from error


def _settings_of(stream: IO[str] | str, path: Path) -> list[Setting]:
    loader = CoreLoader(stream)
    try:
        root = loader.get_single_node()
        return [] if root is None else settings_of_node(loader, root, path)
    finally:
        loader.dispose()


def settings_of_node(loader: CoreLoader, node: yaml.Node, path: Path) -> list[Setting]:
    """Settings of a mapping of a YAML file, nested or by dotted names.

    Raises:
        ConfigError: it is no mapping, or a name occurs twice in it.
    """
    return list(_flatten(loader, node, "", path))


def _flatten(loader: CoreLoader, node: yaml.Node, prefix: str, path: Path) -> Iterator[Setting]:
    """One setting per leaf under `node`, whose dotted name is `prefix`."""
    origin = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode) and prefix not in _KEYS:
        check_duplicates(node, path)
        loader.flatten_mapping(node)
        for name_node, value_node in node.value:
            name = str(loader.construct_object(name_node))
            yield from _flatten(loader, value_node, f"{prefix}.{name}" if prefix else name, path)
        return
    value = _value(loader, node, prefix)
    if not prefix:
        raise ConfigError([f"{origin}: a config file holds KEY: VALUE pairs, not {value!r}"])
    if value is None and prefix in _SECTIONS | COMPAT_SECTIONS:
        return  # all its lines may be commented out
    yield Setting(prefix, value, origin)


def _value(loader: CoreLoader, node: yaml.Node, name: str) -> Any:
    """The value of a leaf; a number is text where the key's type is text, as in overrides.

    Dumped configs need this: PyYAML writes the folder name '1e5' without quotes.
    """
    if name in _KEYS and isinstance(_KEYS[name].default, str) and node.tag in (INT_TAG, FLOAT_TAG):
        return node.value
    return loader.construct_object(node, deep=True)


def check_duplicates(node: yaml.MappingNode, path: Path) -> None:
    """Raise ConfigError for a name that occurs twice; YAML would keep the last one."""
    lines: dict[str, int] = {}
    for name_node, _ in node.value:
        line = name_node.start_mark.line + 1
        name = str(name_node.value)
        if name in lines:
            raise ConfigError([f"{path}:{line}: {name} is set already in line {lines[name]}"])
        lines[name] = line
