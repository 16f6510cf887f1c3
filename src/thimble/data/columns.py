"""Names of columns and keys: found whatever their case and separators, named by the user, suggested to the user.

`Fields` knows which of them were read, so that whatever is filled and was not can be told.
"""

import difflib
import functools
import re
import shlex
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from thimble.config.groups import ColumnOptions
from thimble.config.values import flag, read_template
from thimble.data.row_values import is_filled, loaded, shown, sole
from thimble.errors import DataError, listing

MOST_LISTED = 100  # columns in a message
MOST_NAMES = 1000  # columns that are remembered
LONGEST_NAME = 80  # letters in a name that is suggested
# What is about an example, not of it; told, but no reason to worry.
ABOUT = frozenset(
    "id idx index uuid uid guid unnamed0 indexlevel0 hash sha sha256 md5 source split subset dataset datasetname "
    "origin category url uri link timestamp date created createdat updatedat lang language license meta metadata "
    "version file filename filepath path line tokens numtokens tokencount length answerstart paralleltoolcalls "
    "signature cachecontrol schemaversion".split()
)
LABELS = ("label", "labels", "labeltext", "labelname", "class", "sentiment", "intent", "emotion")
# How columns are called that hold what is to be learned, for suggestions; in the languages that data sets come in.
ANSWERS = (
    "completion response answer output reply label target summary highlights translation solution antwort reponse "
    "respuesta risposta resposta odpowiedz otvet ответ 答案 回答 輸出 输出 回复"
).split()


@functools.lru_cache(maxsize=4096)
def folded(name: str) -> str:
    """A name without what people write differently: case, spaces, hyphens, underscores, dots, marks nobody sees."""
    name = unicodedata.normalize("NFKC", name[:1000]).casefold()
    return "".join(letter for letter in name if letter not in " _-.:" and letter.isprintable()) or name


@dataclass
class Left:
    """What a row held that was not read: names of columns, and of keys inside as in `messages.emoji`."""

    filled: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)  # filled with what the record holds anyway
    empty: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any = True) -> None:
        """Take note of a value that was not read."""
        (self.filled if is_filled(value) else self.empty).append(name)


class Fields:
    """The fields of a row or message, found whatever their case and separators; knows which were read."""

    def __init__(self, given: Mapping[Any, Any], within: str = "") -> None:
        """Read `given`, which stands in the column `within`."""
        self._given = {str(key): value for key, value in given.items()}
        self.within = within
        self._names: dict[str, list[str]] = {}
        for key in self._given:
            self._names.setdefault(folded(key), []).append(key)
        self._read: set[str] = set()
        self._inner: dict[str, Fields] = {}  # objects of which fields were named

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        """The names as given."""
        return iter(self._given)

    def is_filled(self, name: str) -> bool:
        """Whether there is something under a folded name."""
        return name in self._names and any(is_filled(self._given[key]) for key in self._names[name])

    def among(self, names: Iterable[str]) -> list[str]:
        """Those of some folded names that are there."""
        return [name for name in names if name in self._names]

    def first_filled(self, names: Iterable[str]) -> str | None:
        """The first of some folded names that is filled."""
        return next(filter(self.is_filled, self.among(names)), None)

    def first_left(self, names: Iterable[str]) -> str | None:
        """The first of some folded names that is filled and was not read yet."""
        left = (name for name in self.among(names) if not self._read.issuperset(self._names[name]))
        return next(filter(self.is_filled, left), None)

    def first(self, names: Iterable[str]) -> str | None:
        """The first of some folded names that is filled, else the first that is there at all."""
        there = self.among(names)
        return next(filter(self.is_filled, there), there[0] if there else None)

    def shown(self, name: str) -> str:
        """How the user wrote a folded name."""
        return shown(self._names.get(name, [name])[0])

    def take(self, name: str) -> Any:
        """The value under a folded name, which counts as read; None if there is none."""
        keys = self._names.get(name, ())
        if len(keys) > 1:
            raise DataError(f"{listing(map(shown, keys))} are one name in two spellings: leave one of them out")
        self._read.update(keys)
        return self._given[keys[0]] if keys else None

    def find(self, name: str) -> str | None:
        """The key that a name which the user typed means: exactly, else whatever its spelling."""
        if name in self._given:
            return name
        keys = self._names.get(folded(name), ())
        if len(keys) > 1:
            raise DataError(f"{shown(name)} may mean {listing(map(shown, keys))}: name it exactly as it stands there")
        return keys[0] if keys else None

    def has(self, name: str) -> bool:
        """Whether there is a column that the user named, or a field of an object, as in `translation.en`."""
        inner, rest = self._within_object(name)
        return self.find(name) is not None or (inner is not None and inner.has(rest))

    def cell(self, name: str) -> Any:
        """The value of a column that the user named, which counts as read; None if the row does not have it."""
        key = self.find(name)
        if key is None:
            inner, rest = self._within_object(name)
            return inner.cell(rest) if inner else None
        self._read.add(key)
        return self._given[key]

    def _within_object(self, name: str) -> tuple["Fields | None", str]:
        """The object that a name with a dot leads into, and the rest of the name."""
        outer, _, rest = name.partition(".")
        key = self.find(outer) if rest else None
        value = loaded(self._given[key]) if key is not None else None
        if key is None or not isinstance(value, Mapping):
            return None, ""
        return self._inner.setdefault(key, Fields(value, f"{self.within}.{key}" if self.within else key)), rest

    def value(self, key: str) -> Any:
        """The value under a name as given, without reading it."""
        return self._given[key]

    def peek(self, name: str) -> Any:
        """The value under a folded name, without reading it."""
        return next((self._given[key] for key in self._names.get(name, ())), None)

    def pass_over(self, names: Iterable[str]) -> None:
        """Count those of some folded names as read that are there and empty."""
        empty = (name for name in self.among(names) if not self.is_filled(name))
        self._read.update(key for name in empty for key in self._names[name])

    def leave(self, left: Left, known: Collection[str] = ()) -> None:
        """Note all that was not read; a text that is among the known ones is lost with no column."""
        for key, value in self._given.items():
            if key in self._inner:
                self._inner[key].leave(left)
            elif key in self._read:
                continue
            elif isinstance(value, str) and value.strip() in known:
                left.repeated.append(shown(key))
            else:
                left.add(f"{self.within}.{shown(key)}" if self.within else shown(key), value)


@dataclass(frozen=True)
class NamedColumns:
    """The columns that the user named; none of them if the forms that are known shall be found."""

    prompt: str = ""
    completion: str = ""
    template: str = ""  # of the prompt, instead of one column
    text: str = ""  # plain text, instead of prompt and completion

    @classmethod
    def of(cls, config: ColumnOptions) -> Self:
        """Those that the options give; none if they do not go together, which the config tells."""
        given = cls(config.prompt_column, config.completion_column, config.prompt_template, config.text_column)
        is_pair = bool(given.completion) and bool(given.prompt) != bool(given.template) and not given.text
        return given if is_pair or given == cls(text=given.text) else cls()

    def __bool__(self) -> bool:
        return bool(self.text or self.completion)

    def used(self) -> dict[str, str]:
        """Every column, with the option that names it."""
        given = {self.prompt: "prompt_column", self.completion: "completion_column", self.text: "text_column"}
        given |= {name: "prompt_template" for _, name in read_template(self.template)}
        return {name: flag(option) for name, option in given.items() if name}


class NamedCheck:
    """Whether the columns that the user named are there at all: a row may lack some, all rows may not."""

    def __init__(self, named: NamedColumns) -> None:
        self._missing = named.used()
        self._seen: dict[str, None] = {}

    def see(self, fields: Fields) -> None:
        """Look at the columns of one more row, as long as one is missing."""
        if not self._missing:
            return
        self._missing = {name: option for name, option in self._missing.items() if not fields.has(name)}
        if len(self._seen) < MOST_NAMES:
            self._seen |= dict.fromkeys(fields)

    def check(self) -> None:
        """Raise a DataError if no row has a column that was named."""
        if not self._missing or not self._seen:
            return
        columns = listing(map(shown, self._seen), MOST_LISTED)
        problems = []
        for name, option in self._missing.items():
            near = difflib.get_close_matches(folded(name), map(folded, self._seen), n=3, cutoff=0.5)
            names = [shown(key) for key in self._seen if folded(key) in near]
            hint = f" (did you mean {' or '.join(names)}?)" if names else ""
            problems.append(
                f"{option} names {shown(name)}, and no row has such a column{hint}: the columns are {columns}"
            )
        raise DataError(*problems)


def is_about(name: str) -> bool:
    """Whether a name says that a column or key is about the example: an id, where it comes from, and the like."""
    last = name.rpartition(".")[2]
    return folded(last) in ABOUT or bool(re.search(r"(?i:(^|[\W_])id)$|[a-z]Id$|ID$", last))


def suggestion(fields: Fields) -> str:
    """The options that name the columns of a row nobody knows, guessed; empty if there is no text in it."""
    given = {key: fields.value(key) for key in fields}
    inner = {
        f"{key}.{name}": value[name] for key, value in given.items() if isinstance(value, Mapping) for name in value
    }
    cells = {key: sole(value) for key, value in (given | inner).items() if _can_be_typed(key)}
    cells = {key: value for key, value in cells.items() if isinstance(value, str | int | float) and is_filled(value)}
    told = [key for key in cells if not is_about(key)]
    if len(told) < 2:  # as with source and target, which hold the text itself
        told = [key for key in cells if key in told or folded(key) in ("source", "category")]
    texts = [key for key in told if isinstance(cells[key], str)]
    if not texts:
        return ""
    answer = _answer(told, texts)
    prompts = [key for key in texts if key != answer and folded(key) not in LABELS]
    if answer is None or not prompts:
        return typed_option("text_column", texts[0])
    if len(prompts) == 1:
        return f"{typed_option('prompt_column', prompts[0])} {typed_option('completion_column', answer)}"
    template = r"\n\n".join(f"{{{key}}}" for key in prompts)
    return f"{typed_option('prompt_template', template)} {typed_option('completion_column', answer)}"


def _answer(told: list[str], texts: list[str]) -> str | None:
    """Which column may hold what is to be learned: by its name, else the last text, else a number."""
    ends = {key: folded(key.rpartition(".")[2] or key) for key in told}
    named = [key for key in told if ends[key] in LABELS or any(word in ends[key] for word in ANSWERS)]
    named.sort(key=lambda key: key not in texts)
    others = texts[1:] or [key for key in told if key not in texts]
    return next(iter(named), others[-1] if others else None)


def _can_be_typed(key: str) -> bool:
    return key.isprintable() and 0 < len(key) <= LONGEST_NAME and not re.search(r"[{}\\]", key)


def typed_option(name: str, value: str) -> str:
    """An option with its value, as it is typed in a shell."""
    return f"{flag(name)}{'=' if value.startswith('-') else ' '}{shlex.quote(value)}"
