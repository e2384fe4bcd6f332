"""Show a study: HTML report, figures, sentences, progress bars, dashboard.

conclusions: what won, in plain sentences
dashboard: serve optuna-dashboard on loopback
data: what the report shows
display: tables on a terminal, the front on one and in a notebook
dossier: the record of one trial, with dossier.html.j2
figures: the front, and the curves over alpha
html: the report, with report.html.j2 and report.css
progress: progress bars and log lines
style: number formats, palette, figure style
"""

__all__ = ["conclusions", "dashboard", "display", "dossier", "figures", "html", "progress", "style"]
