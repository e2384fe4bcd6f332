"""Read and write evaluation logs.

multiple_choice: results on multiple-choice questions as JSON
open_unlearning: TOFU_EVAL.json and TOFU_SUMMARY.json of open-unlearning
parts: JSON files, checked sections of a log, sets in locuslab/tofu's format
tofu: eval_log_aggregated.json of locuslab/tofu; `read_log` reads either TOFU format
"""

__all__ = ["multiple_choice", "open_unlearning", "parts", "tofu"]
