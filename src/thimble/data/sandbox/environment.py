"""The environment in which a chat template runs: Jinja's sandbox, in which everything a template does is paid for.

A template is a program from a stranger. Jinja's sandbox keeps it from reaching out, but neither from hanging nor from
filling the memory, in a loop or in a single call. So its syntax tree is rewritten: loops count, and operators and
slices become filters that know what they cost; methods and attributes are those of a list.
"""

import functools
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from thimble.data.sandbox import bounded
from thimble.data.sandbox.budget import Counted, RunawayTemplateError, current, produce, text, units_of, weigh
from thimble.data.sandbox.filters import INNER, all_filters, all_tests
from thimble.data.sandbox.rewrite import rewrite
from thimble.errors import BaseModelError

if TYPE_CHECKING:
    import jinja2

MAX_SOURCE = 1_000_000  # characters of a template
MAX_TOKENS = 12_000  # of a template; those of known models have up to 4000
MAX_MESSAGE = 500  # characters of what a template says when it refuses
MAX_DATE = 200  # characters of the form of a date


def compile_template(source: str, now: datetime) -> "jinja2.Template":
    """Compile a template in the environment transformers gives it: same options, filters and functions.

    Args:
        source: Jinja source.
        now: The time `strftime_now` tells.

    Returns:
        The template; it renders only within a Budget.

    Raises:
        BaseModelError: If the source is not valid Jinja, too long, or asks for other files.
    """
    import jinja2

    if len(source) > MAX_SOURCE:
        raise BaseModelError(
            f"the chat template of the base has {len(source):,} characters: expected at most {MAX_SOURCE:,}. "
            "Use a base whose template is intact."
        )
    try:
        return _environment(now).from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise BaseModelError(
            f"the chat template of the base is not valid Jinja: {error.message} (line {error.lineno} of the template). "
            "Use a base whose template is intact."
        ) from error
    except RecursionError as error:
        raise BaseModelError("the chat template of the base is nested too deeply to be read") from error
    except BaseModelError:
        raise
    except Exception as error:
        # Python's own compiler refuses some of what Jinja lets pass.
        raise BaseModelError(f"the chat template of the base cannot be compiled: {shortened(error)}") from error


def shortened(error: Exception) -> str:
    """What an error says; a template may have made it long."""
    said = str(error)
    return said if len(said) <= MAX_MESSAGE else said[:MAX_MESSAGE] + "..."


def _environment(now: datetime) -> Any:
    from jinja2.utils import Cycler, Joiner

    def strftime_now(form: str) -> str:
        if len(form) > MAX_DATE:
            raise RunawayTemplateError(f"it writes a date in a form of more than {MAX_DATE} characters")
        return now.strftime(form)

    made = _sandbox()(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _mark()])
    made.filters, made.tests = all_filters(), all_tests()
    made.globals = {
        "range": bounded.bounded_range, "dict": bounded.bounded_dict, "namespace": _namespace(), "cycler": Cycler,
        "joiner": Joiner, "raise_exception": _raise_exception, "strftime_now": strftime_now,
    }  # fmt: skip
    return made


def _raise_exception(message: Any) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(text(message))


@functools.cache
def _sandbox() -> type:
    from jinja2.runtime import LoopContext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return type("Sandbox", (_Bounds, ImmutableSandboxedEnvironment), {"loop_class": LoopContext})


class _Bounds:
    """What is put over the methods of Jinja's sandbox."""

    intercepted_binops = frozenset({"*", "**", "%"})  # + is a filter by then
    operators = {"*": bounded.multiply, "**": bounded.power, "%": bounded.modulo}

    def __init__(self, **options: Any) -> None:
        # Constants are worked out with everything else: what is worked out earlier no budget bounds.
        super().__init__(optimized=False, finalize=_finalize(), **options)

    def _tokenize(self, source: str, name: Any, filename: Any = None, state: Any = None) -> Any:
        from jinja2.lexer import TokenStream

        return TokenStream(_few(super()._tokenize(source, name, filename, state)), name, filename)

    def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
        return super()._generate(rewrite(source), *args, **kwargs)

    def make_globals(self, more: Any) -> Any:
        return self.globals  # Jinja's is a chain of maps, which takes a fourth of the time of a rendering to walk

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return self.operators[operator](left, right)

    def call_filter(self, name: Any, *args: Any, **kwargs: Any) -> Any:
        bounded.key(name)
        if isinstance(name, str) and name.startswith(INNER):
            raise RunawayTemplateError(f"it calls the filter {name[:20]!r}")
        return super().call_filter(name, *args, **kwargs)

    def call_test(self, name: Any, *args: Any, **kwargs: Any) -> Any:
        bounded.key(name)
        return super().call_test(name, *args, **kwargs)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        current().spend(1)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str | list | tuple | dict):
            kwargs.pop("_loop_vars", None), kwargs.pop("_block_vars", None)
            return bounded.call_method(obj, args, kwargs)
        if isinstance(obj, self.loop_class):
            args = tuple(map(Counted, args))
        elif isinstance(owner, self.loop_class):
            weigh(args)
        return super().call(context, obj, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        known = _attributes(type(obj))
        return super().is_safe_attribute(obj, attr, value) and (known is None or attr in known)

    def wrap_str_format(self, value: Any) -> Any:
        owner = getattr(value, "__self__", None)
        is_format = type(owner) is str and value.__name__ == "format"
        return functools.partial(_formatter()(self).write, owner) if is_format else None


def _few(tokens: Any) -> Iterator[Any]:
    for number, token in enumerate(tokens):
        if number >= MAX_TOKENS:
            raise BaseModelError(
                f"the chat template of the base has more than {MAX_TOKENS:,} words and signs (line {token.lineno}): "
                "expected those of one conversation. Use a base whose template is intact."
            )
        yield token


@functools.cache
def _attributes(kind: type) -> frozenset[str] | None:
    """The attributes of a type that templates may read; None means all that do not begin with an underscore."""
    from jinja2.runtime import BlockReference, LoopContext, Macro
    from jinja2.utils import Cycler, Joiner, Namespace

    if issubclass(kind, LoopContext | Macro | BlockReference | Cycler | Joiner | Namespace):
        return None
    known = {str: bounded.TEXT_METHODS, list: bounded.LIST_METHODS, dict: bounded.DICT_METHODS}
    # Groups of `groupby` are tuples with names.
    known[tuple] = bounded.LIST_METHODS | frozenset(getattr(kind, "_fields", ()))
    return next((known[base] for base in kind.__mro__ if base in known), frozenset())


@functools.cache
def _finalize() -> Any:
    from jinja2 import pass_context

    @pass_context  # so that Jinja cannot work out constants before the context is there
    def finalize(context: Any, value: Any) -> str:
        if not isinstance(value, str):
            value = text(value)
        current().spend(units_of(value))
        return value

    return finalize


@functools.cache
def _formatter() -> type:
    from jinja2.sandbox import SandboxedFormatter

    class Formatter(SandboxedFormatter):
        """Formats as str.format does, field by field."""

        def write(self, form: str, /, *args: Any, **kwargs: Any) -> str:
            kwargs.pop("_loop_vars", None), kwargs.pop("_block_vars", None)
            weigh(form)
            return self.vformat(form, args, kwargs)

        def convert_field(self, value: Any, conversion: Any) -> Any:
            current().spend(10 * weigh(value))
            return super().convert_field(value, conversion)

        def format_field(self, value: Any, format_spec: str) -> Any:
            bounded.check_spec(format_spec)
            worst = 10 * weigh(value) + 4 * bounded.MAX_FIELD // bounded.UNIT_BYTES
            return produce(worst * bounded.UNIT_BYTES, super().format_field, value, format_spec)

    return Formatter


@functools.cache
def _namespace() -> type:
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class HeldNamespace(Namespace):
        """Jinja's namespace, without names that begin with an underscore, as in transformers."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, given = args[0], bounded.bounded_dict(*args[1:], **kwargs)
            Namespace.__init__(self)
            for name, value in given.items():
                self[name] = value

        def __setitem__(self, name: Any, value: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"it keeps {name[:20]!r} in a namespace, where no name may begin with _")
            super().__setitem__(name, value)

        def _held(self) -> Any:
            return self._Namespace__attrs

    return HeldNamespace


@functools.cache
def _mark() -> type:
    from jinja2.ext import Extension

    class Generation(Extension):
        """`{% generation %}` marks assistant text for other trainers; here it changes nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation
