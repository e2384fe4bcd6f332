"""Read and validate study files; every error is reported at once, with its line.

bounds: limits of the numbers of a study
corpora: one class per kind of corpus section
data_sources (private): data sets of the hub, folders and files
errors: `StudyFileError`, messages with key, value and remedy; URLs without their passwords
models: one class per kind of model section
paths (private): paths of a study made absolute
plugins: load extensions of other packages
runtime: sections that may change from run to run: audit, resources, budget, cache
sections: the other sections: scoring, search, objectives
study: `StudySpec`, `load_study`, `parse_study`
study_file: YAML with line numbers, settings of a command line
unlearning (private): section ``unlearning``, and the base runs it stands for
"""

__all__ = ["corpora", "errors", "models", "plugins", "runtime", "sections", "study", "study_file"]
