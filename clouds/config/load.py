"""A config from a YAML file, the files it is based on, and overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from clouds.config.check import ConfigError, describe, problems
from clouds.config.defaults import KEYS, get_cfg
from clouds.config.published import PUBLISHED_SECTIONS, translate
from clouds.config.setting import Setting
from clouds.config.values import coerce
from clouds.d2 import CfgNode

BASE = "_BASE_"
COMMAND_LINE = "override"

_KEYS = {key.name: key for key in KEYS}
_SECTIONS = {
    ".".join(parts[:n]) for parts in (k.name.split(".") for k in KEYS) for n in range(1, len(parts))
}


def load_config(config_file: str | Path | None, overrides: Sequence[Any] = ()) -> CfgNode:
    """Defaults, then the files, base first, then the overrides; checked and frozen.

    Args:
        config_file: a YAML file, relative to the working directory; None: defaults alone. Its
            `_BASE_` names the file, or the list of files, that it changes, relative to itself.
        overrides: KEY VALUE KEY VALUE …; a later one wins.

    Names of keys in published files are understood too (`clouds.config.published`); one warning
    says which of them change nothing.

    Raises:
        FileNotFoundError: the file, or one that it is based on, is not there.
        ConfigError: everything else that is wrong with it.
    """
    settings = read_yaml(Path(config_file)) if config_file is not None else []
    settings += pair_up(overrides)
    cfg = get_cfg()
    settings, found = translate(settings)
    found += assign(cfg, settings)
    # A value that could not be assigned keeps its default, so nothing is reported twice.
    origins = {setting.name: setting.origin for setting in settings}
    found += problems(cfg, origins)
    if found:
        raise ConfigError(found)
    cfg.freeze()
    return cfg


def assign(cfg: CfgNode, settings: Sequence[Setting]) -> list[str]:
    """Write settings into `cfg`, in order; returns what is wrong with those that cannot be."""
    found = []
    for setting in settings:
        key = _KEYS.get(setting.name)
        if key is None:
            found.append(f"{setting.name} ({setting.origin}): {_no_such_key(setting.name)}")
            continue
        try:
            value = coerce(key, setting.value)
        except ValueError as error:
            origins = {setting.name: setting.origin}
            found.append(describe(setting.name, setting.value, str(error), origins))
            continue
        *parents, leaf = setting.name.split(".")
        node = cfg
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return found


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

    Args:
        path: the file.
        parents: the files that led here, the first one asked for by the user.
    """
    if path.resolve() in [parent.resolve() for parent in parents]:
        chain = " -> ".join(map(str, [*parents, path]))
        raise ConfigError([f"{BASE} leads round in a circle: {chain}"])
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
            base = path.parent / Path(name).expanduser()
            inherited += read_yaml(base, (*parents, path))
    return inherited + [setting for setting in settings if setting.name != BASE]


def nearest(name: str) -> list[str]:
    """Known keys that `name` may have been meant for, the likeliest first."""
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
    return "no such key; python tools/list_config.py lists all keys"


def _no_such_file(path: Path, parents: Sequence[Path]) -> str:
    asked = f", which is the {BASE} of {parents[-1]}," if parents else ""
    there = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, there, n=3) or there[:8]
    seen = f" {path.parent}/ holds {', '.join(close)}." if close else ""
    return f"Config file {path}{asked} does not exist (working directory: {Path.cwd()}).{seen}"


def _parse(path: Path) -> list[Setting]:
    try:
        with path.open(encoding="utf-8") as file:
            loader = yaml.SafeLoader(file)
            try:
                root = loader.get_single_node()
                return [] if root is None else list(_flatten(loader, root, "", path))
            finally:
                loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError([f"{path}{line}: not valid YAML: {error.problem}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not a YAML text file: {error}"]) from error


def _flatten(
    loader: yaml.SafeLoader, node: yaml.Node, prefix: str, path: Path
) -> Iterator[Setting]:
    """One setting per leaf under `node`, whose dotted name is `prefix`."""
    origin = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode) and prefix not in _KEYS:
        _refuse_duplicates(node, path)
        loader.flatten_mapping(node)
        for name_node, value_node in node.value:
            name = str(loader.construct_object(name_node))
            yield from _flatten(loader, value_node, f"{prefix}.{name}" if prefix else name, path)
        return
    value = loader.construct_object(node, deep=True)
    if not prefix:
        raise ConfigError([f"{origin}: a config file holds KEY: VALUE pairs, not {value!r}"])
    if value is None and prefix in _SECTIONS | PUBLISHED_SECTIONS:
        return  # all its lines may be commented out
    yield Setting(prefix, value, origin)


def _refuse_duplicates(node: yaml.MappingNode, path: Path) -> None:
    """YAML would silently keep the last of them."""
    lines: dict[str, int] = {}
    for name_node, _ in node.value:
        line = name_node.start_mark.line + 1
        name = str(name_node.value)
        if name in lines:
            raise ConfigError([f"{path}:{line}: {name} stands already in line {lines[name]}"])
        lines[name] = line
