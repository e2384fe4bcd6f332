"""Show a study: HTML report, figures, sentences, progress bars.

charts: data of the interactive charts, drawn by templates/charts.js
conclusions: what won, in plain sentences
data: what the report shows
display: tables on a terminal; fronts in pictures and notebooks
dossier: the record of one trial, with templates/dossier.html.j2
figures: the front, and the curves over alpha
html: the report, with templates/report.html.j2, report.css and report.js
progress: progress bars and log lines
recommendation: which model to ship, and what speaks against it
style: number formats, palettes, figure style
"""

__all__ = ["conclusions", "data", "display", "dossier", "figures", "html", "progress", "style"]
