"""Show a study: HTML report, figures, sentences, progress bars, dashboard.

charts: data of the interactive charts, drawn by templates/charts.js
conclusions: what won, in plain sentences
dashboard: serve optuna-dashboard on loopback
data: what the report shows
display: tables on a terminal; fronts in pictures and notebooks
dossier: the record of one trial, with templates/dossier.html.j2
figures (private): the front, and the curves over alpha
html: the report, with templates/report.html.j2, report.css and report.js
progress: progress bars and log lines
recommendation: which model to ship, and what speaks against it
serve: the report over HTTP, live while the study runs
style: number formats, palettes, figure style
"""

__all__ = ["conclusions", "dashboard", "display", "dossier", "html", "progress", "serve", "style"]
