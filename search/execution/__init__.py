"""Run a study on Ray: what it lacks is built, trained and scored.

base_runs: states of base runs, and the Ray tasks that train or import them
budget: decide when a study stops
capacity: how many trials and base runs a cluster holds
line_inputs: feed the sampler ``line`` during a run
prerequisites: models, scores of the reference models, base runs
ray_cluster: start Ray on this machine, or join a cluster
ray_compat: everything that leans on Ray's internals
run: ``run_study``, ``confirm_study``, ``dial_study``
study_run: what a study lacks, and getting it done; progress by stage
tune: the Tune searcher that hands out trials and stores their ends
worker_pool: which workers started, which died and why
workers: the trainable and the tasks that run on workers
"""

__all__ = ["capacity", "ray_cluster", "ray_compat", "run"]
