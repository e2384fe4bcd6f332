"""Run studies as jobs of a Ray cluster, and check the files that describe clusters.

bundle: the files of a study to upload
config_checks: cluster files of `ray up`, and the entry point for both kinds of files
jobs: submit, list, follow and stop studies by Ray's job server
kuberay: RayJobs of KubeRay
secrets: secrets that stand in a file or command
"""

__all__ = ["config_checks", "jobs"]
