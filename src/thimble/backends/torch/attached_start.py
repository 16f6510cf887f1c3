"""What `attach` begins with: options checked, layers found, and A and B of each, new or of a finished adapter."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from torch import nn

from thimble.backends.torch.attached_layers import as_matrix, is_conv1d_of_transformers
from thimble.backends.torch.attached_parameters import choose_parameters, parameter_places, unfit_parameter
from thimble.backends.torch.attached_places import KINDS, Place, Survey, choose, names, no_match, trained_whole, unfit
from thimble.core.adapter import Adapter, drawn
from thimble.core.inits import BUILDERS, LayerData, embedding
from thimble.core.lowrank import Factors, scale
from thimble.core.method import ADAPTER, INITS, MOST_SCALE, Init, parse_init
from thimble.errors import AdapterError, ConfigError, Problems, listing
from thimble.files.peft import named_for_peft, named_for_text
from thimble.files.peft_config import BIASES, MAX_RANK
from thimble.files.peft_parameters import SETTING, in_order
from thimble.files.torch_names import plainly

PEFT_NAMES = {
    "r": "rank", "lora_alpha": "alpha", "target_modules": "targets", "modules_to_save": "train_also",
    "lora_dropout": "dropout", "init_lora_weights": "init",
}  # fmt: skip

LISTS = ("train_also", "target_parameters")  # options that are lists of names
NOTHING = Factors(np.zeros((1, 1)), np.zeros((1, 1)), 1.0)  # of a layer whose name alone is asked about


@dataclass(frozen=True)
class LoraOptions:
    """The options of `attach`, by the names that they have there; what PEFT calls otherwise stands beside."""

    targets: str | Sequence[str] = KINDS[0]  # target_modules
    train_also: str | tuple[str, ...] = ()  # modules_to_save; a text is told as wrong
    rank: int = 16  # r: A is (r, in), B is (out, r)
    alpha: float = 32.0  # lora_alpha: the update is alpha / rank · B A
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False  # alpha / √rank instead
    use_dora: bool = False  # train the length of each row of the weight apart from its direction
    dropout: float = 0.0  # lora_dropout: share of the inputs of A left out at each step of training
    init: str = "kaiming"  # init_lora_weights
    bias: str = "none"  # biases to train: none, lora_only (of adapted layers), all
    target_parameters: str | tuple[str, ...] = ()  # parameters that are no layer's weight; a text is told as wrong
    seed: int = 0  # of random A and B


def read_options(targets: str | Sequence[str], options: Mapping[str, Any]) -> LoraOptions:
    """The options as they were given; an InputError names those that there are not."""
    known = [option.name for option in fields(LoraOptions)]
    unknown = [name for name in options if name not in known]
    if unknown:
        near = {name: difflib.get_close_matches(PEFT_NAMES.get(name, name), known, n=1) for name in unknown}
        hints = (f"did you mean {near[name][0]}?" if near[name] else f"it has {', '.join(known)}" for name in unknown)
        raise ConfigError(
            *(f"{name} is no option of attach: {hint}" for name, hint in zip(unknown, hints, strict=True))
        )
    patterns = {name: options.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    given = {name: options.get(name, ()) for name in LISTS}
    lists = {name: value if isinstance(value, str) else tuple(value or ()) for name, value in given.items()}
    return LoraOptions(targets, **{**options, **patterns, **lists})


@dataclass(frozen=True)
class Start:
    """All that is put on a model."""

    places: list[Place]
    factors: dict[str, Factors]  # by the path of the layer
    origin: dict[str, Factors]  # of those in delta form
    whole: list[str]  # names of the tensors that are trained themselves
    modules: set[str]  # paths of the modules that are trained whole, and of all inside of them
    settings: dict[str, Any]  # of PEFT's config
    dropout: float
    left_out: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, Any] = field(default_factory=dict)  # values for some of `whole`


# ---- a new adapter --------------------------------------------------------------------------------------------------


def start_new(model: nn.Module, options: LoraOptions) -> Start:
    """A fresh adapter for a model; an InputError names every problem."""
    problems, survey = Problems(_option_problems(options)), Survey(model)
    if problems.found:  # names are looked for all the same, so that what is wrong with them is told too
        lists = {name: getattr(options, name) for name in LISTS if not isinstance(getattr(options, name), str)}
        options = LoraOptions(options.targets, **lists)
    whole, wrong = trained_whole(survey, options.train_also)
    ranks, alphas = _Numbers(options.rank, options.rank_pattern), _Numbers(options.alpha, options.alpha_pattern)
    chosen = choose(survey, options.targets, whole, ranks.of)
    parameters, unfit_ones = choose_parameters(survey, options.target_parameters, whole, chosen.places)
    places = [*chosen.places, *parameters]
    problems.add(*wrong, *chosen.problems, *unfit_ones)
    problems.add(*ranks.unused("rank_pattern", survey, parameters), *alphas.unused("alpha_pattern", survey, parameters))
    init, factors, origin = parse_init(options.init), {}, {}
    problems.add(*_place_problems(places, options, init, ranks))
    problems.add(*_prefix_problems(places))
    problems.required()
    for place in places:
        rank, holder = ranks.of(_holder(place)), _holder(place)
        made = _make(place, init, rank, scale(float(alphas.of(holder)), rank, options.use_rslora), options.seed)
        if init.is_delta:
            origin[place.path] = made
        lengths = np.linalg.norm(_matrix(place), axis=1) if options.use_dora else None
        factors[place.path] = replace(made, magnitude=lengths)
    names_whole = _tensors_in(model, whole) | _biases(model, places, options.bias)
    inside = {path for path in ("", *survey.modules) if any(path == m or path.startswith(m + ".") for m in whole)}
    settings = _settings(model, places, options.bias)
    return Start(places, factors, origin, sorted(names_whole), inside, settings, options.dropout, chosen.left_out)


def _option_problems(options: LoraOptions) -> list[str]:
    """What is wrong with the options, whatever the model."""
    problems = []

    def check(name: str, value: object, is_valid: bool, expected: str) -> None:
        if not is_valid:
            problems.append(f"{name}={value!r}: expected {expected}")

    def is_rank(value: object) -> bool:
        return type(value) is int and 1 <= value <= MAX_RANK

    def is_alpha(value: object) -> bool:
        return isinstance(value, int | float) and 0 < value <= MOST_SCALE

    a_rank, an_alpha = f"a whole number from 1 to {MAX_RANK:,}", f"a number above 0, up to {MOST_SCALE:,.0f}"
    check("rank", options.rank, is_rank(options.rank), a_rank)
    check("alpha", options.alpha, is_alpha(options.alpha), an_alpha)
    for key, value in options.rank_pattern.items():
        check(f"rank_pattern[{key!r}]", value, is_rank(value), a_rank)
    for key, value in options.alpha_pattern.items():
        check(f"alpha_pattern[{key!r}]", value, is_alpha(value), an_alpha)
    check("dropout", options.dropout, 0 <= options.dropout < 1, "a share from 0 up to, not including, 1")
    check("bias", options.bias, options.bias in BIASES, f"one of {', '.join(BIASES)}")
    has_any = len(options.targets) > 0 or len(options.target_parameters) > 0
    check("targets", options.targets, has_any, "at least one layer or kind of layers")
    for name in LISTS:
        check(name, getattr(options, name), not isinstance(getattr(options, name), str), "a list of names")
    usable = [name for name, init in INITS.items() if init.needs in ("nothing", "weights") and name != ADAPTER]
    check("init", options.init, options.init in usable, f"one of {', '.join(usable)}; the others need calibration data")
    return problems


class _Numbers:
    """A rank or an alpha for each layer: the default, or that of the last pattern that names it."""

    def __init__(self, default: Any, pattern: Mapping[str, Any]) -> None:
        self._default, self._pattern = default, pattern

    def of(self, path: str) -> Any:
        found = [value for name, value in self._pattern.items() if names(name, path)]
        return found[-1] if found else self._default

    def unused(self, option: str, survey: Survey, parameters: Sequence[Place]) -> list[str]:
        own = [name for name in self._pattern if not any(names(name, place.path) for place in parameters)]
        return [no_match(option, name, survey) for name in own if not survey.matching(name)]


def _holder(place: Place) -> str:
    """The layer whose numbers a place has: PEFT gives those of the attention to its out_proj."""
    return place.path.removesuffix("." + place.inside) if place.inside else place.path


def _place_problems(places: list[Place], options: LoraOptions, init: Init, ranks: _Numbers) -> list[str]:
    """What of the options some layers cannot have."""
    problems, packed = (
        [],
        [place.path for place in places if place.called is not place.layer or place.weight == "in_proj_weight"],
    )
    computed = [place.path for place in places if not place.is_beside]
    if options.use_dora and packed:
        problems.append(
            f"use_dora: {listing(packed)} is packed attention, which PEFT's DoRA does not know: leave it out"
        )
    if options.dropout and computed:
        problems.append(
            f"dropout={options.dropout:g}: {listing(computed)} computes with its weight in a way of its own, where "
            "there is no input of A to drop: take dropout=0, or leave it out"
        )
    stacked = [place.path for place in places if place.layout.experts]
    if stacked and (init.needs == "weights" or init.is_delta):
        problems.append(f"init={init}: {listing(stacked)} is a parameter, for which kaiming or gaussian will do")
    if stacked and options.use_dora:
        problems.append(f"use_dora: {listing(stacked)} is a parameter, which PEFT's DoRA does not know: leave it out")
    grouped = [place.path for place in places if place.layout.groups > 1]
    if grouped and (init.needs == "weights" or init.is_delta):
        problems.append(
            f"init={init}: {listing(grouped)} is a convolution in groups, for which kaiming or gaussian will do"
        )
    if grouped and options.use_dora:
        problems.append(
            f"use_dora: {listing(grouped)} is a convolution in groups, which DoRA is not made for: leave it out"
        )
    for place in places:
        rank = ranks.of(_holder(place))
        if init.needs == "weights" and rank > min(place.shape):
            problems.append(
                f"rank={rank}: expected at most {min(place.shape)} for {place.path}, which is (out, in) {place.shape}, "
                f"with init {init}: give it one with rank_pattern, or leave it out"
            )
        if rank % init.rank_step:
            problems.append(f"rank={rank}: expected a multiple of {init.rank_step} for {place.path} with init {init}")
    return problems


def _prefix_problems(places: list[Place]) -> list[str]:
    """Layers that Thimble's own reader of adapters could not tell apart."""
    prefixes = named_for_text({place.path: NOTHING for place in places})[1]
    if len(prefixes) < 2:
        return []
    return [f"targets names layers in {listing(p + 'layers' for p in prefixes)}: adapt one of these parts at a time"]


def _matrix(place: Place) -> Any:
    """The weight as (out, in), float32."""
    return as_matrix(place.layer, getattr(place.layer, place.weight).detach()).float().cpu().numpy()


def _make(place: Place, init: Init, rank: int, factor: float, seed: int) -> Factors:
    """A and B of one layer; of a parameter, those of each expert are drawn for themselves."""
    if count := place.layout.experts:
        return drawn(init.name, LayerData(place.path, place.shape, rank * count, factor, seed), count)
    needed = _matrix(place) if init.needs == "weights" else None
    data = LayerData(place.path, place.shape, rank, factor, seed, weight=needed)
    is_plain = init.needs == "nothing" and not init.is_delta
    made = (embedding if place.layout.is_embedding and is_plain else BUILDERS[init.name])(data)
    return replace(made, B=made.B[:, : rank // place.layout.groups], layout=place.layout)


def _tensors_in(model: nn.Module, modules: list[str]) -> set[str]:
    """Names of the parameters and kept buffers in some modules; of shared ones, each name."""
    return {
        name for name in plainly(model.state_dict().items()) if any(name.startswith(module + ".") for module in modules)
    }


def _biases(model: nn.Module, places: list[Place], which: str) -> set[str]:
    if which == "all":
        return {name for name in plainly(model.named_parameters()) if name.rpartition(".")[2] == "bias"}
    own = {f"{place.path}.bias" for place in places if which == "lora_only"}
    return own & plainly(model.named_parameters()).keys()


def _settings(model: nn.Module, places: list[Place], bias: str) -> dict[str, Any]:
    """Fields of PEFT's config that are not those of a plain adapter of a text model."""
    found: dict[str, Any] = {} if bias == "none" else {"bias": bias}
    if all(is_conv1d_of_transformers(place.layer) for place in places):  # of a mixture PEFT finds out for itself
        found["fan_in_fan_out"] = True
    if parameters := _in_text([place.path for place in places if place.layout.experts]):
        found[SETTING] = parameters
    # PEFT opens an adapter for generation in a class that asks for a model that can generate.
    return found if type(model).__name__.endswith("ForCausalLM") else {**found, "task_type": None}


def _in_text(paths: Sequence[str]) -> tuple[str, ...]:
    """Paths as adapters have them, in the same order."""
    return tuple(named_for_text(dict.fromkeys(paths, NOTHING))[0])


# ---- a finished one -------------------------------------------------------------------------------------------------


def start_from(model: nn.Module, adapter: Adapter, options: LoraOptions) -> Start:
    """A finished adapter for a model; an InputError names every layer and tensor that does not fit."""
    problems, survey, adapter = Problems(), Survey(model), adapter.plain()
    if replace(options, dropout=0.0) != LoraOptions():
        problems.add("adapter is given, which has its own targets, ranks and modules: give no other option but dropout")
    parameters, places = parameter_places(survey), list[Place]()
    adapter = in_order(adapter, _in_text(list(parameters)))
    layers = named_for_peft(adapter)
    known = {place.path: place for path in survey.modules if survey.kind(path) for place in survey.places(path)}
    for path, factors in layers.items():
        place = (parameters if factors.layout.experts else known).get(path)
        if place is None:
            wrong = unfit(survey, path) if path in survey.modules else "is not in the model"
        else:
            is_parameter = bool(place.layout.experts)
            wrong = unfit_parameter(survey, place) if is_parameter else unfit(survey, _holder(place))
            wrong = wrong or _misfit(place, factors)
            places.append(place)
        if wrong:
            problems.add(f"the adapter's layer {path} {wrong}")
    tensors = plainly(model.state_dict().items())
    for name, values in adapter.replaced.items():
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != values.shape:
            has = "which the model lacks" if shape is None else f"which is {shape} in the model"
            problems.add(f"the adapter replaces {name} by one of shape {values.shape}, {has}")
    if problems.found:
        made_for = f"; it was made for {adapter.base}" if adapter.base else ""
        problems.found[-1] += made_for
        raise AdapterError(*problems.found)
    order = {path: number for number, path in enumerate((*known, *parameters))}
    places.sort(key=lambda place: order[place.path])
    whole = {name.rpartition(".")[0] for name in adapter.replaced}
    return Start(
        places, dict(layers), {}, sorted(adapter.replaced), whole, dict(adapter.settings), options.dropout,
        replaced=dict(adapter.replaced),
    )  # fmt: skip


def _misfit(place: Place, factors: Factors) -> str:
    """Why factors do not fit a layer, as the end of a sentence; empty if they do."""
    layout, shape = factors.layout, place.shape
    if layout == place.layout and factors.shape == shape:
        return ""
    found = f"(out, in) {factors.shape}" + (f" with {layout}" if layout != place.layout else "")
    return f"is for {found}, and the model's is {shape}" + (f" with {place.layout}" if layout != place.layout else "")
