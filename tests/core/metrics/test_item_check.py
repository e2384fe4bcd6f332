"""Which items two sets of scores belong to: by hash, by text, by count."""

import numpy as np
import pytest

from uipe_core.errors import UserError
from uipe_core.metrics.scores import SetScores, require_same_items

QUESTIONS = ("Who wrote Ash?", "Where was Jaime born?", "What is his father's job?")
ANSWERS = ("Jaime Vasquez.", "In Santiago.", "He is a baker.")


def scores(questions=QUESTIONS, answers=ANSWERS, item_hash=None, n=None):
    n = len(questions) if n is None else n
    numbers, counts = np.ones(n), np.ones(n, dtype=np.int64)
    return SetScores(
        answer_loss=numbers,
        answer_tokens=counts,
        paraphrase_loss=numbers,
        paraphrase_tokens=counts,
        perturbed_loss=np.ones((n, 2)),
        perturbed_tokens=np.ones((n, 2), dtype=np.int64),
        questions=questions,
        answers=answers,
        item_hash=item_hash,
    )


def changed(row, position, text):
    return (*row[:position], text, *row[position + 1 :])


def refused(first, second, *parts):
    with pytest.raises(UserError) as caught:
        require_same_items(first, second, "forget")
    for part in ("scored on other items", "score the reference on the same corpus and split", *parts):
        assert part in str(caught.value)


def test_the_same_items_pass():
    require_same_items(scores(), scores(), "forget")
    require_same_items(scores(item_hash="a"), scores(item_hash="a"), "forget")


def test_an_equal_hash_needs_no_texts():
    require_same_items(scores(item_hash="a"), scores(None, None, "a", n=3), "forget")


def test_other_counts_give_both_and_the_first_item_only_one_has():
    refused(scores(), scores(QUESTIONS[:2], ANSWERS[:2]), "has 3 items, the reference has 2", "differs is 2", QUESTIONS[2])


def test_other_counts_give_the_first_difference_before_the_end():
    other = changed(QUESTIONS[:2], 0, "Who painted Elm?"), changed(ANSWERS[:2], 0, "Nobody.")
    refused(scores(), scores(*other), "differs is 0: 'Who wrote Ash?' against 'Who painted Elm?'")


def test_another_hash_gives_the_first_question_that_differs():
    other = scores(changed(QUESTIONS, 1, "Where was Ana born?"), ANSWERS, "b")
    refused(scores(item_hash="a"), other, "item-set hash a against b", "differs is 1: 'Where was Jaime born?' against")


def test_another_hash_with_the_same_texts_points_at_the_other_answers():
    refused(scores(item_hash="a"), scores(item_hash="b"), "questions and answers are the same", "perturbed answer")


def test_another_hash_without_texts_says_so():
    refused(scores(item_hash="a"), scores(None, None, "b", n=3), "3 items, the reference has 3", "texts are not in both")


def test_without_hashes_texts_decide():
    other = scores(changed(QUESTIONS, 2, "Is he a poet?"), changed(ANSWERS, 2, "No."))
    refused(scores(), other, "differs is 2", "against 'Is he a poet?'")
    refused(scores(item_hash="a"), other, "differs is 2")


def test_without_hashes_prompt_format_and_spaces_do_not_count():
    prompts = tuple(f"Question: {question}\n" for question in QUESTIONS)
    require_same_items(scores(item_hash="a"), scores(prompts), "forget")
    tags = tuple(f"[INST] {question} [/INST]" for question in QUESTIONS)
    decoded = tuple(answer.replace(" ", "  ").lower() for answer in ANSWERS)
    require_same_items(scores(prompts), scores(tags, decoded), "forget")


def test_without_hash_and_text_the_count_decides():
    bare = scores(None, None, n=3)
    require_same_items(scores(), bare, "forget")
    refused(scores(), scores(None, None, n=2), "has 3 items, the reference has 2", "texts are not in both")


def test_a_question_that_occurs_twice_is_no_difference():
    twice = changed(QUESTIONS, 2, QUESTIONS[0])
    require_same_items(scores(twice), scores(twice), "forget")
