"""What share of the gradient of some data the A of each init captures, before any training."""

from thimble.backends.open import open_session
from thimble.config.groups import COLUMNS
from thimble.config.inspect_ import InspectConfig
from thimble.config.train import TrainConfig
from thimble.core.method import AUTO_RANK, INITS
from thimble.core.targets import Size
from thimble.data.model import find_base
from thimble.errors import Problems
from thimble.events import EventLog, ignore
from thimble.models.inspection import InitShares, find_block, kind_of
from thimble.training.calibration import Calibration
from thimble.training.initialise import captured_by_inits
from thimble.training.plan import RunPlan, plan_run


def plan_measurement(config: InspectConfig, log: EventLog) -> RunPlan:
    """Check that the measurement fits the memory: the plan of a training run on the same rows, with the same memory."""
    log.stage("reading the base and the examples")
    problems = Problems(config.problems)
    if config.path is not None:
        problems.add(f"{config.path} is given with --data: leave it out, and name the base with --base")
    given = [f"--{name}" for name in ("blocks", "out") if getattr(config, name)]
    if given:
        problems.add(f"{' and '.join(given)} cannot be used with --data: no weight is decomposed and nothing is drawn")
    options = {"data": config.data, "base": config.base, "seed": config.seed}
    options |= {name: getattr(config, name) for name in COLUMNS}
    base = problems.attempt(find_base, config.base)
    if base and not base.is_own:
        problems.attempt(base.check_own, "inspect --data", "gradients are gathered by Thimble's own engine alone")
        problems.required()
    run = TrainConfig.build({**options, "rank": "auto", "init": "gradient", "eval_rows": 0, "eval_every_steps": 0})
    planning = EventLog(ignore)  # most of what it decides is about training
    run_plan = problems.attempt(plan_run, run, planning, needs_folder=False)
    (run_plan,) = problems.required(run_plan)
    for say, kind in ((log.note, "note"), (log.warning, "warning")):
        for text in planning.messages[kind]:
            say(text)
    return run_plan


def measure_init_shares(run_plan: RunPlan, log: EventLog) -> list[InitShares]:
    """Measure each layer, in the order of the model."""
    log.stage("loading the base")
    how, data = run_plan.execution, run_plan.calibration_data()
    session = open_session(run_plan.model, run_plan.config.compute, how.store, how.is_streamed)
    shapes = data.shapes.items()
    sizes = {path: Size(INITS["gradient"].allowed_rank(AUTO_RANK, shape), 1.0) for path, shape in shapes}
    found = captured_by_inits(sizes, Calibration(data, session, log))
    rows = []
    for path, size in sizes.items():
        energy = next(iter(found.values()))[path][1]
        shares = {init: float(layers[path][0].sum()) / energy if energy else 0.0 for init, layers in found.items()}
        rows.append(InitShares(path, kind_of(path), find_block(path) or 0, size.rank, energy, **shares))
    return rows
