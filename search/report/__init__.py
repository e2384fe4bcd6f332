"""Show a study: HTML report, figures, sentences, progress bars.

conclusions: what won, in plain sentences
data: what the report shows
dossier: the record of one trial, with dossier.html.j2
figures: the front, and the curves over alpha
html: the report, with report.html.j2 and report.css
progress: progress bars and log lines
style: number formats, palette, figure style
"""

__all__ = ["conclusions", "data", "dossier", "figures", "html", "progress", "style"]
