"""Show a study: HTML report, figures, sentences, progress bars, dashboard.

conclusions: what won, in plain sentences
dashboard: serve optuna-dashboard on loopback
data: what the report shows
dossier: the record of one trial, with dossier.html.j2
figures: the front, and the curves over alpha
html: the report, with report.html.j2 and report.css
progress: progress bars and log lines
style: number formats, palette, figure style
terminal: tables on a terminal, the front among them
"""

__all__ = ["conclusions", "dashboard", "dossier", "figures", "html", "progress", "style", "terminal"]
