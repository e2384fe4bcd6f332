"""Whether two sets of scores belong to the same items; forget quality of others would mean nothing."""

import re

from uipe_core.errors import UserError
from uipe_core.metrics.scores import SetScores

REMEDY = "score the reference on the same corpus and split"


def require_same_items(scores: SetScores, expected: SetScores, name: str) -> None:
    """Refuses a reference that was scored on other items.

    Counts must agree, and item-set hashes where both carry one. Without both hashes texts are compared where both carry
    them: an item differs if neither its question nor its answer agrees. Only letters and digits count then, and a question
    may stand inside a prompt, because code bases log questions with their prompt format around them and decode tokens
    with other spaces. Where neither hash nor text is known, the count has to do.

    Args:
        scores: One set of the scored model.
        expected: The same set of the reference.
        name: Name of the set, for the error.

    Raises:
        UserError: Other items; gives both counts and the first item that differs, with both questions where known.
    """
    hashed = scores.item_hash is not None and expected.item_hash is not None
    same_hash = hashed and scores.item_hash == expected.item_hash
    first = None if same_hash else _first_difference(scores, expected)
    if len(scores) == len(expected) and (same_hash or (first is None and not hashed)):
        return
    counts = f"set {name!r} has {len(scores)} items, the reference has {len(expected)}"
    hashes = f" (item-set hash {scores.item_hash} against {expected.item_hash})" if hashed and not same_hash else ""
    raise UserError(
        f"the reference was scored on other items: {counts}{hashes}; {_described(scores, expected, first)}; {REMEDY}"
    )


def _first_difference(scores: SetScores, expected: SetScores) -> int | None:
    """Index of the first item that differs, None where the texts of all shared items agree or are not known."""
    shared = min(len(scores), len(expected))
    if scores.questions is None or expected.questions is None:
        return None
    exact = scores.item_hash is not None and expected.item_hash is not None
    for index in range(shared):
        questions = scores.questions[index], expected.questions[index]
        answers = None
        if scores.answers is not None and expected.answers is not None:
            answers = scores.answers[index], expected.answers[index]
        if exact:
            # Both come from here, so texts that are not equal are other items.
            agrees = questions[0] == questions[1] and (answers is None or answers[0] == answers[1])
        else:
            agrees = _contained(*questions) or (answers is not None and _plain(answers[0]) == _plain(answers[1]))
        if not agrees:
            return index
    return None if len(scores) == len(expected) else shared


def _described(scores: SetScores, expected: SetScores, first: int | None) -> str:
    if scores.questions is None or expected.questions is None:
        return "which item differs first is not known, because the texts are not in both"
    if first is None:
        return "questions and answers are the same, so the first difference is in a paraphrased or perturbed answer"
    shared = min(len(scores), len(expected))
    if first == shared:
        longer = scores.questions if len(scores) > shared else expected.questions
        return f"the first item that differs is {first}, which only one of them has: {longer[first]!r}"
    return f"the first item that differs is {first}: {scores.questions[first]!r} against {expected.questions[first]!r}"


def _contained(first: str, second: str) -> bool:
    one, two = _plain(first), _plain(second)
    return one == two or (one != "" and two != "" and (one in two or two in one))


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).casefold()
