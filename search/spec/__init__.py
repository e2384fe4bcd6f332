"""Read and validate study files; every error is reported at once, with its line.

bounds: limits of the numbers of a study
corpora: one class per kind of corpus section
data_sources (private): data sets of the hub, folders and files
errors: `StudyFileError`, and messages with key, value and remedy
plugins: load extensions of other packages
redaction: URLs without their passwords
runtime: sections that may change from run to run: resources, budget, cache
sections: the other sections: model, unlearning, scoring, search
study: `StudySpec`, `load_study`, `parse_study`
study_file: YAML with line numbers, paths made absolute
"""

__all__ = ["corpora", "errors", "plugins", "redaction", "runtime", "sections", "study", "study_file"]
