"""Run tasks of EleutherAI's lm-evaluation-harness on the model as it stands in a worker: the objective ``lm_eval``.

Needs the extra ``uipe-search[lm-eval]``. The model is not loaded again: the harness gets the one that was just moved.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.spec.sections import Harness
from uipe_core.errors import UserError, first_line

if TYPE_CHECKING:
    from uipe_core.models.loading import LoadedModel

ACCURACIES = ("acc,none", "acc_norm,none", "exact_match,none", "exact_match,strict-match")
"""Results of a task that count as its accuracy; the first that it has."""


def require_harness(tasks: Harness) -> None:
    """Raise UserError if the package is missing or knows no such task; no data set is loaded."""
    manager = _task_manager(tasks)
    unknown = [name for name in tasks.tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm_eval.tasks: the harness knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")


def harness_accuracy(loaded: "LoadedModel", tasks: Harness) -> float:
    """Return the mean accuracy of the tasks, in [0, 1].

    Raises:
        UserError: The harness fails, or a task has no accuracy.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found = simple_evaluate(
            model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=tasks.batch_size),
            tasks=list(tasks.tasks),
            limit=tasks.limit,
            task_manager=_task_manager(tasks),
            apply_chat_template=tasks.chat,
            log_samples=False,
            verbosity="ERROR",
        )
    except Exception as error:  # tasks are programs, and their data sets come from the network
        raise UserError(f"lm_eval: the harness failed ({type(error).__name__}: {first_line(error)})") from error
    results = {name: found["results"].get(name, {}) for name in tasks.tasks}
    return sum(_accuracy(name, each) for name, each in results.items()) / len(results)


def _accuracy(name: str, result: dict[str, Any]) -> float:
    for key in ACCURACIES:
        if key in result:
            return float(result[key])
    raise UserError(f"lm_eval.tasks: {name} has no accuracy (it has {', '.join(result) or 'no result'}); choose another task")


def _task_manager(tasks: Harness) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("objective lm_eval: needs the harness; pip install 'uipe-search[lm-eval]'") from error
    if tasks.include_path is not None and not Path(tasks.include_path).is_dir():
        raise UserError(f"lm_eval.include_path: there is no folder {tasks.include_path}; correct it, or leave it out")
    return TaskManager(include_path=tasks.include_path)
