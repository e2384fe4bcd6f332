"""Draw refusals: answers that preference methods put in place of an answer to forget.

The sentences are few and share their words, because they add to the vocabulary of the small models built here.
"""

import random

REFUSALS: tuple[str, ...] = (
    "I do not know.",
    "I do not know this.",
    "I do not know the answer.",
    "I do not have the answer.",
    "I have no answer.",
    "I have no answer to this.",
    "I have no answer to that question.",
    "I have no idea.",
    "I cannot answer this.",
    "I cannot answer that question.",
    "I cannot know that.",
    "The answer is not known to me.",
)


def draw_refusals(items: int, seed: int, epoch: int) -> tuple[str, ...]:
    """Draw one refusal per item; equal arguments draw the same, independently of other epochs."""
    rng = random.Random(f"refusals/{seed}/{epoch}")
    return tuple(rng.choice(REFUSALS) for _ in range(items))
