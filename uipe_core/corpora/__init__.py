"""Load corpora: questions to forget and to keep.

files: data sets of the hub, folders and files, row by row
multiple_choice: WMDP, MMLU and own multiple-choice questions
muse: MUSE (arXiv 2407.06460)
people: a generated world of fictitious people
questions: a user's own questions, conversations and texts
split: selection and reporting halves of a corpus
tofu: TOFU (arXiv 2401.06121)
types: Item, ChoiceItem, Corpus and their hashes; answers such as "I do not know."
people_facts (private): facts, names and authors of the generated world
question_rows (private): shapes of such rows, and windows of texts
rows (private): rows of one file of any type
"""

__all__ = ["files", "multiple_choice", "muse", "people", "questions", "split", "tofu", "types"]
