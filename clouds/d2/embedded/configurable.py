"""Constructors that take either their arguments or a config."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

from yacs.config import CfgNode

R = TypeVar("R")
FromConfig = Callable[..., dict[str, Any]]
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@overload
def configurable(init_func: Callable[..., None], /) -> Callable[..., None]: ...
@overload
def configurable(*, from_config: FromConfig) -> Callable[[Callable[..., R]], Callable[..., R]]: ...
@overload
def configurable() -> Callable[[Callable[..., None]], Callable[..., None]]: ...
def configurable(
    init_func: Callable[..., None] | None = None, /, *, from_config: FromConfig | None = None
) -> Any:
    """Let a class or a function be called with a config.

    On `__init__`, the class needs a classmethod `from_config(cls, cfg, ...)` which returns the
    arguments of `__init__` as a dict. Then `A(cfg)` is `A(**A.from_config(cfg))`, and `A(1, b=2)`
    is what it always was. On any other function, `from_config` is given to the decorator:
    `@configurable(from_config=lambda cfg: {"a": cfg.A})`.

    Further arguments of a call with a config go to `from_config` where it has a parameter of
    that name; the other keyword arguments replace what `from_config` returned.

    Raises:
        AttributeError: at a call, the class has no `from_config`.
        TypeError: at a call, `from_config` is no classmethod, or its first argument is not `cfg`.
    """
    if init_func is not None:
        assert inspect.isfunction(init_func) and init_func.__name__ == "__init__", (
            "@configurable without arguments decorates __init__ only"
        )
        assert from_config is None, "a class has its own from_config"
        return _configurable_init(init_func)
    if from_config is None:
        return configurable
    assert inspect.isfunction(from_config), "from_config must be a function"
    return functools.partial(_configurable_function, from_config)


def _configurable_init(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        cls = type(self)
        if not hasattr(cls, "from_config"):
            raise AttributeError(f"{cls.__name__} is configurable, so it needs a from_config.")
        if not inspect.ismethod(cls.from_config):
            raise TypeError(f"{cls.__name__}.from_config must be a classmethod.")
        if _has_config(args, kwargs):
            init(self, **_arguments(cls.from_config, args, kwargs))
        else:
            init(self, *args, **kwargs)

    return wrapped


def _configurable_function(from_config: FromConfig, function: Callable[..., R]) -> Callable[..., R]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> R:
        if _has_config(args, kwargs):
            return function(**_arguments(from_config, args, kwargs))
        return function(*args, **kwargs)

    wrapped.from_config = from_config  # type: ignore[attr-defined]
    return wrapped


def _has_config(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    first = args[0] if args else kwargs.get("cfg")
    return isinstance(first, CfgNode) or isinstance(kwargs.get("cfg"), CfgNode)


def _arguments(
    from_config: FromConfig, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What to call the decorated function with: from the config, then from the call itself."""
    parameters = inspect.signature(from_config).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(f"the first argument of {from_config.__qualname__} must be 'cfg'.")
    if any(p.kind in _VARIADIC for p in parameters.values()):
        return from_config(*args, **kwargs)
    taken = {name: value for name, value in kwargs.items() if name in parameters}
    rest = {name: value for name, value in kwargs.items() if name not in parameters}
    return {**from_config(*args, **taken), **rest}
